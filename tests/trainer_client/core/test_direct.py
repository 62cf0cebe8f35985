"""The client core and tensors that come past the broker."""

from __future__ import annotations

from broker.peer.link import Disconnected
from broker.protocol import Packet, encode
from broker.protocol import messages as m
from tests.trainer_client.core.test_machine import A, B, Rig
from trainer_client.core import (
    CancelRequest,
    Deliver,
    Fail,
    JoinChannel,
    Received,
    ReceiveDirectly,
    Submit,
)

OFFER = m.DirectOffer(("gloo",), "here")
TRANSFER = m.Transfer("w/me", 1, 0)
SPEC = m.TensorSpec("aux", "float32", (4,), 0)


class DirectRig(Rig):
    """Its requests offer to take tensors directly."""

    def submit(self, number: int, deadline_s: float = 600.0) -> Packet:
        assert self.core.new_id().number == number
        octets = bytes([number])
        request = m.Request(
            m.RequestId("me", 7, number), "generate", "", number, 1, "", "probs", deadline_s,
            (m.TensorSpec("input_ids", "uint8", (1,), 1),), OFFER,
        )  # fmt: skip
        packet = encode(request, [octets])
        self.handle(Submit(packet, self.now + deadline_s))
        return packet

    def direct_reply(self, request: Packet, endpoint: str = A) -> m.RequestId:
        self.reply(request, endpoint, transfer=TRANSFER, manifest=(SPEC,))
        assert isinstance(request.message, m.Request)
        return request.message.id

    def asked(self, endpoint: str = A) -> list[m.Request]:
        found = [x for e, x in self.sent if e == endpoint and isinstance(x, m.Request)]
        self.sent = [pair for pair in self.sent if pair[0] != endpoint]
        return found


def started() -> tuple[DirectRig, Packet]:
    rig = DirectRig(resend_s=5.0)
    rig.welcome()
    request = rig.submit(1)
    (asked,) = rig.asked()
    assert asked.direct == OFFER
    return rig, request


def kinds(rig: Rig) -> list[type]:
    return [type(end) for end in rig.ended]


def test_tensors_that_come_directly_are_delivered_with_their_reply() -> None:
    rig, request = started()
    asked = rig.direct_reply(request)
    assert kinds(rig) == [ReceiveDirectly]
    rig.handle(Received(asked, {"aux": "tensor"}))
    delivered = rig.ended[-1]
    assert isinstance(delivered, Deliver)
    assert delivered.id == asked
    assert delivered.tensors == {"aux": "tensor"}
    assert rig.core.tickets == {}
    assert rig.core.counters["direct"] == 1


def test_the_brokers_window_is_free_while_tensors_are_coming() -> None:
    rig = DirectRig()
    rig.welcome(window=1)
    first = rig.submit(1)
    rig.submit(2)
    assert rig.requests() == [1]
    rig.direct_reply(first)
    assert rig.requests() == [2]


def test_a_failed_transfer_is_asked_again_as_a_new_request_on_the_wire() -> None:
    rig, request = started()
    asked = rig.direct_reply(request)
    rig.handle(Received(asked, None, "the other end is gone"))
    (again,) = rig.asked()
    assert again.id != asked
    assert (again.direct, again.avoid) == (None, "w")
    packet = rig.core.tickets[again.id].packet
    rig.reply(packet)
    delivered = rig.ended[-1]
    assert isinstance(delivered, Deliver)
    assert delivered.id == asked  # what the caller knows
    assert rig.core.counters["direct_failed"] == 1


def test_late_news_of_a_transfer_that_was_asked_again_changes_nothing() -> None:
    rig, request = started()
    asked = rig.direct_reply(request)
    rig.handle(Received(asked, None, "cut"))
    before = len(rig.ended)
    rig.handle(Received(asked, {"aux": "tensor"}))
    rig.handle(Received(asked, None, "cut"))
    rig.direct_reply(request)  # still received, so that the pair stays in step
    assert kinds(rig)[before:] == [ReceiveDirectly]
    assert len(rig.core.tickets) == 1


def test_a_resend_asks_for_the_wire_under_the_same_id() -> None:
    rig, request = started()
    rig.pass_time(6.0, A)
    (again,) = rig.asked()
    assert isinstance(request.message, m.Request)
    assert (again.id, again.direct) == (request.message.id, None)


def test_failing_over_asks_for_the_wire() -> None:
    rig = DirectRig(A, B)
    rig.welcome(A)
    rig.submit(1)
    rig.welcome(B)
    rig.asked(A)
    rig.handle(Disconnected(A))
    (again,) = rig.asked(B)
    assert again.direct is None


def test_a_wire_reply_that_overtakes_the_transfer_wins() -> None:
    rig, request = started()
    asked = rig.direct_reply(request)
    rig.reply(request)
    assert kinds(rig) == [ReceiveDirectly, Deliver]
    rig.handle(Received(asked, {"aux": "tensor"}))
    assert kinds(rig) == [ReceiveDirectly, Deliver]


def test_a_cancelled_transfer_is_received_all_the_same() -> None:
    rig, request = started()
    assert isinstance(request.message, m.Request)
    rig.handle(CancelRequest(request.message.id))
    rig.direct_reply(request)
    assert kinds(rig) == [ReceiveDirectly]
    assert rig.core.tickets == {}


def test_cancelling_works_by_the_callers_id_after_it_was_asked_again() -> None:
    rig, request = started()
    asked = rig.direct_reply(request)
    rig.handle(Received(asked, None, "cut"))
    (again,) = rig.asked()
    rig.handle(CancelRequest(asked))
    assert m.Cancel(again.id) in [message for _, message in rig.sent]
    assert rig.core.tickets == {}


def test_a_transfer_that_outlasts_the_deadline_ends_in_the_story() -> None:
    rig = DirectRig()
    rig.welcome()
    request = rig.submit(1, deadline_s=3.0)
    rig.direct_reply(request)
    rig.pass_time(3.5, A)
    failed = rig.ended[-1]
    assert isinstance(failed, Fail)
    assert "its tensors were still on their direct way" in failed.text


def test_an_invitation_is_passed_on_once_with_its_reply() -> None:
    rig, request = started()
    invitation = m.Invitation("w/me", 1, "n", "gloo", "127.0.0.1", 1)
    rig.reply(request, invitation=invitation)
    assert rig.ended[0] == JoinChannel("w", invitation)
    assert kinds(rig) == [JoinChannel, Deliver]
