"""One connection through the proxy: two pumps, and what the plan does to them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol

from broker.chaos.addresses import connect
from broker.chaos.events import Action, Flip, Swallow, Truncate
from broker.chaos.faults import Direction, How
from broker.chaos.plan import Conditions

_logger = logging.getLogger("draftmq.chaos")
#: Read at once; and how many such chunks may be under way when they are delayed (4 MiB).
_CHUNK_BYTES, _CHUNKS = 1 << 18, 16
#: A throttled way sends what it may in so much time, then waits.
_SLICE_S = 0.05
#: What a gracefully cut connection has to take the peers' last bytes and close.
_FIN_S = 0.5

#: Chunks under way, each with the time when it may go out.
Queue = asyncio.Queue[tuple[float, bytes]]


class Weather(Protocol):
    """What a connection asks of the proxy, each for one of its two ways."""

    def conditions(self, direction: Direction) -> Conditions: ...

    def delay_s(self, direction: Direction) -> float: ...

    def lost_bytes(self, direction: Direction) -> bool: ...

    def passing(self, direction: Direction, n_bytes: int) -> Iterable[Action]: ...

    async def change(self) -> None:
        """Wait until conditions may have changed."""


class Connection:
    """Copies bytes both ways until an end closes, breaks, or :meth:`cut` is called.

    It stops reading when it cannot write, so that backpressure passes through.
    """

    def __init__(
        self,
        client: socket.socket,
        weather: Weather,
        count: Callable[[Direction, int], None],
    ) -> None:
        self._client = client
        #: where each way comes from and goes to, once there is an upstream
        self._ends: dict[Direction, tuple[socket.socket, socket.socket]] = {}
        self._weather = weather
        self._count = count
        #: ways whose receiver was told that no more comes
        self._closed: set[Direction] = set()
        #: ways whose last byte has passed
        self._finished: set[Direction] = set()
        self._over: asyncio.Future[How] = asyncio.get_running_loop().create_future()

    def cut(self, how: How) -> None:
        """End both sides: with a reset, or with a FIN after what was forwarded."""
        if not self._over.done():
            self._over.set_result(how)

    def half_close(self, direction: Direction) -> None:
        """Tell the receiver on this way that no more comes; throw away what does."""
        self._closed.add(direction)
        if direction in self._ends:
            with contextlib.suppress(OSError):
                self._ends[direction][1].shutdown(socket.SHUT_WR)

    async def run(self, host: str, port: int) -> None:
        """Returns when the connection is over and its sockets are closed.

        Raises ``OSError`` or ``TimeoutError`` when the upstream cannot be reached.
        """
        connecting = asyncio.create_task(connect(host, port))
        try:
            await asyncio.wait((connecting, self._over), return_when=asyncio.FIRST_COMPLETED)
            if self._over.done() and not connecting.done():
                connecting.cancel()
                close(self._client, self._over.result())
                return
            upstream = connecting.result()
        except BaseException:
            close(self._client, How.RST)
            raise
        for end in (self._client, upstream):
            with contextlib.suppress(OSError):  # it is gone already, as reading will tell
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._ends = {
            Direction.UP: (self._client, upstream),
            Direction.DOWN: (upstream, self._client),
        }
        for way in self._closed:
            self.half_close(way)
        await self._copy()

    async def _copy(self) -> None:
        tasks = []
        for way in self._ends:
            queue: Queue = asyncio.Queue(_CHUNKS)
            tasks.append(asyncio.create_task(self._guarded(self._read, way, queue)))
            tasks.append(asyncio.create_task(self._guarded(self._write, way, queue)))
        how = How.RST
        try:
            how = await self._over
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            if how is How.FIN:
                await self._say_goodbye()
            for end in self._ends[Direction.UP]:
                close(end, how)

    async def _guarded(
        self, pump: Callable[[Direction, Queue], Awaitable[None]], way: Direction, queue: Queue
    ) -> None:
        try:
            await pump(way, queue)
        except OSError:  # a peer reset its end; the other learns it the same way
            self.cut(How.RST)
        except Exception:
            _logger.exception("connection_failed")
            self.cut(How.RST)

    async def _read(self, way: Direction, queue: Queue) -> None:
        loop, source = asyncio.get_running_loop(), self._ends[way][0]
        due = 0.0
        while True:
            chunk = await loop.sock_recv(source, _CHUNK_BYTES)
            due = max(due, loop.time() + self._weather.delay_s(way))  # never past one another
            await queue.put((due, chunk))
            if not chunk:
                return

    async def _write(self, way: Direction, queue: Queue) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk = await queue.get()
            if (wait_s := due - loop.time()) > 0:
                await asyncio.sleep(wait_s)
            while self._weather.conditions(way).stalled:
                await self._weather.change()
            if not chunk:
                await self._finish(way)
                return
            await self._pass(way, chunk)

    async def _pass(self, way: Direction, chunk: bytes) -> None:
        if way in self._closed:
            return
        sent = memoryview(chunk)
        for action in self._weather.passing(way, len(chunk)):
            if isinstance(action, Swallow):
                return
            if isinstance(action, Flip):
                flipped = bytearray(sent)
                flipped[action.offset_bytes] ^= 1 << action.bit
                sent = memoryview(flipped)
            elif isinstance(action, Truncate):
                await self._send(way, sent[: action.keep_bytes])
                self.cut(action.how)
                return
        await self._send(way, sent)

    async def _send(self, way: Direction, data: memoryview) -> None:
        loop, sink = asyncio.get_running_loop(), self._ends[way][1]
        while data and way not in self._closed:
            conditions = self._weather.conditions(way)
            if conditions.stalled:
                await self._weather.change()
                continue
            size = min(len(data), max(1, int(_SLICE_S * min(conditions.bytes_per_s, 1e9))))
            await loop.sock_sendall(sink, data[:size])
            self._count(way, size)
            data = data[size:]
            await asyncio.sleep(size / conditions.bytes_per_s)

    async def _finish(self, way: Direction) -> None:
        """The sender closed its end: tell the receiver, unless a blackhole is between them."""
        while self._weather.conditions(way).swallowed:
            await self._weather.change()
        if self._weather.lost_bytes(way):
            self.cut(How.RST)
            return
        self.half_close(way)
        self._finished.add(way)
        if len(self._finished) == len(self._ends):
            self.cut(How.FIN)

    async def _say_goodbye(self) -> None:
        """Send a FIN each way, and read what still comes: else closing would send a reset."""
        with contextlib.suppress(OSError, TimeoutError):
            for end in self._ends[Direction.UP]:
                end.shutdown(socket.SHUT_WR)
            async with asyncio.timeout(_FIN_S):
                for end in self._ends[Direction.UP]:
                    while await asyncio.get_running_loop().sock_recv(end, _CHUNK_BYTES):
                        pass


def close(end: socket.socket, how: How) -> None:
    """Close a socket; ``RST`` throws away what is under way and resets the peer."""
    if how is How.RST:
        with contextlib.suppress(OSError):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.close()
