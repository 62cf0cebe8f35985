"""What the broker does about replies in parts."""

from __future__ import annotations

import pytest

from broker.core import Side
from broker.peer.parts import in_parts
from broker.protocol import Packet
from broker.protocol import messages as m
from tests.broker.core.rig import Rig

FRAMES = [b"abc", b"def", b"gh"]
MANIFEST = (m.TensorSpec("aux", "uint8", (8,), 3),)


@pytest.fixture
def rig() -> Rig:
    rig = Rig()
    rig.client("c")
    rig.worker("w1")
    return rig


def answer(rig: Rig, worker: str = "w1", number: int = 1) -> tuple[Packet, ...]:
    """The reply of three parts, and those."""
    fields = (worker, "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", MANIFEST)
    return in_parts(m.Reply(rig.id("c", number), *fields), FRAMES, nbytes=3)


def of_reply(rig: Rig) -> list[m.Message]:
    return [x for x in rig.got("c") if isinstance(x, (m.Reply, m.Part, m.Failure))]


def test_each_part_is_passed_on_when_it_comes(rig: Rig) -> None:
    rig.ask("c", 1)
    packets = answer(rig)
    for packet in packets:
        rig.from_worker("w1", packet)
        assert of_reply(rig) == [packet.message]
    assert rig.core.counters["replies"] == 1
    assert rig.core.counters["reply_bytes"] == packets[0].nbytes + 8


def test_nothing_of_it_is_kept_and_its_room_is_taken_until_it_is_acknowledged(rig: Rig) -> None:
    rig.ask("c", 1)
    for packet in answer(rig):
        rig.from_worker("w1", packet)
        assert rig.core.reply_room.taken_bytes == 8
        assert len(rig.core.answers) == 0
    rig.from_client("c", m.Received((rig.id("c", 1),)))
    assert rig.core.reply_room.taken_bytes == 0
    assert not rig.core.entries


def test_a_reply_whose_end_its_client_never_gets_is_computed_again(rig: Rig) -> None:
    rig.ask("c", 1)
    for packet in answer(rig):
        rig.from_worker("w1", packet)
    rig.got("w1")
    alive = [(Side.CLIENT, "c"), (Side.WORKER, "w1")]
    rig.pass_time(rig.core.config.liveness_s - 0.5, *alive)
    rig.ask("c", 1)  # it may still be on its way
    assert rig.requests("w1") == []
    rig.pass_time(1.0, *alive)
    rig.ask("c", 1)
    assert rig.requests("w1") == ["c#1"]


def test_the_worker_has_its_credit_back_with_the_first_word(rig: Rig) -> None:
    rig.ask("c", 1)
    rig.ask("c", 2)
    assert rig.requests("w1") == ["c#1"]
    rig.from_worker("w1", answer(rig)[0])
    assert rig.requests("w1") == ["c#2"]


@pytest.mark.parametrize("passed", [1, 2, 3])
def test_worker_dies_between_two_parts(rig: Rig, passed: int) -> None:
    rig.worker("w2")
    rig.ask("c", 1)
    for packet in answer(rig)[:passed]:
        rig.from_worker("w1", packet)
    rig.cut(Side.WORKER, "w1")
    assert rig.requests("w2") == ["c#1"]
    rig.got("c")
    for packet in answer(rig, "w2"):
        rig.from_worker("w2", packet)
    assert [type(message) for message in of_reply(rig)] == [m.Reply, m.Part, m.Part, m.Part]


def test_a_reply_that_breaks_off_is_no_loss_that_counts_against_its_request() -> None:
    rig = Rig(max_losses=1)
    rig.client("c")
    rig.worker("w1")
    rig.worker("w2")
    rig.ask("c", 1)
    rig.from_worker("w1", answer(rig)[0])
    rig.cut(Side.WORKER, "w1")
    assert rig.requests("w2") == ["c#1"]


@pytest.mark.parametrize("lost", [1, 2])
def test_a_part_is_damaged_on_its_way_to_the_broker(rig: Rig, lost: int) -> None:
    rig.ask("c", 1)
    packets = answer(rig)
    for packet in packets[:lost]:
        rig.from_worker("w1", packet)
    rig.garbage(Side.WORKER, "w1")
    rig.got("w1")
    rig.got("c")
    for packet in packets[lost + 1 :]:
        rig.from_worker("w1", packet)
    assert of_reply(rig) == []
    assert rig.requests("w1") == ["c#1"]


@pytest.mark.parametrize(
    "parts",
    [
        pytest.param([0, 0], id="one twice"),
        pytest.param([1], id="the second first"),
        pytest.param([0, 2], id="one left out"),
    ],
)
def test_parts_out_of_order_break_the_reply_off(rig: Rig, parts: list[int]) -> None:
    rig.ask("c", 1)
    first, *rest = answer(rig)
    rig.from_worker("w1", first)
    rig.got("w1")
    for number in parts:
        rig.from_worker("w1", rest[number])
    assert rig.requests("w1") == ["c#1"]
    assert rig.core.counters["bad_messages"] == 1
    assert "broke off: part" in rig.core.entries[rig.id("c", 1)].story[0]


def test_more_bytes_than_announced_break_the_reply_off(rig: Rig) -> None:
    rig.ask("c", 1)
    first = answer(rig)[0]
    larger = in_parts(second_reply(rig), [b"abcdefghi", b"jklmnopqr"], nbytes=9)[1]
    rig.from_worker("w1", first)
    rig.from_worker("w1", larger)
    assert "9 bytes came in 1 parts, announced were 8" in rig.core.entries[rig.id("c", 1)].story[0]


def second_reply(rig: Rig) -> m.Reply:
    manifest = (m.TensorSpec("aux", "uint8", (18,), 2),)
    fields = ("w1", "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", manifest)
    return m.Reply(rig.id("c", 1), *fields)


@pytest.mark.parametrize("how", ["cut", "hello"])
def test_client_is_away_between_two_parts(rig: Rig, how: str) -> None:
    rig.ask("c", 1)
    first, second, *rest = answer(rig)
    rig.from_worker("w1", first)
    rig.from_worker("w1", second)
    if how == "cut":
        rig.cut(Side.CLIENT, "c")
    rig.client("c", connection="again")
    rig.got("again")
    for packet in rest:
        rig.from_worker("w1", packet)
    assert rig.got("again") == []
    assert rig.core.reply_room.taken_bytes == 0
    rig.got("w1")
    rig.ask("c", 1, connection="again")
    assert rig.requests("w1") == ["c#1"]


def test_client_is_away_before_the_first_part(rig: Rig) -> None:
    rig.ask("c", 1)
    rig.cut(Side.CLIENT, "c")
    for packet in answer(rig):
        rig.from_worker("w1", packet)
    assert not rig.core.entries
    assert rig.core.reply_room.taken_bytes == 0


def test_a_request_that_crosses_its_own_reply_is_not_computed_again(rig: Rig) -> None:
    rig.ask("c", 1)
    packets = answer(rig)
    rig.from_worker("w1", packets[0])
    rig.got("w1")
    rig.ask("c", 1)
    for packet in packets[1:]:
        rig.from_worker("w1", packet)
    rig.ask("c", 1)
    assert rig.requests("w1") == []
    assert rig.core.counters["resends"] == 2
    rig.from_client("c", m.Received((rig.id("c", 1),)))
    rig.ask("c", 1)
    assert rig.requests("w1") == ["c#1"]


def test_a_cancelled_reply_ends_at_the_broker(rig: Rig) -> None:
    rig.ask("c", 1)
    first, *rest = answer(rig)
    rig.from_worker("w1", first)
    rig.from_client("c", m.Cancel(rig.id("c", 1)))
    rig.got("c")
    for packet in rest:
        rig.from_worker("w1", packet)
    assert rig.got("c") == []
    assert rig.got("w1", m.Cancel) == []  # it is done with it
    assert rig.core.reply_room.taken_bytes == 0


def test_parts_of_an_earlier_run_are_not_taken_for_those_of_the_next(rig: Rig) -> None:
    rig.ask("c", 1)
    first, *rest = answer(rig)
    rig.from_worker("w1", first)
    rig.from_client("c", m.Cancel(rig.id("c", 1)))
    rig.ask("c", 1)
    rig.got("c")
    for packet in rest:
        rig.from_worker("w1", packet)
    assert of_reply(rig) == []
    for packet in answer(rig):
        rig.from_worker("w1", packet)
    assert [type(message) for message in of_reply(rig)] == [m.Reply, m.Part, m.Part, m.Part]


def test_of_two_workers_only_the_first_to_begin_is_heard() -> None:
    rig = Rig(hedge_after=2.0, hedge_floor_s=1.0, hedge_share=1.0)
    rig.client("c")
    rig.worker("w1")
    alive = [(Side.CLIENT, "c"), (Side.WORKER, "w1")]
    rig.ask("c", 1)
    rig.reply("w1", rig.id("c", 1))
    rig.ask("c", 2)
    rig.worker("w2")
    rig.pass_time(4.0, *alive, (Side.WORKER, "w2"))
    assert rig.requests("w2") == ["c#2"]
    rig.got("c")
    first, *rest = answer(rig, "w1", 2)
    rig.from_worker("w1", first)
    assert [message.id.number for message in rig.got("w2", m.Cancel)] == [2]  # type: ignore[union-attr]
    for packet in answer(rig, "w2", 2):
        rig.from_worker("w2", packet)
    for packet in rest:
        rig.from_worker("w1", packet)
    assert [getattr(x, "worker", x) for x in of_reply(rig)] == ["w1", *[p.message for p in rest]]


def test_a_reply_in_parts_of_what_no_client_has_asked_here_is_not_passed_on(rig: Rig) -> None:
    rig.worker("w2", held=(rig.id("c", 9),))
    rig.got("c")
    for packet in answer(rig, "w2", 9):
        rig.from_worker("w2", packet)
    assert of_reply(rig) == []
    rig.cut(Side.CLIENT, "c")


def test_replies_that_break_off_again_and_again_end_their_request() -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("w1")
    asked = rig.ask("c", 1)
    for _ in range(20):
        if asked in rig.core.workers["w1"].running:
            header, _, second, _ = answer(rig)
            rig.from_worker("w1", header)
            rig.from_worker("w1", second)  # and the first never came
    (failure,) = rig.got("c", m.Failure)
    assert failure.code == "lost_workers"  # type: ignore[union-attr]
    assert "broke off" in failure.text  # type: ignore[union-attr]


@pytest.mark.parametrize("code", ["cancelled", "unknown_mapping"])
def test_a_request_that_is_given_back_goes_to_another_and_not_for_ever(code: str) -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("w1")
    asked = rig.ask("c", 1)
    rig.worker("w2")
    rig.got("w1")
    rig.fail("w1", asked, code)
    assert rig.requests("w2") == [str(asked)]
    for _ in range(20):
        for name in ("w1", "w2"):
            if asked in rig.core.workers[name].running:
                rig.fail(name, asked, code)
    (failure,) = rig.got("c", m.Failure)
    assert failure.code == code  # type: ignore[union-attr]


def test_what_a_worker_brought_along_and_nobody_asks_for_is_forgotten() -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("w1", held=(rig.id("c", 1),))
    assert len(rig.core.entries) == 1
    rig.pass_time(70.0, (Side.CLIENT, "c"), (Side.WORKER, "w1"))
    assert rig.core.entries == {}
