"""A request that takes far too long runs a second time elsewhere."""

from __future__ import annotations

import pytest

from broker.core.events import Side
from broker.protocol import messages as m
from tests.broker.core.rig import Rig


def slow_worker(**config: object) -> Rig:
    """``slow`` has learned to take 1 s for a request, and has one; ``other`` is free."""
    rig = Rig(**{"hedge_floor_s": 0.5} | config)
    rig.client("c")
    rig.worker("slow")
    rig.reply("slow", rig.ask("c", 1), compute_s=1.0)
    rig.ask("c", 2)
    rig.worker("other")
    rig.got("slow")
    rig.got("other")
    return rig


ALIVE = ((Side.CLIENT, "c"), (Side.WORKER, "slow"), (Side.WORKER, "other"))


def test_it_runs_elsewhere_after_three_times_its_expected_time() -> None:
    rig = slow_worker()
    rig.pass_time(2.0, *ALIVE)
    assert rig.requests("other") == []
    rig.pass_time(1.5, *ALIVE)
    assert rig.requests("other") == ["c#2"]
    assert rig.core.counters["hedges"] == 1


@pytest.mark.parametrize(("first", "second", "won"), [("other", "slow", 1), ("slow", "other", 0)])
def test_the_first_answer_wins_and_the_other_is_cancelled(
    first: str, second: str, won: int
) -> None:
    rig = slow_worker()
    rig.pass_time(4.0, *ALIVE)
    request = rig.id("c", 2)
    rig.got("c")
    rig.reply(first, request)
    assert [type(x) for x in rig.got("c") if not isinstance(x, m.Heartbeat)] == [m.Reply]
    assert m.Cancel(request) in rig.got(second)
    rig.reply(second, request)
    assert rig.got("c", m.Reply) == []
    assert rig.core.counters["hedges_won"] == won
    assert rig.core.hedged == set()


def test_the_second_run_answers_by_wire() -> None:
    rig = Rig(hedge_floor_s=0.5)
    rig.client("c")
    rig.worker("slow")
    rig.reply("slow", rig.ask("c", 1), compute_s=1.0)
    rig.ask("c", 2, direct=m.DirectOffer(("gloo",), "here"))
    rig.worker("other")
    rig.pass_time(4.0, *ALIVE)
    (again,) = rig.got("other", m.Request)
    assert again.direct is None  # type: ignore[union-attr]


@pytest.mark.parametrize("lost", ["slow", "other"])
def test_losing_one_of_the_two_workers_changes_nothing(lost: str) -> None:
    rig = slow_worker()
    rig.pass_time(4.0, *ALIVE)
    rig.cut(Side.WORKER, lost)
    left = {"slow": "other", "other": "slow"}[lost]
    rig.reply(left, rig.id("c", 2))
    assert len(rig.got("c", m.Reply)) == 2
    assert rig.core.counters["requeues"] == 0


def test_without_a_free_worker_it_waits_for_one() -> None:
    rig = slow_worker()
    rig.ask("c", 3)  # takes the other worker
    rig.got("other")
    rig.pass_time(4.0, *ALIVE)
    assert rig.requests("other") == []
    rig.reply("other", rig.id("c", 3))
    rig.pass_time(1.0, *ALIVE)
    assert rig.requests("other") == ["c#2"]


def test_a_bounded_share_of_the_load_runs_twice() -> None:
    rig = Rig(hedge_floor_s=0.5, hedge_share=0.0)
    rig.client("c")
    rig.worker("slow", credits=4)
    rig.reply("slow", rig.ask("c", 1), compute_s=0.1)
    for number in (2, 3, 4):
        rig.ask("c", number)
    rig.worker("other", credits=4)
    rig.got("other")
    rig.pass_time(10.0, *ALIVE)
    assert len(rig.requests("other")) == 1


@pytest.mark.parametrize("config", [{"hedge_after": 0.0}])
def test_it_can_be_turned_off(config: dict) -> None:
    rig = slow_worker(**config)
    rig.pass_time(60.0, *ALIVE)
    assert rig.requests("other") == []


def test_a_worker_of_unknown_speed_is_not_called_slow() -> None:
    rig = Rig(hedge_floor_s=0.1)
    rig.client("c")
    rig.worker("slow")
    rig.ask("c", 1)
    rig.worker("other")
    rig.got("other")
    rig.pass_time(30.0, *ALIVE)
    assert rig.requests("other") == []
