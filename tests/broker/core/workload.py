"""Workers of any speed under a steady load, in virtual time: what each of them gets to do."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

from broker.core import Tick
from broker.protocol import messages as m
from tests.broker.core.rig import Rig

#: (worker, how many it has begun, now, tokens) -> seconds that its forward takes
Speed = Callable[[int, float, int], float]


class Workload:
    """Clients that always have ``ahead`` requests under way, and workers that compute one after the
    other. A message takes no time; everybody says every second that it is there.
    """

    def __init__(
        self,
        speeds: dict[str, Speed],
        *,
        clients: int = 4,
        ahead: int = 2,
        tokens: Callable[[int], int] = lambda number: 100,
        credits: int = 2,
        **config: object,
    ) -> None:
        self.rig = Rig(**config)
        self.speeds = speeds
        self.tokens = tokens
        self.began_at = self.rig.now
        #: worker -> when its answers came
        self.answers: dict[str, list[float]] = {name: [] for name in speeds}
        self.delivered: Counter[str] = Counter()
        self._given: dict[str, list[m.RequestId]] = defaultdict(list)
        self._tokens: dict[m.RequestId, int] = {}
        self._begun: Counter[str] = Counter()
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._numbers = itertools.count()
        self._asked = itertools.count()
        for name in speeds:
            self.rig.worker(name, credits=credits)
        for number in range(clients):
            self.rig.client(f"c{number}")
        for _ in range(ahead):
            for number in range(clients):
                self._ask(f"c{number}")
        self._in(1.0, self._alive)

    def run(self, seconds: float) -> Workload:
        """Go on for so long."""
        end = self.rig.now + seconds
        while True:
            timer = self.rig.core.next_timer
            due = min(self._events[0][0], end if timer is None else timer)
            if due >= end:
                self.rig.now = end
                return self
            self.rig.now = max(self.rig.now, due)
            if self._events[0][0] <= due:
                _, _, call, told = heapq.heappop(self._events)
                call(*told)
            else:
                self.rig.handle(Tick())
            self._pass_on()

    def rate(self, worker: str, since: float, until: float) -> float:
        """Answers a second between two times after the beginning."""
        times = [at - self.began_at for at in self.answers[worker]]
        return sum(since <= at < until for at in times) / (until - since)

    def _in(self, delay_s: float, call: Callable[..., None], *told: Any) -> None:
        heapq.heappush(self._events, (self.rig.now + delay_s, next(self._numbers), call, told))

    def _alive(self) -> None:
        for name in self.speeds:
            self.rig.from_worker(name, m.Heartbeat(-1))
        for name in list(self.rig.core.clients):
            self.rig.from_client(name, m.Heartbeat(-1))
        self._in(1.0, self._alive)

    def _ask(self, client: str) -> None:
        number = next(self._asked)
        n_tokens = self.tokens(number)
        asked = self.rig.ask(client, number, n_tokens=n_tokens, ttl_s=600.0)
        self._tokens[asked] = n_tokens

    def _pass_on(self) -> None:
        while self.rig.sent:
            sent, self.rig.sent = self.rig.sent, {}
            for name, messages in sent.items():
                for message in messages:
                    self._arrives(name, message)

    def _arrives(self, name: str, message: m.Message) -> None:
        if isinstance(message, m.Request):
            self._given[name].append(message.id)
            if len(self._given[name]) == 1:
                self._begin(name)
        elif isinstance(message, (m.Reply, m.Failure)) and name in self.rig.core.clients:
            self.delivered[name] += 1
            self.rig.from_client(name, m.Received((message.id,)))
            self._ask(name)

    def _begin(self, name: str) -> None:
        asked = self._given[name][0]
        seconds = self.speeds[name](self._begun[name], self.rig.now, self._tokens[asked])
        self._begun[name] += 1
        self._in(seconds, self._computed, name, seconds)

    def _computed(self, name: str, seconds: float) -> None:
        asked = self._given[name].pop(0)
        self.answers[name].append(self.rig.now)
        self.rig.reply(name, asked, compute_s=seconds)
        if self._given[name]:
            self._begin(name)


def steady(seconds: float) -> Speed:
    """A worker that takes so long for each request, whatever its size."""
    return lambda number, now, n_tokens: seconds


def first_slower(seconds: float, factor: float, n_first: int = 1) -> Speed:
    """A worker whose first forwards are slower by this factor."""
    return lambda number, now, n_tokens: seconds * (factor if number < n_first else 1)


def pauses(seconds: float, number_of_pause: int, pause_s: float) -> Speed:
    """A worker that pauses once in a forward."""
    return lambda number, now, n_tokens: seconds + (pause_s if number == number_of_pause else 0)
