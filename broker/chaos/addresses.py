"""TCP addresses as users write them, and the sockets behind them."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from urllib.parse import urlsplit

from broker.chaos.faults import ChaosError

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_BACKLOG = 1024
#: What an unreachable upstream may take to say so.
_CONNECT_S = 10.0


def parse_endpoint(endpoint: str) -> tuple[str, int]:
    """``tcp://HOST:PORT`` as host and port. Raises :class:`ChaosError`."""
    try:
        parts = urlsplit(endpoint)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or port is None or parts.scheme != "tcp" or parts.path:
        raise ChaosError(f"{endpoint!r} is no address; write tcp://HOST:PORT")
    return host, port


def refuse_open_host(host: str) -> None:
    """Whoever reaches the proxy reaches what is behind it. Raises :class:`ChaosError`."""
    if host not in _LOOPBACK:
        raise ChaosError(
            f"{host!r} can be reached from other machines, and what is behind the proxy with it; "
            "listen on 127.0.0.1, or say --insecure"
        )


def listen_on(host: str, port: int) -> socket.socket:
    """A listening socket that does not block. Raises :class:`ChaosError`."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        with contextlib.ExitStack() as stack:
            stack.callback(listener.close)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(_BACKLOG)
            listener.setblocking(False)
            stack.pop_all()
    except OSError as error:
        raise ChaosError(
            f"cannot listen on tcp://{joined(host, port)}: {error}; choose another --listen"
        ) from error
    return listener


async def connect(host: str, port: int) -> socket.socket:
    """A connected socket that does not block. Raises ``OSError`` or ``TimeoutError``."""
    loop = asyncio.get_running_loop()
    async with asyncio.timeout(_CONNECT_S):
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        end = socket.socket(family, kind, protocol)
        with contextlib.ExitStack() as stack:
            stack.callback(end.close)
            end.setblocking(False)
            await loop.sock_connect(end, address)
            stack.pop_all()
    return end


def endpoint_of(listener: socket.socket) -> str:
    """``tcp://HOST:PORT`` of a listening socket."""
    return f"tcp://{joined(*listener.getsockname()[:2])}"


def joined(host: str, port: int) -> str:
    """``HOST:PORT``, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
