"""The proxy's sockets and timers around its plan."""

from __future__ import annotations

import asyncio
import itertools
import logging
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from broker.chaos.addresses import (
    endpoint_of,
    joined,
    listen_on,
    parse_endpoint,
    refuse_open_host,
)
from broker.chaos.connection import Connection, close
from broker.chaos.events import (
    Action,
    Closed,
    Cut,
    Ended,
    Event,
    HalfClose,
    Heal,
    Inject,
    Injected,
    Opened,
    Passing,
    Refuse,
    Swallow,
    Tick,
)
from broker.chaos.faults import ChaosError, Direction, Fault, How, Kind, Rule, Which, describe
from broker.chaos.plan import ChaosPlan, Conditions
from broker.logs import log

_logger = logging.getLogger("draftmq.chaos")
_COUNTERS = ("accepted", "refused", "upstream_failed", "bytes_up", "bytes_down", "bytes_swallowed")
#: Until the next try to accept when there are no file descriptors left.
_EXHAUSTED_S = 0.1

T = TypeVar("T")


class ChaosProxy:
    """A TCP proxy in a thread of this process, which injects faults.

    ``listen`` and ``upstream`` are ``tcp://HOST:PORT`` (listening on port 0 takes a free one), or
    lists of these that belong together in pairs. The upstreams need not be there yet. Raises
    :class:`ChaosError` for addresses that are none, cannot be listened on, or are open to other
    machines without ``insecure``.
    """

    def __init__(
        self,
        listen: str | Sequence[str] = "tcp://127.0.0.1:0",
        upstream: str | Sequence[str] = (),
        *,
        rules: Iterable[Rule] = (),
        seed: int = 0,
        insecure: bool = False,
    ) -> None:
        listens = [listen] if isinstance(listen, str) else list(listen)
        upstreams = [upstream] if isinstance(upstream, str) else list(upstream)
        if not listens or len(listens) != len(upstreams):
            raise ChaosError(
                f"each address to listen on needs its upstream: there are {len(listens)} and "
                f"{len(upstreams)}"
            )
        self._listens = [parse_endpoint(endpoint) for endpoint in listens]
        self._upstreams = [parse_endpoint(endpoint) for endpoint in upstreams]
        if not insecure:
            for host, _port in self._listens:
                refuse_open_host(host)
        self.counters: Counter[str] = Counter(dict.fromkeys(_COUNTERS, 0))
        self._rules, self._seed = tuple(rules), seed
        self._numbers = itertools.count(1)
        self._connections: dict[int, tuple[Connection, dict[str, Any]]] = {}
        self._listeners: list[socket.socket] = []
        #: where peers connect, one for each pair
        self.endpoints: list[str] = []
        self._loop = asyncio.new_event_loop()
        self._thread: threading.Thread | None = None

    # -- life -----------------------------------------------------------------------------------

    def start(self) -> ChaosProxy:
        """Listen, and begin to forward. The script's time begins now."""
        try:
            for host, port in self._listens:
                self._listeners.append(listen_on(host, port))
        except ChaosError:
            self._close()
            raise
        self.endpoints = [endpoint_of(listener) for listener in self._listeners]
        self._plan = ChaosPlan(self._rules, self._seed, self._loop.time())
        self._stopping: asyncio.Future[None] = self._loop.create_future()
        self._changed = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._thread = threading.Thread(target=self._run, name="draftmq-chaos", daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Close all connections, with a FIN, and stop listening."""
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stopping.set_result, None)
            self._thread.join()

    def __enter__(self) -> ChaosProxy:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        """Where peers connect, of the first pair."""
        return self.endpoints[0]

    def __repr__(self) -> str:
        injected = sum(self._plan.injected.values()) if self._thread else 0
        return f"<ChaosProxy connections={len(self._connections)} injected={injected}>"

    # -- faults, from any thread ------------------------------------------------------------------

    def inject(self, fault: Fault, connection: int | None = None) -> int:
        """Begin a fault now; how often it struck. ``connection`` names a single one by number."""
        return self._strike(Inject(fault, connection))

    def cut(self, which: Which = Which.ALL, how: How = How.RST, pair: int = 0) -> int:
        """Cut connections now; how many there were."""
        return self.inject(Fault(Kind.CUT, connections=which, how=how, pair=pair))

    def heal(self) -> None:
        """End all faults; the script's remaining ones do not come any more."""
        self._call(lambda: self._handle(Heal()))

    def snapshot(self) -> dict[str, Any]:
        """What ``GET /status`` shows."""
        return self._call(self._snapshot)

    def _strike(self, event: Inject) -> int:
        return sum(isinstance(a, Injected) for a in self._call(lambda: self._handle(event)))

    def _snapshot(self) -> dict[str, Any]:
        return {
            "seed": self._seed,
            "listen": self.endpoints,
            "upstream": [f"tcp://{joined(*address)}" for address in self._upstreams],
            "injected": {kind.value: self._plan.injected[kind] for kind in Kind},
            "counters": dict(self.counters),
            "active": self._plan.snapshot(),
            "connections": [
                facts | {"number": number, "age_s": round(self._loop.time() - facts["age_s"], 3)}
                for number, (_, facts) in self._connections.items()
            ],
        }

    def _call(self, function: Callable[[], T]) -> T:
        """Run in the loop's thread, which owns the plan and the connections."""

        async def called() -> T:
            return function()

        if self._thread is None or not self._thread.is_alive():
            raise ChaosError("the proxy does not run")
        return asyncio.run_coroutine_threadsafe(called(), self._loop).result()

    # -- the loop ---------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._serve())
        self._close()

    async def _serve(self) -> None:
        self._handle(Tick())
        pairs = enumerate(zip(self._listeners, self._upstreams, strict=True), start=1)
        async with asyncio.TaskGroup() as group:
            accepting = [
                group.create_task(self._accept(group, listener, upstream, pair))
                for pair, (listener, upstream) in pairs
            ]
            await self._stopping
            for task in accepting:
                task.cancel()
            for connection, _ in self._connections.values():
                connection.cut(How.FIN)

    async def _accept(
        self,
        group: asyncio.TaskGroup,
        listener: socket.socket,
        upstream: tuple[str, int],
        pair: int,
    ) -> None:
        while True:
            try:
                client, _ = await self._loop.sock_accept(listener)
            except OSError as error:
                log(_logger, "error", "cannot_accept", {"error": str(error)})
                await asyncio.sleep(_EXHAUSTED_S)
                continue
            group.create_task(self._proxy(client, upstream, pair))

    async def _proxy(self, client: socket.socket, upstream: tuple[str, int], pair: int) -> None:
        number = next(self._numbers)
        self.counters["accepted"] += 1
        if any(isinstance(a, Refuse) for a in self._handle(Opened(number, pair))):
            self.counters["refused"] += 1
            log(_logger, "info", "refused", {"connection": number, "pair": pair})
            close(client, How.RST)
            return
        facts = {"pair": pair, "age_s": self._loop.time(), "bytes_up": 0, "bytes_down": 0}

        def count(way: Direction, n_bytes: int) -> None:
            facts[f"bytes_{way}"] += n_bytes
            self.counters[f"bytes_{way}"] += n_bytes

        connection = Connection(client, _Weather(self, number), count)
        self._connections[number] = connection, facts
        log(_logger, "debug", "opened", {"connection": number, "pair": pair})
        try:
            await connection.run(*upstream)
        except (OSError, TimeoutError) as error:
            self.counters["upstream_failed"] += 1
            fields = {"connection": number, "upstream": joined(*upstream), "error": str(error)}
            log(_logger, "warning", "upstream_failed", fields)
        finally:
            del self._connections[number]
            self._handle(Closed(number))
            log(_logger, "debug", "closed", {"connection": number, "pair": pair})

    def _handle(self, event: Event) -> list[Action]:
        actions = self._plan.handle(event, self._loop.time())
        for action in actions:
            if isinstance(action, Injected):
                log(_logger, "info", "injected", _fields(action))
            elif isinstance(action, Ended):
                log(_logger, "info", "ended", {"kind": action.fault.kind.value})
            elif isinstance(action, (Cut, HalfClose)) and action.connection in self._connections:
                connection = self._connections[action.connection][0]
                if isinstance(action, Cut):
                    connection.cut(action.how)
                else:
                    connection.half_close(action.direction)
        if actions:
            self._changed.set()
            self._changed = asyncio.Event()
        self._set_timer()
        return actions

    def _set_timer(self) -> None:
        due = self._plan.next_timer
        if self._timer is not None:
            if self._timer.when() == due:
                return
            self._timer.cancel()
        self._timer = None if due is None else self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self._handle(Tick())

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._loop.close()


class _Weather:
    """One connection's view of the proxy."""

    def __init__(self, proxy: ChaosProxy, number: int) -> None:
        self._proxy, self._number = proxy, number

    def conditions(self, direction: Direction) -> Conditions:
        return self._proxy._plan.conditions(self._number, direction)

    def delay_s(self, direction: Direction) -> float:
        return self._proxy._plan.delay_s(self._number, direction)

    def lost_bytes(self, direction: Direction) -> bool:
        return self._proxy._plan.lost_bytes(self._number, direction)

    def passing(self, direction: Direction, n_bytes: int) -> list[Action]:
        actions = self._proxy._handle(Passing(self._number, direction, n_bytes))
        if Swallow() in actions:
            self._proxy.counters["bytes_swallowed"] += n_bytes
        return actions

    async def change(self) -> None:
        await self._proxy._changed.wait()


def _fields(action: Injected) -> dict[str, Any]:
    which = "all" if action.connection is None else action.connection
    said = {name: str(value) for name, value in describe(action.fault).items()}
    return said | {"connection": which}
