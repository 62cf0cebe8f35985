"""The same harness with many peers: what one request costs the broker's core.

Workers die and come back, clients lose their connections; nothing else goes wrong, and the
invariants of single events are left out, since they look at everything there is.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.sim.peers import BrokerProcess, Process
from tests.sim.schedule import Op, Schedule
from tests.sim.world import World

#: Each rank asks so often, each within so much time.
_REQUESTS_EACH, _ASKING_S = 2, 4.0
#: Share of the workers that die, and of the clients that lose their connection, meanwhile.
_CHURN = 0.05


@dataclass(frozen=True)
class Cost:
    """What a broker's core did for one cluster."""

    ranks: int
    workers: int
    requests: int
    #: how many of them ended in a result
    results: int
    #: messages, losses and ticks that the core was told
    events: int
    #: Python functions that were called meanwhile; 0 where they were not counted
    calls: int
    seconds: float

    @property
    def calls_per_request(self) -> float:
        return self.calls / self.requests

    @property
    def microseconds_per_request(self) -> float:
        return 1e6 * self.seconds / self.requests


class _Meter:
    """Around a core's ``handle``: counts events and calls, takes the time."""

    def __init__(self, handle: Callable[..., Any], count_calls: bool) -> None:
        self._handle = handle
        self._count_calls = count_calls
        self.events = 0
        self.calls = 0
        self.seconds = 0.0

    def __call__(self, event: Any, now: float) -> Any:
        self.events += 1
        if self._count_calls:
            sys.setprofile(self._called)
        began = time.perf_counter()
        try:
            return self._handle(event, now)
        finally:
            self.seconds += time.perf_counter() - began
            if self._count_calls:
                sys.setprofile(None)

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        ours = frame.f_globals.get("__name__", "").startswith("broker.")
        if event == "call" and ours:  # and no collector's, which may come at any time
            self.calls += 1


class _LargeWorld(World):
    """A world whose broker is metered and whose peers are believed."""

    def __init__(self, schedule: Schedule, count_calls: bool) -> None:
        super().__init__(schedule)
        self._count_calls = count_calls
        self.meters: list[_Meter] = []

    def start(self, name: str) -> None:
        super().start(name)
        process = self.process(name)
        if isinstance(process, BrokerProcess):
            meter = _Meter(process.core.handle, self._count_calls)
            process.core.handle = meter  # type: ignore[method-assign]
            self.meters.append(meter)

    def witness(self, process: Process, event: Any, actions: list[Any], now: float) -> None:
        """Believe it."""


def measure(ranks: int, workers: int, *, count_calls: bool, seed: int = 0) -> Cost:
    """What the broker does for so many ranks and workers. Calls are deterministic, time is not."""
    world = _LargeWorld(_schedule(ranks, workers, seed), count_calls)
    world.play_until(world.schedule.ends_at + 60.0)
    (meter,) = world.meters
    results = sum(ask.ended == "result" for ask in world.asks.values())
    return Cost(ranks, workers, len(world.asks), results, meter.events, meter.calls, meter.seconds)


def table(sizes: list[tuple[int, int]]) -> str:
    """Sizes side by side, for a person."""
    lines = ["  ranks  workers  requests  results   events  us/request"]
    for ranks, workers in sizes:
        cost = measure(ranks, workers, count_calls=False)
        lines.append(
            f"{cost.ranks:7}  {cost.workers:7}  {cost.requests:8}  {cost.results:7}  "
            f"{cost.events:7}  {cost.microseconds_per_request:10.0f}"
        )
    return "\n".join(lines)


def _schedule(ranks: int, workers: int, seed: int) -> Schedule:
    rng = random.Random(seed)
    broker = {"role": "broker", "heartbeat_s": 20.0, "liveness_s": 100.0}
    worker = {"role": "worker", "serves": "m", "credits": 2, "max_mappings": 1, "token_s": 0.001}
    client = {"role": "client", "job": "job", "resend_s": 60.0}
    ops = [Op(0.0, "start", "b1", broker)]
    ops += [Op(rng.random() * 0.5, "start", f"w{n}", worker) for n in range(workers)]
    ops += [Op(rng.random() * 0.5, "start", f"c{n}", client) for n in range(ranks)]
    for label in range(ranks * _REQUESTS_EACH):
        how = {"label": label, "nature": "ok", "n_tokens": 100, "step": label // ranks}
        how |= {"model": "m", "mapping_id": "", "deadline_s": 600.0}
        ops.append(Op(1.0 + rng.random() * _ASKING_S, "submit", f"c{label % ranks}", how))
    for n in rng.sample(range(workers), int(_CHURN * workers)):
        how = {"down_s": 0.5, "quietly": False}
        ops.append(Op(1.0 + rng.random() * _ASKING_S, "crash", f"w{n}", how))
    for n in rng.sample(range(ranks), int(_CHURN * ranks)):
        ops.append(Op(1.0 + rng.random() * _ASKING_S, "cut", f"c{n}", {"broker": "b1"}))
    return Schedule(seed, ("b1",), tuple(sorted(ops, key=lambda op: op.at)))
