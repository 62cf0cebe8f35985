"""No worker idles while work waits: whatever was slow once, and whoever a request waits for."""

from __future__ import annotations

import random

import pytest

from broker.core.events import Side
from broker.protocol import messages as m
from tests.broker.core.rig import Rig, model
from tests.broker.core.workload import Speed, Workload, first_slower, pauses, steady


@pytest.mark.parametrize("credits", [1, 2])
@pytest.mark.parametrize("n_first", [1, 2])
def test_a_first_forward_that_is_a_hundred_times_slower_costs_no_share(
    credits: int, n_first: int
) -> None:
    slow = first_slower(0.05, 100, n_first)
    load = Workload({"even": steady(0.05), "slow": slow}, credits=credits).run(40.0)
    warm = load.answers["slow"][n_first - 1] - load.began_at
    margin = 0.2 if n_first == 1 else 0.6  # two slow ones leave its speed to a trial
    even, other = (load.rate(name, warm, warm + 10) for name in ("even", "slow"))
    assert other >= (1 - margin) * even


@pytest.mark.parametrize("at", [0, 1, 2, 3, 10])
@pytest.mark.parametrize("credits", [1, 2])
def test_a_pause_of_a_minute_costs_its_worker_ten_seconds_more(at: int, credits: int) -> None:
    load = Workload({"even": steady(0.2), "pauses": pauses(0.2, at, 60.0)}, credits=credits)
    load.run(120.0)
    after = 60.0 + 0.2 * at + 10.0
    assert load.rate("pauses", after, after + 20) >= 0.8 * load.rate("even", after, after + 20)


@pytest.mark.parametrize("hedge_after", [0.0, 3.0])
def test_a_worker_that_became_faster_is_found_within_seconds(hedge_after: float) -> None:
    def slow_at_first(number: int, now: float, n_tokens: int) -> float:
        return 0.1 if now > 160.0 else 2.0

    load = Workload({"even": steady(0.1), "changes": slow_at_first}, hedge_after=hedge_after)
    load.run(110.0)
    assert load.rate("changes", 90, 110) >= 0.8 * load.rate("even", 90, 110)


def test_a_worker_that_never_answers_is_hedged_beside_an_idle_one() -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("good")
    for number in (1, 2, 3):
        rig.now += 0.1
        rig.reply("good", rig.ask("c", number), compute_s=0.1)
    rig.got("good")
    rig.worker("hangs")
    asked = rig.ask("c", 4)
    assert rig.requests("hangs") == [str(asked)]
    rig.pass_time(3.0, (Side.CLIENT, "c"), (Side.WORKER, "good"), (Side.WORKER, "hangs"))
    assert rig.requests("good") == [str(asked)]


def test_hedges_of_one_pool_leave_another_pool_its_own() -> None:
    rig = Rig()
    rig.client("c")
    alive = [(Side.CLIENT, "c")]
    for name in ("one", "two"):
        for worker in (f"{name}-slow", f"{name}-other"):
            rig.worker(worker, description=model(name))
            alive.append((Side.WORKER, worker))
    numbers = iter(range(1, 100))
    stuck = []
    for name in ("one", "two"):
        for _ in range(2):
            given = [rig.ask("c", next(numbers), model=name) for _ in range(2)]
            rig.now += 0.1
            for request in given:
                (has,) = [w.id for w in rig.core.workers.values() if request in w.running]
                rig.from_worker(has, _reply(rig, has, request, name))
        stuck.append(rig.ask("c", next(numbers), model=name))
    rig.sent.clear()
    rig.pass_time(4.0, *alive)
    assert rig.core.hedged == set(stuck)


def _reply(rig: Rig, worker: str, request: m.RequestId, name: str) -> m.Reply:
    return m.Reply(request, worker, name, "f0", (1, 3, 4), 0, "", "probs", 0.1, "", ())


def test_a_worker_with_an_overdue_request_is_given_no_other() -> None:
    rig = Rig(hedge_after=0.0)
    rig.client("c")
    rig.worker("hangs", credits=4)
    for number in (1, 2, 3):
        rig.now += 0.1
        rig.reply("hangs", rig.ask("c", number), compute_s=0.1)
    late = rig.ask("c", 4)
    rig.pass_time(2.0, (Side.CLIENT, "c"), (Side.WORKER, "hangs"))
    rig.got("hangs")
    asked = rig.ask("c", 5)
    assert rig.requests("hangs") == []
    rig.worker("other")
    assert rig.requests("other") == [str(asked)]
    rig.reply("hangs", late)
    assert rig.core.workers["hangs"].free == 4


@pytest.mark.parametrize("how", ["lost", "drains", "hangs"])
def test_a_request_that_waits_for_a_better_worker_is_looked_at_again(how: str) -> None:
    rig = Rig(hedge_after=0.0)
    rig.client("c")
    rig.worker("fast")
    rig.worker("slow")
    for numbers in ((1, 2), (3, 4), (5, 6)):
        given = [rig.ask("c", number) for number in numbers]
        for worker, seconds in (("fast", 0.1), ("slow", 1.0)):
            for request in given:
                if request in rig.core.workers[worker].running:
                    rig.now += seconds
                    rig.reply(worker, request, compute_s=seconds)
    rig.sent.clear()
    rig.core.workers["slow"].idle_since = rig.now
    first = rig.ask("c", 7)
    waits = rig.ask("c", 8)
    assert rig.requests("fast") == [str(first)]
    assert rig.requests("slow") == []
    if how == "lost":
        rig.cut(Side.WORKER, "fast")
    elif how == "drains":
        rig.from_worker("fast", m.Draining())
    else:
        rig.pass_time(1.0, (Side.CLIENT, "c"), (Side.WORKER, "fast"), (Side.WORKER, "slow"))
    assert {first, waits} & set(rig.core.workers["slow"].running)


def test_the_choice_for_later_keeps_away_from_a_worker_that_is_to_be_avoided() -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("fast")
    rig.worker("slow")
    for numbers in ((1, 2), (3, 4)):
        given = [rig.ask("c", number) for number in numbers]
        for worker, seconds in (("fast", 0.1), ("slow", 0.9)):
            for request in given:
                if request in rig.core.workers[worker].running:
                    rig.now += seconds
                    rig.reply(worker, request, compute_s=seconds)
    rig.sent.clear()
    for number in range(7, 21):
        rig.ask("c", number, avoid="slow")
    assert rig.requests("slow") == []


def _random_speed(rng: random.Random) -> Speed:
    base = 10 ** rng.uniform(-1, 0)
    kind = rng.choice(["steady", "first", "pause", "changes", "noisy", "by tokens"])
    if kind == "first":
        return first_slower(base, 100, rng.randint(1, 2))
    if kind == "pause":
        return pauses(base, rng.randint(0, 20), 60.0)
    if kind == "changes":
        return lambda number, now, n_tokens: base * (10 if int(now / 15) % 2 else 1)
    if kind == "noisy":
        return lambda number, now, n_tokens: base * (1 + (number * 7919 % 13) / 2)
    if kind == "by tokens":
        return lambda number, now, n_tokens: base * n_tokens / 100
    return steady(base)


@pytest.mark.parametrize("seed", range(12))
def test_work_never_waits_beside_a_worker_that_idles(seed: int) -> None:
    rng = random.Random(seed)
    speeds = {f"w{number}": _random_speed(rng) for number in range(rng.randint(2, 4))}
    sizes = rng.choice([(100,), (1, 100, 10_000), (100, 120)])
    load = Workload(
        speeds,
        clients=rng.randint(1, 4),
        ahead=rng.randint(1, 4),
        tokens=lambda number: sizes[number * 31 % len(sizes)],
        credits=rng.randint(1, 3),
        hedge_after=rng.choice([0.0, 3.0]),
    )
    idle: dict[tuple[str, int], int] = {}
    for _ in range(45):
        load.run(1.0)
        (pool,) = load.rig.core.pools.values()
        for worker in pool.workers.values():
            key = worker.id, worker.answered
            waits = len(pool.queue) > 0 and worker.free > 0 and not worker.running
            idle[key] = idle.get(key, 0) + 1 if waits else 0
        assert max(idle.values()) <= 7, (seed, idle)
