"""Many schedules of faults, each with every invariant checked after every event."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import pytest

from tests.sim import (
    mutations,  # noqa: F401 - registers them
    replay,
)
from tests.sim.faults import KINDS
from tests.sim.footprint import footprint
from tests.sim.mutations import MUTATIONS
from tests.sim.schedule import FIRST_RUDE, Op, Schedule, make
from tests.sim.world import World

#: ``make sim`` plays 10,000.
_SCHEDULES = 1_000
#: With bad manners, 20 to 45 ms each.
_RUDE_SCHEDULES = 1_000


@pytest.mark.parametrize("first", range(0, _SCHEDULES, 100))
def test_every_invariant_holds_under_every_schedule(first: int) -> None:
    for seed in range(first, first + 100):
        schedule = make(seed)
        if not replay.play(schedule):
            pytest.fail(replay.explain(seed))


@pytest.mark.parametrize("first", range(FIRST_RUDE, FIRST_RUDE + _RUDE_SCHEDULES, 100))
def test_rude_peers_cost_an_honest_pair_of_another_model_nothing(first: int) -> None:
    for seed in range(first, first + 100):
        if not replay.play(make(seed)):
            pytest.fail(replay.explain(seed))


def test_schedules_have_every_kind_of_operation() -> None:
    drawn = {op.kind for seed in (*range(200), FIRST_RUDE) for op in make(seed).ops}
    assert drawn == set(KINDS)


def test_a_schedule_replays_whatever_the_hash_seed() -> None:
    """The cores must not depend on the order of a set: a story replays in any process."""
    code = (
        "import hashlib; from tests.sim import replay; from tests.sim.schedule import make\n"
        "told = ''.join(replay.tell(make(seed)) for seed in range(20))\n"
        "print(hashlib.sha256(told.encode()).hexdigest())"
    )
    stories = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(stories) == 1


def test_a_failing_schedule_shrinks_to_what_matters_and_tells_its_story() -> None:
    with MUTATIONS["broker_gives_a_worker_more_than_its_credits"]():
        seed = next(seed for seed in range(100) if not replay.play(make(seed)))
        failure = replay.play(make(seed)).failure
        small = replay.shrink(make(seed), failure)
        story = replay.explain(seed)
    assert failure == "credits exceeded"
    assert {op.kind for op in small.ops} == {"start", "submit"}, "what only disturbs is left out"
    assert len(small.ops) < len(make(seed).ops)
    assert "gives" in story or "gave" in story
    assert story.endswith(f"replay: make sim SEED={seed}")


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_broker_holds_does_not_grow_with_the_requests_it_has_seen(workers: int) -> None:
    """Requests that come and are cancelled, with nobody to take them or one who is busy."""

    def held_after(requests: int) -> dict[str, int]:
        ops = [
            Op(0.0, "start", "b1", {"role": "broker"}),
            Op(0.0, "start", "c1", {"role": "client", "job": "", "resend_s": 5.0}),
        ]
        busy = {"serves": "m", "credits": 1, "max_mappings": 1, "token_s": 1e6}
        ops += [Op(0.0, "start", f"w{n}", {"role": "worker"} | busy) for n in range(workers)]
        wanted = {"nature": "ok", "n_tokens": 1, "model": "m", "mapping_id": "", "deadline_s": 90.0}
        for label in range(requests):
            at = 1.0 + 0.01 * label
            ops.append(Op(at, "submit", "c1", wanted | {"label": label, "step": label}))
            if label:  # the first keeps the worker busy
                ops.append(Op(at + 0.005, "cancel", "c1", {"label": label}))
        world = World(Schedule(0, ("b1",), tuple(ops)))
        world.play_until(2.0 + 0.01 * requests)
        return footprint(world.brokers["b1"].core)

    few, many = held_after(50), held_after(1000)
    assert sum(many.values()) <= sum(few.values()) + 100, (few, many)


def test_the_luck_of_a_link_does_not_depend_on_other_operations() -> None:
    schedule = make(3)
    unrelated = Op(0.0, "jump", "nobody", {"by_s": 1.0})
    with_more = replace(schedule, ops=(unrelated, *schedule.ops))
    assert replay.play(schedule) == replay.play(with_more)
