"""Which fault strikes which connection when: a state machine without sockets, clock or chance.

The same rules, seed and events give the same actions. What strikes a connection by chance depends
only on the seed, the rule, and that connection's number, age and bytes, so it does not change with
what other connections do.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from random import Random
from typing import Any

from broker.chaos.events import (
    Action,
    Closed,
    Cut,
    Ended,
    Event,
    Flip,
    HalfClose,
    Heal,
    Inject,
    Injected,
    Opened,
    Passing,
    Refuse,
    Swallow,
    Truncate,
)
from broker.chaos.faults import (
    IN_PASSING,
    LASTING,
    Direction,
    Fault,
    Kind,
    Rule,
    Which,
    describe,
)

_MIB = 1 << 20
_WAYS = (Direction.UP, Direction.DOWN)


@dataclass(frozen=True)
class Conditions:
    """The faults that one direction of one connection is under now."""

    stalled: bool = False
    swallowed: bool = False
    bytes_per_s: float = math.inf


@dataclass(eq=False)
class _Active:
    """A lasting fault under way. ``connection`` is None where it lies on all of them."""

    fault: Fault
    connection: int | None


@dataclass(eq=False)
class _ByBytes:
    """A rule by bytes on one way: how many go by until it strikes."""

    rule: Rule
    rng: Random
    left: float = 0.0

    def draw(self) -> None:
        self.left += self.rng.expovariate(self.rule.per_mib / _MIB)


@dataclass(eq=False)
class _Way:
    """One direction of one connection."""

    rng: Random
    by_bytes: list[_ByBytes] = field(default_factory=list)
    #: bytes were swallowed: what follows would be read as something else, and is swallowed too
    lost_bytes: bool = False


@dataclass(eq=False)
class _Connection:
    pair: int
    ways: dict[Direction, _Way]
    #: faults for the next bytes that pass
    pending: list[Fault] = field(default_factory=list)
    #: cut; what still comes is swallowed until it is closed
    ended: bool = False


class ChaosPlan:
    """Rules and a seed, at work on the connections that are open."""

    def __init__(self, rules: Iterable[Rule] = (), seed: int = 0, now: float = 0.0) -> None:
        self.rules = tuple(rules)
        self.seed = seed
        self.connections: dict[int, _Connection] = {}
        self.active: list[_Active] = []
        #: faults that struck, by kind; one on all connections counts once
        self.injected: Counter[Kind] = Counter()
        self._healed = False
        self._numbers = itertools.count()
        #: (when, tie-break, rule and its connection, or the fault that ends), a heap
        self._timers: list[tuple[float, int, tuple[int, int | None] | _Active]] = []
        self._luck = [Random(f"{seed}/{index}") for index in range(len(self.rules))]
        self._inject_luck = Random(f"{seed}/inject")
        #: of rules by time and chance, for each open connection
        self._by_age: dict[tuple[int, int], Random] = {}
        self._actions: list[Action] = []
        for index, rule in enumerate(self.rules):
            if (first := rule.at_s if rule.at_s is not None else rule.every_s) is not None:
                self._set_timer(now + first, (index, None))

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; say what to do. ``now`` is monotonic seconds."""
        self._actions = []
        self._run_timers(now)
        if isinstance(event, Opened):
            self._opened(event, now)
        elif isinstance(event, Closed):
            self._closed(event.connection)
        elif isinstance(event, Passing):
            self._passing(event, now)
        elif isinstance(event, Inject):
            self._inject(event, now)
        elif isinstance(event, Heal):
            self._heal()
        return self._actions

    @property
    def next_timer(self) -> float | None:
        """When :class:`Tick` should come at the latest."""
        return self._timers[0][0] if self._timers else None

    def conditions(self, connection: int, direction: Direction) -> Conditions:
        """What lies on this way (up or down) of a connection now."""
        faults = [a.fault for a in self.active if self._lies_on(a, connection, direction)]
        return Conditions(
            stalled=any(fault.kind is Kind.STALL for fault in faults),
            swallowed=any(fault.kind is Kind.BLACKHOLE for fault in faults),
            bytes_per_s=min((fault.bytes_per_s for fault in faults), default=math.inf),
        )

    def delay_s(self, connection: int, direction: Direction) -> float:
        """How long what comes in now is kept; the jitter is drawn anew each time."""
        faults = [a.fault for a in self.active if self._lies_on(a, connection, direction)]
        rng = self.connections[connection].ways[direction].rng
        return sum(f.delay_s + f.jitter_s * rng.random() for f in faults if f.kind is Kind.DELAY)

    def lost_bytes(self, connection: int, direction: Direction) -> bool:
        """Whether a blackhole has swallowed some of this way's bytes."""
        return self.connections[connection].ways[direction].lost_bytes

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        for active in self.active:
            assert active.fault.kind in LASTING
            assert active.connection is None or active.connection in self.connections
        for connection in self.connections.values():
            assert all(fault.kind in IN_PASSING for fault in connection.pending)
            assert all(due.left >= 0 for way in connection.ways.values() for due in way.by_bytes)
        assert all(number in self.connections for _, number in self._by_age)

    def snapshot(self) -> list[dict[str, Any]]:
        """The faults under way."""
        return [describe(a.fault) | {"connection": a.connection} for a in self.active]

    def _inject(self, event: Inject, now: float) -> None:
        chosen = self._chosen(event.fault, self._inject_luck)
        if event.connection is not None:
            chosen = [event.connection] if event.connection in self._open(0) else []
        self._strike(event.fault, chosen, now)

    # -- connections ----------------------------------------------------------------------------

    def _opened(self, event: Opened, now: float) -> None:
        refusals = [active.fault for active in self.active if active.fault.kind is Kind.REFUSE]
        if any(fault.pair in (0, event.pair) for fault in refusals):
            self._actions.append(Refuse(event.connection))
            return
        name = f"{self.seed}/connection {event.connection}"
        ways = {way: _Way(Random(f"{name}/{way}")) for way in _WAYS}
        self.connections[event.connection] = _Connection(event.pair, ways)
        if self._healed:
            return
        for index, rule in enumerate(self.rules):
            if rule.fault.pair not in (0, event.pair):
                continue
            if rule.per_s:
                self._by_age[index, event.connection] = rng = Random(f"{name}/{index}")
                wait_s = rng.expovariate(rule.per_s)
                self._set_timer(now + wait_s, (index, event.connection))
            elif rule.per_mib:
                for direction, way in ways.items():
                    if rule.fault.direction in (direction, Direction.BOTH):
                        due = _ByBytes(rule, Random(f"{name}/{direction}/{index}"))
                        due.draw()
                        way.by_bytes.append(due)

    def _closed(self, number: int) -> None:
        self.connections.pop(number, None)
        self.active = [active for active in self.active if active.connection != number]
        for index in range(len(self.rules)):
            self._by_age.pop((index, number), None)

    # -- bytes ----------------------------------------------------------------------------------

    def _passing(self, event: Passing, now: float) -> None:
        connection = self.connections[event.connection]
        way = connection.ways[event.direction]
        if self.conditions(event.connection, event.direction).swallowed:
            way.lost_bytes = True
        if way.lost_bytes or connection.ended:
            self._actions.append(Swallow())
            return
        pending = [f for f in connection.pending if f.direction in (event.direction, "both")]
        for fault in pending:
            connection.pending.remove(fault)
            self._strike_bytes(fault, event, way.rng.randrange(event.n_bytes), way.rng)
        for due in way.by_bytes:
            while due.left < event.n_bytes and not connection.ended:
                if due.rule.fault.kind in IN_PASSING:
                    self._strike_bytes(due.rule.fault, event, int(due.left), due.rng)
                else:
                    self._strike(due.rule.fault, [event.connection], now)
                due.draw()
            due.left = max(0.0, due.left - event.n_bytes)

    def _strike_bytes(self, fault: Fault, event: Passing, offset: int, rng: Random) -> None:
        connection = self.connections[event.connection]
        if connection.ended:
            return
        if fault.kind is Kind.TRUNCATE:
            connection.ended = True
            self._actions.append(Truncate(offset, fault.how))
        else:
            offsets = [offset, *(rng.randrange(event.n_bytes) for _ in range(fault.bits - 1))]
            self._actions += [Flip(at, rng.randrange(8)) for at in offsets]
        self._note(fault, event.connection)

    # -- faults ---------------------------------------------------------------------------------

    def _strike(self, fault: Fault, chosen: list[int] | None, now: float) -> None:
        """Begin a fault on these connections, or on all; a lasting one then on later ones too."""
        if fault.kind in LASTING:
            for number in [None] if chosen is None else chosen:
                self._begin(_Active(fault, number), now)
            return
        for number in self._open(fault.pair) if chosen is None else chosen:
            if fault.kind in IN_PASSING:
                self.connections[number].pending.append(fault)  # counted when it strikes
                continue
            if fault.kind is Kind.CUT:
                self.connections[number].ended = True
                self._actions.append(Cut(number, fault.how))
            else:
                ways = _WAYS if fault.direction is Direction.BOTH else (fault.direction,)
                self._actions += [HalfClose(number, way) for way in ways]
            self._note(fault, number)

    def _begin(self, active: _Active, now: float) -> None:
        self.active.append(active)
        self._note(active.fault, active.connection)
        if active.fault.for_s < math.inf:
            self._set_timer(now + active.fault.for_s, active)

    def _end(self, active: _Active) -> None:
        if active in self.active:
            self.active.remove(active)
            self._actions.append(Ended(active.fault))

    def _heal(self) -> None:
        for active in list(self.active):
            self._end(active)
        for connection in self.connections.values():
            connection.pending.clear()
            for way in connection.ways.values():
                way.by_bytes.clear()
        self._by_age.clear()
        self._timers.clear()
        self._healed = True

    def _note(self, fault: Fault, connection: int | None) -> None:
        self.injected[fault.kind] += 1
        self._actions.append(Injected(fault, connection))

    # -- who and when ---------------------------------------------------------------------------

    def _open(self, pair: int) -> list[int]:
        return [
            number
            for number, connection in self.connections.items()
            if pair in (0, connection.pair) and not connection.ended
        ]

    def _chosen(self, fault: Fault, rng: Random) -> list[int] | None:
        """None for all of them."""
        if fault.connections is Which.ALL:
            return None
        there = self._open(fault.pair)
        if not there:
            return []
        return [there[-1] if fault.connections is Which.NEWEST else rng.choice(there)]

    def _lies_on(self, active: _Active, number: int, direction: Direction) -> bool:
        fault = active.fault
        if fault.direction not in (direction, Direction.BOTH):
            return False
        if active.connection is not None:
            return active.connection == number
        return fault.pair in (0, self.connections[number].pair)

    def _set_timer(self, when: float, what: tuple[int, int | None] | _Active) -> None:
        heapq.heappush(self._timers, (when, next(self._numbers), what))

    def _run_timers(self, now: float) -> None:
        while self._timers and self._timers[0][0] <= now:
            when, _, what = heapq.heappop(self._timers)
            if isinstance(what, _Active):
                self._end(what)
                continue
            index, number = what
            rule = self.rules[index]
            if number is None:
                self._strike(rule.fault, self._chosen(rule.fault, self._luck[index]), now)
                if rule.every_s is not None:
                    self._set_timer(when + rule.every_s, what)
            elif (rng := self._by_age.get((index, number))) is not None:
                if not self.connections[number].ended:
                    self._strike(rule.fault, [number], now)
                self._set_timer(when + rng.expovariate(rule.per_s), what)
