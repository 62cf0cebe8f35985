"""The limit: bytes over loopback TCP, straight or through a userland relay, with nothing else done.

The receiver reads into one buffer again and again, so that no memory is ever new to it.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

_CHUNK = 1 << 20


class RawTcp:
    """A source process that sends as many bytes as it is asked for, over ``hops`` connections."""

    def __init__(self, hops: int) -> None:
        context = multiprocessing.get_context("spawn")
        listener, asks = _listen(), _listen()
        target = listener.getsockname()
        self._processes = []
        if hops == 2:
            ready: Any = context.SimpleQueue()
            relay = context.Process(target=_relay, args=(ready, target), daemon=True)
            relay.start()
            self._processes.append(relay)
            target = ready.get()
        source = context.Process(target=_source, args=(asks.getsockname(), target), daemon=True)
        source.start()
        self._processes.append(source)
        self._asking, _ = asks.accept()
        self._data, _ = listener.accept()
        asks.close()
        listener.close()
        self._buffer = memoryview(bytearray(_CHUNK))

    def take(self, nbytes: int) -> float:
        """Seconds from asking for so many bytes until they are here."""
        began = time.perf_counter()
        self._asking.sendall(nbytes.to_bytes(8, "little"))
        left = nbytes
        while left:
            left -= self._data.recv_into(self._buffer[: min(left, _CHUNK)])
        return time.perf_counter() - began

    def close(self) -> None:
        self._asking.close()
        self._data.close()
        for process in self._processes:
            process.join(5)


def _listen() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


def _source(asks: tuple[str, int], target: tuple[str, int]) -> None:
    asked, out = socket.create_connection(asks), socket.create_connection(target)
    out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    block = memoryview(bytearray(4 * _CHUNK))
    while octets := asked.recv(8, socket.MSG_WAITALL):
        left = int.from_bytes(octets, "little")
        while left:
            sent = min(left, len(block))
            out.sendall(block[:sent])
            left -= sent


def _relay(ready: Any, target: tuple[str, int]) -> None:
    listener = _listen()
    ready.put(listener.getsockname())
    inward, _ = listener.accept()
    outward, view = socket.create_connection(target), memoryview(bytearray(_CHUNK))
    outward.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while count := inward.recv_into(view):
        outward.sendall(view[:count])


@contextlib.contextmanager
def raw_tcp(hops: int) -> Iterator[Callable[[int], float]]:
    """A function from bytes to seconds."""
    raw = RawTcp(hops)
    try:
        yield raw.take
    finally:
        raw.close()
