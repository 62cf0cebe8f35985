"""What a client does about replies in parts."""

from __future__ import annotations

import pytest

from broker.peer.link import Connected, Disconnected, Tick
from broker.peer.parts import in_parts
from broker.protocol import Packet, encode
from broker.protocol import messages as m
from tests.trainer_client.core.test_machine import A, B, Rig
from trainer_client.core import CancelRequest, Deliver, Fail

FRAMES = [b"abc", b"def", b"gh"]
MANIFEST = (m.TensorSpec("aux", "uint8", (8,), 3),)


def parts_of(rig: Rig, request: Packet, **changes: object) -> tuple[Packet, ...]:
    """The reply of three parts to this request, and those."""
    return in_parts(rig.reply_to(request, manifest=MANIFEST, **changes), FRAMES, nbytes=3)


def asked() -> tuple[Rig, Packet]:
    rig = Rig()
    rig.welcome()
    request = rig.submit(1)
    rig.sent.clear()
    return rig, request


def said(rig: Rig) -> list[str]:
    names = [type(message).__name__ for _, message in rig.sent]
    rig.sent.clear()
    return names


def test_a_reply_is_delivered_with_its_last_part_and_acknowledged_then() -> None:
    rig, request = asked()
    *before, last = parts_of(rig, request)
    for packet in before:
        rig.arrive(packet)
        assert (rig.ended, said(rig)) == ([], [])
    rig.arrive(last)
    (delivered,) = rig.ended
    assert isinstance(delivered, Deliver)
    assert [octets.tobytes() for octets in delivered.octets] == [b"abcdefgh"]
    assert said(rig) == ["Received"]


@pytest.mark.parametrize("damage", ["a flipped bit", "left out", "twice", "cut short"])
def test_a_part_is_not_sound(damage: str) -> None:
    rig, request = asked()
    first, one, two, three = parts_of(rig, request)
    changed = {
        "a flipped bit": [one, Packet(two.message, (two.frames[0], b"dEf"), two.checksums, 9)],
        "left out": [one, three],
        "twice": [one, one],
        "cut short": [one, encode(two.message, [b"d"]), encode(three.message, [b"e"])],
    }[damage]
    for packet in [first, *changed]:
        rig.arrive(packet)
    assert rig.ended == []
    assert said(rig) == ["Cancel", "Request"]
    assert rig.core.counters["damaged"] == 1
    rig.arrive(three)  # of what it has given up
    for packet in parts_of(rig, request):
        rig.arrive(packet)
    assert [type(end) for end in rig.ended] == [Deliver]


def test_a_reply_that_begins_again_is_taken_from_the_start() -> None:
    rig, request = asked()
    whole = parts_of(rig, request)
    for packet in [*whole[:3], *whole]:
        rig.arrive(packet)
    assert [type(end) for end in rig.ended] == [Deliver]


def test_the_connection_is_lost_between_two_parts() -> None:
    rig, request = asked()
    first, one, two, three = parts_of(rig, request)
    rig.arrive(first)
    rig.arrive(one)
    rig.handle(Disconnected(A))
    rig.handle(Connected(A))
    rig.welcome()
    assert "Request" in said(rig)
    rig.arrive(two)
    rig.arrive(three)
    assert rig.ended == []
    for packet in parts_of(rig, request):
        rig.arrive(packet)
    assert [type(end) for end in rig.ended] == [Deliver]


def test_a_request_is_not_sent_again_while_its_reply_comes() -> None:
    rig, request = asked()
    wait_s = rig.core.config.resend_s
    for packet in parts_of(rig, request)[:3]:
        rig.now += 0.9 * wait_s
        rig.arrive(packet)
        rig.arrive(m.Heartbeat(1))
        rig.handle(Tick())
    assert "Request" not in said(rig)
    rig.now += 1.1 * wait_s
    rig.arrive(m.Heartbeat(1))
    rig.handle(Tick())
    assert "Request" in said(rig)


def test_nobody_wants_the_reply_any_more_and_the_broker_is_told_so() -> None:
    rig, request = asked()
    rig.handle(CancelRequest(request.message.id))  # type: ignore[union-attr]
    said(rig)
    for packet in parts_of(rig, request):
        rig.arrive(packet)
    assert said(rig) == ["Cancel"]
    assert rig.core.counters["duplicates"] == 1


def test_another_requests_reply_is_refused_at_its_first_word() -> None:
    rig, request = asked()
    rig.arrive(parts_of(rig, request, tokens_hash=1)[0])
    (failed,) = rig.ended
    assert isinstance(failed, Fail)
    assert failed.code == "identity"
    assert said(rig) == ["Cancel"]


def test_a_deadline_passes_between_two_parts() -> None:
    rig = Rig()
    rig.welcome()
    request = rig.submit(1, deadline_s=3.0)
    for packet in parts_of(rig, request)[:2]:
        rig.arrive(packet)
    rig.now += 3.0
    rig.handle(Tick())
    (failed,) = rig.ended
    assert isinstance(failed, Fail)
    assert "1 of 3 parts of it were here" in failed.text


def test_a_broker_that_the_request_has_left_is_told_to_stop() -> None:
    rig = Rig(A, B)
    rig.welcome(A, broker="b1")
    request = rig.submit(1)
    rig.welcome(B, broker="b2")
    rig.handle(Disconnected(A))
    rig.handle(Tick())
    assert rig.core.tickets[request.message.id].endpoint == B  # type: ignore[union-attr]
    rig.handle(Connected(A))
    rig.welcome(A, broker="b1")
    rig.sent.clear()
    for packet in parts_of(rig, request):
        rig.arrive(packet, A)
    assert [(e, type(x)) for e, x in rig.sent] == [(A, m.Cancel)]
    assert rig.ended == []
    for packet in parts_of(rig, request):
        rig.arrive(packet, B)
    assert [type(end) for end in rig.ended] == [Deliver]
