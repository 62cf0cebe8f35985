"""The plan without sockets: what strikes whom when, and again the same from the same seed."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.chaos.events import (
    Action,
    Closed,
    Cut,
    Ended,
    Flip,
    HalfClose,
    Heal,
    Inject,
    Injected,
    Opened,
    Passing,
    Refuse,
    Swallow,
    Tick,
    Truncate,
)
from broker.chaos.faults import Direction, Fault, How, Kind, Which, read_fault, read_rule
from broker.chaos.plan import ChaosPlan

UP, DOWN = Direction.UP, Direction.DOWN
MIB = 1 << 20


def make_plan(*rules: dict[str, Any], seed: int = 0, connections: int = 0) -> ChaosPlan:
    plan = ChaosPlan([read_rule(rule) for rule in rules], seed)
    for number in range(1, connections + 1):
        plan.handle(Opened(number, 1), 0.0)
    return plan


def run(plan: ChaosPlan, until: float) -> list[tuple[float, Action]]:
    """All that happens of itself, with its times."""
    happened = []
    while (due := plan.next_timer) is not None and due <= until:
        happened += [(round(due, 6), action) for action in plan.handle(Tick(), due)]
        plan.validate()
    return happened


def test_a_fault_at_a_time_comes_then_and_once() -> None:
    plan = make_plan({"kind": "cut", "at": 3}, connections=2)
    assert plan.handle(Tick(), 2.9) == []
    cuts = [action for action in plan.handle(Tick(), 3.0) if isinstance(action, Cut)]
    assert cuts == [Cut(1, How.RST), Cut(2, How.RST)]
    assert plan.next_timer is None
    assert plan.injected == {Kind.CUT: 2}


def test_every_repeats_from_at() -> None:
    rule = {"kind": "half-close", "at": 1, "every": 2, "direction": "up"}
    happened = run(make_plan(rule, connections=1), 6)
    assert [when for when, a in happened if a == HalfClose(1, UP)] == [1, 3, 5]


def test_late_ticks_lose_no_strike_and_do_not_drift() -> None:
    plan = make_plan({"kind": "half-close", "every": 1, "direction": "up"}, connections=1)
    assert plan.handle(Tick(), 3.5).count(HalfClose(1, UP)) == 3
    assert plan.next_timer == 4


def test_one_is_chosen_by_the_seed_and_newest_is_the_last() -> None:
    def struck(seed: int, which: str) -> list[int]:
        rule = {"kind": "half-close", "every": 1, "connections": which, "direction": "up"}
        happened = run(make_plan(rule, seed=seed, connections=9), 20)
        return [action.connection for _, action in happened if isinstance(action, HalfClose)]

    assert struck(1, "one") == struck(1, "one") != struck(2, "one")
    assert len(set(struck(1, "one"))) > 3
    assert set(struck(1, "newest")) == {9}


def test_a_cut_connection_is_not_chosen_again() -> None:
    plan = make_plan(connections=2)
    fault = Fault(Kind.CUT, connections=Which.ONE)
    first, second, third = (plan.handle(Inject(fault), 0.0) for _ in range(3))
    assert {first[0], second[0]} == {Cut(1, How.RST), Cut(2, How.RST)}
    assert third == []


def test_a_lasting_fault_lies_on_later_connections_until_its_time_is_over() -> None:
    plan = make_plan({"kind": "stall", "at": 1, "for": 2, "direction": "down"}, connections=1)
    assert plan.handle(Tick(), 1.0) == [Injected(plan.rules[0].fault, None)]
    plan.handle(Opened(2, 1), 1.5)
    assert plan.conditions(2, DOWN).stalled
    assert not plan.conditions(2, UP).stalled
    assert plan.next_timer == 3
    assert plan.handle(Tick(), 3.0) == [Ended(plan.rules[0].fault)]
    assert not plan.conditions(1, DOWN).stalled


def test_the_tightest_throttle_holds_and_delays_add_up() -> None:
    rules = [{"kind": "throttle", "at": 0, "bytes_per_s": rate} for rate in (500, 90)]
    rules += [{"kind": "delay", "at": 0, "delay_s": 0.25}] * 2
    rules += [{"kind": "delay", "at": 0, "jitter_s": 0.1}]
    plan = make_plan(*rules, connections=1)
    assert plan.conditions(1, UP).bytes_per_s == 90
    delays = [plan.delay_s(1, UP) for _ in range(50)]
    assert 0.5 <= min(delays) < max(delays) <= 0.6


def test_refuse_closes_what_comes_and_leaves_what_is_there() -> None:
    plan = make_plan({"kind": "refuse", "at": 1, "for": 1}, connections=1)
    assert Refuse(2) in plan.handle(Opened(2, 1), 1.5)
    assert plan.handle(Passing(1, UP, 10), 1.6) == []
    assert plan.handle(Opened(3, 1), 2.5) == [Ended(plan.rules[0].fault)]
    assert list(plan.connections) == [1, 3]


def test_a_way_that_lost_bytes_stays_lost_after_the_blackhole() -> None:
    plan = make_plan({"kind": "blackhole", "at": 0, "for": 1}, connections=2)
    assert Swallow() in plan.handle(Passing(1, UP, 10), 0.5)
    assert Swallow() in plan.handle(Passing(1, UP, 10), 1.5)
    assert plan.handle(Passing(1, DOWN, 10), 1.5) == []
    assert plan.handle(Passing(2, UP, 10), 1.5) == []


def test_an_injected_corruption_takes_the_next_bytes_of_its_direction() -> None:
    plan = make_plan(connections=1)
    fault = read_fault({"kind": "corrupt", "bits": 3, "direction": "down"})
    assert plan.handle(Inject(fault), 0.0) == []
    assert plan.handle(Passing(1, UP, 10), 0.0) == []
    flips = plan.handle(Passing(1, DOWN, 10), 0.0)
    assert [type(action) for action in flips] == [Flip, Flip, Flip, Injected]
    assert all(0 <= flip.offset_bytes < 10 for flip in flips if isinstance(flip, Flip))
    assert plan.handle(Passing(1, DOWN, 10), 0.0) == []


def test_a_truncation_is_the_last_thing_that_happens_to_a_connection() -> None:
    plan = make_plan({"kind": "corrupt", "per_mib": 1 << 20}, connections=1)
    plan.handle(Inject(read_fault({"kind": "truncate", "how": "fin"})), 0.0)
    truncate, injected = plan.handle(Passing(1, UP, 100), 0.0)
    assert isinstance(truncate, Truncate)
    assert (truncate.how, injected) == (How.FIN, Injected(injected.fault, 1))  # type: ignore[union-attr]
    assert plan.handle(Passing(1, UP, 100), 0.0) == [Swallow()]


def test_chance_by_bytes_strikes_the_same_bytes_however_they_are_cut() -> None:
    def struck(sizes: list[int]) -> list[int]:
        plan = make_plan({"kind": "corrupt", "per_mib": 5, "direction": "up"}, connections=1)
        offsets, passed = [], 0
        for size in sizes:
            actions = plan.handle(Passing(1, UP, size), 0.0)
            offsets += [passed + a.offset_bytes for a in actions if isinstance(a, Flip)]
            passed += size
        return offsets

    whole = struck([4 * MIB])
    assert 5 < len(whole) < 60
    assert struck([1000] * 4000 + [4 * MIB - 4_000_000]) == whole


def test_chance_by_time_has_the_rate_that_was_asked_for() -> None:
    plan = make_plan({"kind": "half-close", "per_s": 0.5, "direction": "up"}, connections=20)
    assert 800 < len([a for _, a in run(plan, 100) if isinstance(a, HalfClose)]) < 1200


def test_chance_does_not_depend_on_what_other_connections_do() -> None:
    def struck(others: int) -> list[float]:
        plan = make_plan({"kind": "half-close", "per_s": 1, "direction": "up"})
        plan.handle(Opened(7, 1), 0.0)
        for number in range(8, 8 + others):
            plan.handle(Opened(number, 1), 0.0)
        return [when for when, action in run(plan, 10) if action == HalfClose(7, UP)]

    assert struck(0) == struck(5) != []


def test_a_rule_for_one_pair_leaves_the_others_alone() -> None:
    plan = make_plan({"kind": "cut", "at": 1, "pair": 2}, {"kind": "stall", "at": 1, "pair": 2})
    plan.handle(Opened(1, 1), 0.0)
    plan.handle(Opened(2, 2), 0.0)
    assert [a for a in plan.handle(Tick(), 1.0) if isinstance(a, Cut)] == [Cut(2, How.RST)]
    assert not plan.conditions(1, UP).stalled
    assert plan.conditions(2, UP).stalled


def test_healing_ends_what_lasts_and_stops_the_script() -> None:
    rules = [{"kind": "stall", "at": 0}, {"kind": "cut", "per_s": 1}, {"kind": "cut", "every": 1}]
    plan = make_plan(*rules, {"kind": "corrupt", "per_mib": 1000}, connections=1)
    plan.handle(Inject(read_fault({"kind": "corrupt"})), 0.0)
    assert plan.handle(Heal(), 0.0) == [Ended(plan.rules[0].fault)]
    assert plan.next_timer is None
    plan.handle(Opened(2, 1), 0.02)
    assert plan.handle(Passing(1, UP, MIB), 0.03) == plan.handle(Passing(2, UP, MIB), 100) == []
    assert Cut(2, How.RST) in plan.handle(Inject(Fault(Kind.CUT)), 101)


RULES: list[dict[str, Any]] = [
    {"kind": "cut", "per_s": 0.2},
    {"kind": "cut", "every": 0.7, "connections": "one"},
    {"kind": "stall", "per_s": 0.5, "for": 0.4},
    {"kind": "truncate", "per_mib": 2},
    {"kind": "corrupt", "per_mib": 9, "bits": 2},
    {"kind": "blackhole", "at": 2, "for": 1, "connections": "one"},
    {"kind": "refuse", "every": 3, "for": 0.5},
    {"kind": "half-close", "every": 2.5, "connections": "newest"},
]


def story(seed: int, noise: int) -> list[tuple[float, Action]]:
    """A random life of connections, under all kinds of rules."""
    luck, plan = random.Random(noise), make_plan(*RULES, seed=seed)
    told, now = [], 0.0
    for number in range(300):
        now += luck.expovariate(20)
        there = list(plan.connections)
        event: Any = Opened(number, 1)
        if there and luck.random() < 0.8:
            event = Passing(luck.choice(there), luck.choice((UP, DOWN)), luck.randint(1, MIB))
        elif there and luck.random() < 0.5:
            event = Closed(luck.choice(there))
        told += [(now, action) for action in plan.handle(event, now)]
        plan.validate()
    return told


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_the_same_seed_and_events_give_the_same_faults(seed: int, noise: int) -> None:
    told = story(seed, noise)
    assert told == story(seed, noise)
    assert any(isinstance(action, Injected) for _, action in told)


def test_another_seed_gives_other_faults() -> None:
    assert story(1, 0) != story(2, 0)


@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind_is_counted_when_it_strikes(kind: Kind) -> None:
    needed = {"throttle": {"bytes_per_s": 9}, "delay": {"delay_s": 1}}.get(kind.value, {})
    plan = make_plan(connections=1)
    plan.handle(Inject(read_fault({"kind": kind.value, **needed})), 0.0)
    plan.handle(Passing(1, UP, 10), 0.0)
    assert plan.injected == {kind: 1}
