"""The limit of the wire path: its frames through libzmq, and nothing else done.

DEALER to ROUTER, ROUTER to DEALER, in three processes, with our sockets' settings and frames and
parts of our sizes: no headers, no checksums, no books, and what arrives is dropped.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator
from typing import Any

import zmq

from broker.peer.parts import PART_BYTES
from broker.peer.tensors import FRAME_BYTES
from broker.protocol.limits import Limits
from broker.transport.allocator import adapt_allocator
from broker.transport.sockets import configure

_ANY = "tcp://127.0.0.1:0"


class BareZmq:
    """A source process that sends as many bytes as it is asked for, through a forwarder."""

    def __init__(self, largest_bytes: int) -> None:
        processes = multiprocessing.get_context("spawn")
        told: Any = processes.SimpleQueue()
        forwarder = processes.Process(target=_forward, args=(told,), daemon=True)
        forwarder.start()
        ours, its = told.get()
        source = processes.Process(target=_send, args=(its, largest_bytes), daemon=True)
        source.start()
        self._processes = [forwarder, source]
        adapt_allocator()
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket = _open(self._context, zmq.DEALER)
        self._socket.connect(ours)

    def take(self, nbytes: int, replies: int, depth: int) -> float:
        """Seconds for each of so many replies, of which ``depth`` are asked for at once."""
        began = time.perf_counter()
        for _ in range(depth):
            self._ask(nbytes)
        for taken in range(replies):
            left = nbytes
            while left:
                left -= sum(map(len, self._socket.recv_multipart(copy=False)))
            if taken < replies - depth:
                self._ask(nbytes)
        return (time.perf_counter() - began) / replies

    def _ask(self, nbytes: int) -> None:
        self._socket.send(nbytes.to_bytes(8, "little"))

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._context.destroy(linger=0)


def _open(context: zmq.Context[Any], kind: int) -> zmq.Socket[Any]:
    sock = context.socket(kind)
    configure(sock, Limits())
    return sock


def _send(endpoint: str, largest_bytes: int) -> None:
    sock = _open(zmq.Context(), zmq.DEALER)
    sock.connect(endpoint)
    octets = memoryview(bytearray(b"\1") * largest_bytes)
    sock.send(b"")  # so that the forwarder knows it
    while True:
        nbytes = int.from_bytes(sock.recv(), "little")
        frames = [octets[at : at + FRAME_BYTES] for at in range(0, nbytes, FRAME_BYTES)]
        frames[-1] = frames[-1][: nbytes - FRAME_BYTES * (len(frames) - 1)]
        each = PART_BYTES // FRAME_BYTES
        for at in range(0, len(frames), each):
            sock.send_multipart(frames[at : at + each], copy=False)


def _forward(told: Any) -> None:
    adapt_allocator()
    context: zmq.Context[Any] = zmq.Context()
    front, back = _open(context, zmq.ROUTER), _open(context, zmq.ROUTER)
    front.bind(_ANY)
    back.bind(_ANY)
    told.put([sock.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0") for sock in (front, back)])
    asker, (source, _) = b"", back.recv_multipart()
    poller = zmq.Poller()
    for sock in (front, back):
        poller.register(sock, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if front in ready:
            asker, asked = front.recv_multipart()
            back.send_multipart([source, asked])
        if back in ready:
            _, *frames = back.recv_multipart(copy=False)
            front.send_multipart([asker, *frames], copy=False)


@contextlib.contextmanager
def bare_zmq(largest_bytes: int) -> Iterator[Callable[[int, int, int], float]]:
    """:meth:`BareZmq.take`."""
    bare = BareZmq(largest_bytes)
    try:
        yield bare.take
    finally:
        bare.close()
