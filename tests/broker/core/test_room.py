"""Replies have room, for each client and for all together, and what has none waits."""

from __future__ import annotations

import pytest

from broker.core.events import Side
from broker.core.room import ReplyRoom
from broker.core.state import Entry
from broker.protocol import Packet, encode
from broker.protocol import messages as m
from tests.broker.core.rig import Rig

SIZE = 1000


def reply(rig: Rig, worker: str, request_id: m.RequestId, nbytes: int = SIZE) -> None:
    spec = m.TensorSpec("aux", "uint8", (nbytes,), 1)
    fields = (request_id, worker, "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", (spec,))
    packet: Packet = encode(m.Reply(*fields), [bytes(nbytes)])
    rig.from_worker(worker, packet)


def with_room(client_bytes: int = 3000, total_bytes: int = 100_000) -> Rig:
    """A worker with credits for all, and a client ``c`` whose replies have about 1,000 bytes."""
    rig = Rig(max_client_bytes=client_bytes, max_total_bytes=total_bytes, hedge_floor_s=1e3)
    rig.client("c")
    rig.worker("w", credits=16)
    reply(rig, "w", rig.ask("c", 1))
    rig.from_client("c", m.Received((rig.id("c", 1),)))
    rig.got("w")
    rig.got("c")
    return rig


def test_requests_wait_while_a_client_has_enough_replies() -> None:
    rig = with_room()
    asked = [rig.ask("c", number) for number in (2, 3, 4, 5)]
    assert rig.requests("w") == ["c#2", "c#3"]  # a reply has a header, too
    reply(rig, "w", asked[0])
    assert rig.requests("w") == []  # it came, and the client does not have it yet
    rig.from_client("c", m.Received((asked[0],)))
    assert rig.requests("w") == ["c#4"]


def test_a_client_that_does_not_read_leaves_room_for_others() -> None:
    rig = with_room(client_bytes=1500)
    rig.client("other")
    first = rig.ask("c", 2)
    reply(rig, "w", first)
    rig.ask("c", 3)
    rig.ask("other", 1)
    assert rig.requests("w") == ["c#2", "other#1"]


def test_one_reply_may_come_however_large() -> None:
    rig = with_room(client_bytes=10)
    asked = rig.ask("c", 2)
    rig.ask("c", 3)
    assert rig.requests("w") == ["c#2"]
    reply(rig, "w", asked, 50_000)
    rig.from_client("c", m.Received((asked,)))
    assert rig.requests("w") == ["c#3"]


def test_the_total_is_kept_over_all_clients() -> None:
    rig = with_room(total_bytes=3000)
    for name in ("a", "b", "d", "e"):
        rig.client(name)
        rig.ask(name, 1)
    assert rig.requests("w") == ["a#1", "b#1"]
    rig.from_client("a", m.Cancel(rig.id("a", 1)))
    assert rig.requests("w") == ["d#1"]


def test_before_any_reply_a_quarter_of_a_clients_room_is_expected() -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("w", credits=16)
    for number in range(6):
        rig.ask("c", number)
    assert len(rig.requests("w")) == 4


@pytest.mark.parametrize("how", ["cut", "silent", "goodbye", "hello"])
def test_what_a_lost_client_had_is_free_again(how: str) -> None:
    rig = with_room(total_bytes=1500)
    rig.client("other")
    reply(rig, "w", rig.ask("c", 2))
    rig.ask("other", 1)
    assert rig.requests("w") == ["c#2"]
    if how == "cut":
        rig.cut(Side.CLIENT, "c")
    elif how == "goodbye":
        rig.from_client("c", m.Goodbye("done"))
    elif how == "hello":
        rig.client("c", connection="c-again")
    else:
        rig.pass_time(6.0, (Side.CLIENT, "other"), (Side.WORKER, "w"))
    assert rig.requests("w") == ["other#1"]


def test_a_request_that_waits_for_room_ends_at_its_deadline() -> None:
    rig = with_room(client_bytes=1500)
    reply(rig, "w", rig.ask("c", 2))
    rig.ask("c", 3, ttl_s=5.0)
    rig.pass_time(12.0, (Side.CLIENT, "c"), (Side.WORKER, "w"))
    (failure,) = rig.got("c", m.Failure)
    assert failure.code == "expired"  # type: ignore[union-attr]
    assert rig.core.entries == {}


def test_room_counts_each_request_once() -> None:
    room = ReplyRoom(1000, 5000)
    fields = (m.RequestId("c", 1, 1), "generate", "", 0, 10, "", "probs", 1.0, ())
    entry = Entry(m.Request(*fields), None, "job", 0.0, 1.0)  # type: ignore[arg-type]
    room.expect(entry)
    assert room.taken_bytes == 250
    room.sent(entry.id, 600, 1.0)
    assert room.taken_bytes == 600
    assert not room.fits_client("c", 401)
    assert room.fits_client("c", 400)
    assert room.fits_total("c", 7 * 5000 // 8 - 600)
    assert not room.fits_total("c", 7 * 5000 // 8 - 599), "it leaves an eighth to the next"
    assert room.fits_total("d", 4400)
    room.free(entry.id)
    room.free(entry.id)
    assert room.taken_bytes == 0
    room.validate()


# -- what is learned ------------------------------------------------------------------------------


def test_a_reply_without_tokens_teaches_nothing_about_one_with_tokens() -> None:
    rig = with_room(client_bytes=1 << 30, total_bytes=1 << 33)
    rig.client("late")
    head = rig.ask("c", 2, operation="lm_head_rows", n_tokens=0)
    reply(rig, "w", head, 64 << 20)
    rig.from_client("c", m.Received((head,)))
    rig.got("w")
    for name in ("c", "late"):
        asked = rig.ask(name, 3, n_tokens=2048)
        assert rig.requests("w") == [str(asked)]
    assert rig.core.reply_room.taken_bytes < 1 << 20


def test_a_rank_that_comes_late_expects_what_the_others_got() -> None:
    rig = with_room(client_bytes=3000)
    rig.client("late")
    for number in range(5):
        rig.ask("late", number)
    assert len(rig.requests("w")) == 2  # 1,100 bytes each, and not a quarter of its room


def test_another_encoding_is_not_expected_to_be_as_large() -> None:
    rig = with_room(client_bytes=3000)
    for number in range(2, 8):
        rig.ask("c", number, encoding="hidden")
    assert len(rig.requests("w")) == 4


def test_a_failure_that_is_answered_again_teaches_nothing() -> None:
    rig = with_room()
    asked = rig.ask("c", 2)
    rig.fail("w", asked, "bad_request", "no")
    before = rig.core.reply_room.expected_bytes(_entry(rig, 3))
    rig.ask("c", 2)
    assert rig.core.counters["answered_again"] == 1
    assert rig.core.reply_room.expected_bytes(_entry(rig, 3)) == before


def test_a_direct_reply_teaches_nothing_about_one_by_wire() -> None:
    rig = with_room()
    offer = m.DirectOffer(("gloo",), "here")
    asked = rig.ask("c", 2, direct=offer)
    fields = (asked, "w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", ())
    rig.from_worker("w", m.Reply(*fields, transfer=m.Transfer("ch", 1, 0)))
    assert rig.core.reply_room.expected_bytes(_entry(rig, 3)) > SIZE


def test_nobody_is_expected_to_need_more_than_a_client_may_have() -> None:
    rig = with_room()
    asked = rig.ask("c", 2, n_tokens=1 << 40)
    assert rig.requests("w") == [str(asked)]
    assert rig.core.reply_room.taken_bytes == 3000


def _entry(rig: Rig, number: int) -> Entry:
    fields = (m.RequestId("c", 1, number), "generate", "", 0, 100, "", "probs", 1.0, ())
    return Entry(m.Request(*fields), None, "job", 0.0, 1.0, pool=next(iter(rig.core.pools)))


# -- nobody takes the room for ever ---------------------------------------------------------------


def test_small_replies_pass_a_large_one_that_waits_for_room_but_not_for_ever() -> None:
    rig = with_room(client_bytes=8000, total_bytes=8000)
    for name in ("big", "s0", "s1", "s2"):
        rig.client(name)
    alive = [(Side.CLIENT, n) for n in ("c", "big", "s0", "s1", "s2")] + [(Side.WORKER, "w")]
    running = {name: rig.ask(name, 1) for name in ("s0", "s1", "s2")}
    first = rig.ask("big", 1)
    large = rig.ask("big", 2, n_tokens=600)  # 6,600 bytes, while the others take 4,400
    rig.got("w")
    n_small, number = 0, 1
    while rig.now < 130.0 and str(large) not in rig.requests("w"):
        number += 1
        for name in running:  # they always ask for the next before they have the last
            asked = rig.ask(name, number)
            reply(rig, "w", running[name])
            rig.from_client(name, m.Received((running[name],)))
            running[name] = asked
            n_small += 1
        if number == 3:
            reply(rig, "w", first)
            rig.from_client("big", m.Received((first,)))
        if large in rig.core.workers["w"].running:
            break
        rig.pass_time(1.0, *alive)
    assert large in rig.core.workers["w"].running
    assert n_small > 9


def test_small_requests_behind_a_large_one_do_not_wait_for_its_room() -> None:
    rig = with_room(client_bytes=100_000, total_bytes=5000)
    for name in ("a", "b", "big", "small"):
        rig.client(name)
    first = rig.ask("a", 1)
    rig.ask("b", 1, n_tokens=300)
    rig.ask("big", 1, n_tokens=400)
    rig.ask("small", 1, n_tokens=120)
    assert rig.requests("w") == ["a#1", "b#1"]
    reply(rig, "w", first)
    rig.from_client("a", m.Received((first,)))
    assert rig.requests("w") == ["small#1"]


def test_a_client_with_nothing_gets_room_for_one_although_the_others_have_all() -> None:
    rig = with_room(client_bytes=3000, total_bytes=3000)
    rig.client("late")
    reply(rig, "w", rig.ask("c", 2))
    reply(rig, "w", rig.ask("c", 3))
    rig.got("w")
    asked = rig.ask("late", 1)
    rig.ask("late", 2)
    rig.pass_time(11.0, (Side.CLIENT, "c"), (Side.CLIENT, "late"), (Side.WORKER, "w"))
    assert rig.requests("w") == [str(asked)]


def test_replies_that_are_never_acknowledged_do_not_keep_their_room() -> None:
    rig = with_room(client_bytes=2500)
    reply(rig, "w", rig.ask("c", 2))
    reply(rig, "w", rig.ask("c", 3))
    rig.got("w")
    asked = rig.ask("c", 4, ttl_s=500.0)
    rig.pass_time(125.0, (Side.CLIENT, "c"), (Side.WORKER, "w"))
    assert rig.requests("w") == [str(asked)]


def test_a_reply_that_is_announced_in_parts_and_never_sent_is_broken_off() -> None:
    rig = with_room(client_bytes=3000)
    asked = rig.ask("c", 2)
    spec = m.TensorSpec("aux", "uint8", (2900,), 1)
    fields = (asked, "w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", (spec,))
    rig.from_worker("w", m.Reply(*fields, parts=1))
    rig.worker("other")
    rig.got("w")
    waits = rig.ask("c", 3)
    rig.pass_time(20.0, (Side.CLIENT, "c"), (Side.WORKER, "w"), (Side.WORKER, "other"))
    given = [*rig.requests("w"), *rig.requests("other")]
    assert str(asked) in given
    assert str(waits) in given


# -- requests -----------------------------------------------------------------------------------


def ask(rig: Rig, client: str, number: int, nbytes: int = SIZE) -> m.RequestId:
    """A request whose payload has so many bytes."""
    request_id = rig.id(client, number)
    spec = m.TensorSpec("input_ids", "uint8", (nbytes,), 1)
    fields = (request_id, "generate", "", number, 100, "", "probs", 60.0, (spec,))
    rig.from_client(client, encode(m.Request(*fields), [bytes(nbytes)]))
    return request_id


def wanted(rig: Rig, client: str) -> list[str]:
    return [str(message.id) for message in rig.got(client, m.RequestWanted)]  # type: ignore[union-attr]


def with_request_room(client_bytes: int = 2500, total_bytes: int = 100_000) -> Rig:
    rig = Rig(max_client_request_bytes=client_bytes, max_total_request_bytes=total_bytes)
    for name in ("a", "b"):
        rig.client(name)
    return rig


def test_a_request_without_room_is_asked_for_again_when_there_is_some() -> None:
    rig = with_request_room()
    first, *_, last = [ask(rig, "a", number) for number in (1, 2, 3)]
    rig.worker("w")
    assert rig.requests("w") == ["a#1"]
    assert wanted(rig, "a") == []
    rig.reply("w", first)
    assert wanted(rig, "a") == ["a#3"]
    assert rig.requests("w") == ["a#2"]
    assert ask(rig, "a", 3) == last
    rig.reply("w", rig.id("a", 2))
    assert rig.requests("w") == ["a#3"]
    assert rig.core.counters["recalls"] == 1
    rig.reply("w", last)
    assert rig.core.request_room.taken_bytes == 0


def test_long_requests_of_one_client_leave_room_for_others() -> None:
    rig = with_request_room()
    for number in range(1, 9):
        ask(rig, "a", number)
    ask(rig, "b", 1)
    assert rig.core.request_room.taken_bytes < 4 * (SIZE + 300)
    rig.worker("w", credits=16)
    assert set(rig.requests("w")) == {"a#1", "a#2", "b#1"}


def test_requests_of_all_clients_have_a_limit_too() -> None:
    rig = with_request_room(total_bytes=1500)
    first, second = ask(rig, "a", 1), ask(rig, "b", 1)
    rig.from_client("a", m.Cancel(first))
    assert wanted(rig, "b") == ["b#1"]
    ask(rig, "b", 1)
    rig.worker("w")
    assert rig.requests("w") == [str(second)]


def test_asking_again_keeps_the_limit_of_all_clients() -> None:
    rig = with_request_room(client_bytes=2900, total_bytes=4100)
    first, _ = ask(rig, "a", 1), ask(rig, "a", 2)
    ask(rig, "a", 3, 2 * SIZE)  # over what its client may have, until the others are gone
    ask(rig, "b", 1)
    rig.from_client("a", m.Cancel(first))
    ask(rig, "b", 2)
    rig.from_client("a", m.Cancel(rig.id("a", 2)))
    assert rig.core.request_room.taken_bytes <= 4100


@pytest.mark.parametrize("how", ["reconnect", "cancel", "leave"])
def test_a_client_that_was_asked_for_a_request_may_have_gone(how: str) -> None:
    rig = with_request_room(total_bytes=1500)
    first, second = ask(rig, "a", 1), ask(rig, "b", 1)
    rig.from_client("a", m.Cancel(first))
    if how == "reconnect":
        rig.cut(Side.CLIENT, "b")
        rig.client("b")
        ask(rig, "b", 1)
        rig.worker("w")
        assert rig.requests("w") == ["b#1"]
        rig.reply("w", second)
    elif how == "cancel":
        rig.from_client("b", m.Cancel(second))
    else:
        rig.from_client("b", m.Goodbye("done"))
    assert rig.core.request_room.taken_bytes == 0


def test_what_a_worker_brought_along_and_lost_is_asked_for_at_once() -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("w", held=(rig.id("c", 1),))
    rig.cut(Side.WORKER, "w")
    assert wanted(rig, "c") == ["c#1"]


def test_a_request_that_is_asked_again_does_not_wait_for_the_room_of_its_own_lost_reply() -> None:
    rig = Rig(max_client_bytes=1, held_answer_bytes=0)
    rig.client("c")
    rig.worker("w")
    asked = rig.ask("c", 2)
    reply(rig, "w", asked)
    rig.got("w")
    rig.ask("c", 2)  # its answer was lost on its way
    assert rig.requests("w") == [str(asked)]


# -- those who take all they can ------------------------------------------------------------------


@pytest.mark.parametrize("n_hogs", [2, 8, 20])
def test_clients_that_fill_the_room_of_requests_keep_nobody_out(n_hogs: int) -> None:
    """They ask for what nobody serves, with as long requests as they may, and wait."""
    rig = Rig(max_client_request_bytes=100_000, max_total_request_bytes=400_000)
    rig.worker("w")
    rig.client("honest")
    for n in range(n_hogs):
        rig.client(f"hog{n}")
    alive = [(Side.CLIENT, f"hog{n}") for n in range(n_hogs)]
    alive += [(Side.CLIENT, "honest"), (Side.WORKER, "w")]
    spec = m.TensorSpec("input_ids", "uint8", (20_000,), 1)
    for turn in range(4):
        for n in range(n_hogs):
            for number in range(16):
                asked = m.RequestId(f"hog{n}", 1, 16 * turn + number)
                fields = ("generate", "", 0, 0, "", "probs", 1e9, (spec,))
                rig.from_client(
                    f"hog{n}", encode(m.Request(asked, *fields, offer="no such"), [bytes(20_000)])
                )
        rig.pass_time(5.0, *alive)
        asked = rig.ask("honest", turn)
        assert rig.requests("w") == [str(asked)]
        rig.reply("w", asked)
        assert rig.core.request_room.taken_bytes <= 400_000 + 2 * 20_000


def test_many_that_wait_for_room_do_not_hide_who_waits_behind_them() -> None:
    rig = with_room(client_bytes=10_000, total_bytes=5000)
    there = ("a", "b", "keeper", "last", *(f"hog{n}" for n in range(100)))
    for name in there:
        rig.client(name)
    running = [rig.ask(name, 1) for name in ("a", "b")]
    rig.ask("keeper", 1, n_tokens=200)
    for n in range(100):
        rig.ask(f"hog{n}", 1, n_tokens=1 << 40)
    asked = rig.ask("last", 1)
    rig.got("w")
    for each in running:
        reply(rig, "w", each)
        rig.from_client(each.client, m.Received((each,)))
    assert rig.requests("w") == [str(asked)]
