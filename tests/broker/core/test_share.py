"""How much of the workers' combined rate training gets, in virtual time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from broker.protocol import messages as m
from tests.broker.core.rig import Rig

N_STEPS = 80


class Pool:
    """Ranks that step together, each with ``ahead`` requests under way, and workers that compute
    one request after the other. A message takes ``delay_s``.
    """

    def __init__(self, seconds: list[float], ahead: int, delay_s: float, credits: int) -> None:
        self.rig = Rig(hedge_after=0)
        self.seconds = {f"w{number}": each for number, each in enumerate(seconds)}
        self.ahead = ahead
        self.delay_s = delay_s
        self.waiting: dict[str, list[m.RequestId]] = {name: [] for name in self.seconds}
        self.answered: dict[str, set[int]] = {f"c{rank}": set() for rank in range(4)}
        self.asked = self.step = 0
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        for name in self.seconds:
            self.rig.worker(name, credits=credits)
        for name in self.answered:
            self.rig.client(name)

    def share(self) -> float:
        """Of the rate that the workers would have if they never waited."""
        began = self.rig.now
        self._ask()
        while self.step < N_STEPS:
            self.rig.now, _, call, told = heapq.heappop(self._events)
            call(*told)
        rate = N_STEPS * len(self.answered) / (self.rig.now - began)
        return rate / sum(1 / each for each in self.seconds.values())

    def _in(self, delay_s: float, call: Callable[..., None], *told: Any) -> None:
        item = (self.rig.now + delay_s, next(self._numbers), call, told)
        heapq.heappush(self._events, item)

    def _ask(self) -> None:
        for step in range(self.asked, self.step + self.ahead):
            for client in self.answered:
                self._in(self.delay_s, self._tell, lambda c=client, s=step: self.rig.ask(c, s))
        self.asked = self.step + self.ahead

    def _tell(self, tell: Callable[[], Any]) -> None:
        """Have the core told something, and pass on what it sends."""
        tell()
        for name, messages in self.rig.sent.items():
            for message in messages:
                if isinstance(message, m.Request):
                    self._in(self.delay_s, self._arrives, name, message.id)
                elif isinstance(message, m.Reply):
                    self._in(self.delay_s, self._delivered, name, message.id)
        self.rig.sent.clear()

    def _arrives(self, worker: str, request_id: m.RequestId) -> None:
        self.waiting[worker].append(request_id)
        if len(self.waiting[worker]) == 1:
            self._in(self.seconds[worker], self._computed, worker)

    def _computed(self, worker: str) -> None:
        request_id = self.waiting[worker].pop(0)
        seconds = self.seconds[worker]
        reply = lambda: self.rig.reply(worker, request_id, seconds)  # noqa: E731
        self._in(self.delay_s, self._tell, reply)
        if self.waiting[worker]:
            self._in(seconds, self._computed, worker)

    def _delivered(self, client: str, request_id: m.RequestId) -> None:
        self.answered[client].add(request_id.number)
        self._tell(lambda: self.rig.from_client(client, m.Received((request_id,))))
        if all(self.step in steps for steps in self.answered.values()):
            self.step += 1
            self._ask()


@pytest.mark.parametrize(
    ("seconds", "ahead", "share"),
    [
        pytest.param([0.05] * 4, 2, 0.95, id="equal-workers"),
        pytest.param([0.05] * 3 + [0.2], 4, 0.95, id="one-four-times-slower"),
        pytest.param([0.05] * 3 + [0.5], 12, 0.95, id="one-ten-times-slower"),
        pytest.param([0.05] * 3 + [0.5], 2, 0.75, id="one-ten-times-slower-and-little-ahead"),
    ],
)
def test_training_gets_nearly_all_of_the_workers_rate(
    seconds: list[float], ahead: int, share: float
) -> None:
    assert Pool(seconds, ahead, delay_s=0.002, credits=2).share() >= share


def test_a_slow_worker_gets_only_what_is_not_wanted_soon() -> None:
    rig = Rig()
    rig.worker("fast", credits=1)
    rig.worker("slow", credits=2)
    rig.client("c")
    rig.ask("c", 0)
    rig.ask("c", 1)
    for name, seconds in (("fast", 0.1), ("slow", 0.9)):
        rig.now += seconds
        rig.reply(name, _asked(rig, name)[0], compute_s=seconds)
    rig.ask("c", 2)
    rig.ask("c", 3)  # the first answer of a life does not count
    for name, seconds in (("fast", 0.1), ("slow", 0.9)):
        rig.now += seconds
        rig.reply(name, _asked(rig, name)[1], compute_s=seconds)
    for number in range(4, 8):
        rig.ask("c", number)
    assert len(_asked(rig, "slow")) == 2  # the fast one will have done these four sooner
    for number in range(8, 16):
        rig.ask("c", number)
    (*_, late) = _asked(rig, "slow")
    assert late.number >= 11
    assert len(_asked(rig, "fast")) == 3


def test_a_worker_that_was_slow_once_is_tried_again() -> None:
    rig = Rig()
    rig.worker("fast", credits=1)
    rig.worker("slow", credits=1)
    rig.client("c")
    rig.ask("c", 0)
    rig.ask("c", 1)
    for name, seconds in (("fast", 0.1), ("slow", 0.4)):
        rig.now += seconds
        rig.reply(name, _asked(rig, name)[0], compute_s=seconds)
    for number in range(2, 40):
        rig.ask("c", number)
        rig.ask("c", 100 + number)
        rig.now += 0.1
        rig.reply("fast", _asked(rig, "fast")[-1], compute_s=0.1)
        rig.from_client("c", m.Cancel(rig.id("c", 100 + number)))
    assert len(_asked(rig, "slow")) == 2


def _asked(rig: Rig, name: str) -> list[m.RequestId]:
    return [each.id for each in rig.sent[name] if isinstance(each, m.Request)]
