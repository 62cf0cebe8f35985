"""An upstream that echoes, and the proxy before it."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from broker.chaos.addresses import parse_endpoint
from broker.chaos.faults import Rule, read_rule
from broker.chaos.proxy import ChaosProxy

PATIENCE_S = 10.0


class Echo:
    """Sends back what it gets, in a thread for each connection; remembers how each one ended."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self.endings: list[str] = []
        self.received = bytearray()
        self._open: set[socket.socket] = set()
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._open.add(connection)
                threading.Thread(target=self._echo, args=(connection,), daemon=True).start()

    def _echo(self, connection: socket.socket) -> None:
        ending = "fin"
        try:
            while data := connection.recv(1 << 16):
                self.received += data
                connection.sendall(data)
        except OSError:
            ending = "rst"
        self._open.discard(connection)
        connection.close()
        self.endings.append(ending)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def echo() -> Iterator[Echo]:
    with contextlib.closing(Echo()) as server:
        yield server


class Bench:
    """Proxies before the echo server, and clients of them, all closed at the end of the test."""

    def __init__(self, echo: Echo, stack: contextlib.ExitStack) -> None:
        self.echo = echo
        self._stack = stack

    def proxy(self, *said: dict[str, Any], seed: int = 0) -> ChaosProxy:
        rules: list[Rule] = [read_rule(rule) for rule in said]
        proxy = ChaosProxy("tcp://127.0.0.1:0", self.echo.endpoint, rules=rules, seed=seed)
        return self._stack.enter_context(proxy)

    def client(self, where: ChaosProxy | str) -> socket.socket:
        endpoint = where if isinstance(where, str) else where.endpoint
        client = socket.create_connection(parse_endpoint(endpoint), timeout=PATIENCE_S)
        return self._stack.enter_context(contextlib.closing(client))

    def talking(self, proxy: ChaosProxy) -> socket.socket:
        """A client whose connection is known to be through."""
        client = self.client(proxy)
        assert ask(client, b"hello") == b"hello"
        return client


@pytest.fixture
def bench(echo: Echo) -> Iterator[Bench]:
    with contextlib.ExitStack() as stack:
        yield Bench(echo, stack)


def ask(client: socket.socket, data: bytes) -> bytes:
    client.sendall(data)
    return read(client, len(data))


def read(client: socket.socket, n_bytes: int) -> bytes:
    """As many bytes as that, or those before the end."""
    got = b""
    while len(got) < n_bytes and (more := client.recv(n_bytes - len(got))):
        got += more
    return got


def silent(client: socket.socket, seconds: float) -> bool:
    """Whether nothing comes for so long."""
    client.settimeout(seconds)
    try:
        client.recv(1)
    except TimeoutError:
        return True
    finally:
        client.settimeout(PATIENCE_S)
    return False
