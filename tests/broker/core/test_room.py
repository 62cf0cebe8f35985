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
    rig = Rig(max_client_bytes=client_bytes, max_total_bytes=total_bytes)
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
    room.owe(entry.id, 10, 600)
    assert room.taken_bytes == 600
    assert not room.fits_client("c", 401)
    assert room.fits_client("c", 400)
    assert room.fits_total("c", 4400)
    room.free(entry.id)
    room.free(entry.id)
    assert room.taken_bytes == 0
    room.validate()


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
