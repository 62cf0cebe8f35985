from __future__ import annotations

from dataclasses import replace

import pytest

from broker.peer.link import Arrived, Connected, Disconnected, Reopen, SendTo, Tick
from broker.protocol import Packet, encode, payload_hash
from broker.protocol import messages as m
from tests.broker.core.rig import mapping_offer
from trainer_client.core import (
    CancelRequest,
    ClientConfig,
    ClientCore,
    Deliver,
    Fail,
    KeepMapping,
    Log,
    Submit,
)

A, B = "tcp://a:5555", "tcp://b:5555"


class Rig:
    """A client core with its own clock; every step checks every invariant."""

    def __init__(self, *endpoints: str, **config: float) -> None:
        self.now = 100.0
        self.core = ClientCore("me", 7, endpoints or (A,), self.now, config=ClientConfig(**config))
        self.sent: list[tuple[str, m.Message]] = []
        self.ended: list[Deliver | Fail] = []
        self.logs: list[Log] = []
        self.reopened: list[str] = []

    def handle(self, event: object) -> None:
        for action in self.core.handle(event, self.now):  # type: ignore[arg-type]
            if isinstance(action, SendTo):
                self.sent.append((action.endpoint, action.packet.message))
            elif isinstance(action, Reopen):
                self.reopened.append(action.endpoint)
            elif isinstance(action, Log):
                self.logs.append(action)
            else:
                self.ended.append(action)
        self.core.validate()

    def welcome(self, endpoint: str = A, *, window: int = 4, broker: str = "b1") -> None:
        self.handle(Connected(endpoint))
        rules = (1.0, 5.0, 1 << 20, 8192, 64 << 20, 64 << 20, 4 << 30)
        self.arrive(m.Welcome(broker, window, *rules), endpoint)

    def arrive(self, message: m.Message | Packet, endpoint: str = A) -> None:
        packet = message if isinstance(message, Packet) else encode(message)
        self.handle(Arrived(endpoint, packet))

    def submit(self, number: int, deadline_s: float = 600.0, encoding: str = "probs") -> Packet:
        octets = bytes([number])
        request = m.Request(
            m.RequestId("me", 7, number), "generate", "", number, 1, "", encoding, deadline_s,
            (m.TensorSpec("input_ids", "uint8", (1,), 1),),
        )  # fmt: skip
        packet = encode(request, [octets])
        self.handle(Submit(packet, self.now + deadline_s))
        return packet

    def reply_to(self, request: Packet, **changes: object) -> m.Reply:
        assert isinstance(request.message, m.Request)
        fields: dict[str, object] = {
            "id": request.message.id,
            "worker": "w",
            "model": "tiny",
            "fingerprint": "f0",
            "aux_layer_ids": (1, 3, 4),
            "tokens_hash": payload_hash(request),
            "mapping_id": "",
            "encoding": "probs",
            "compute_s": 1.0,
            "info_json": "",
            "manifest": (),
        }
        return m.Reply(**(fields | changes))  # type: ignore[arg-type]

    def reply(self, request: Packet, endpoint: str = A, **changes: object) -> Packet:
        packet = encode(self.reply_to(request, **changes))
        self.arrive(packet, endpoint)
        return packet

    def pass_time(self, seconds: float, *alive: str) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now = min(end, self.now + 0.5)
            for endpoint in alive:
                self.arrive(m.Heartbeat(1), endpoint)
            self.handle(Tick())

    def requests(self, endpoint: str = A) -> list[int]:
        """Numbers of the requests sent to an endpoint since the last call."""
        numbers = [x.id.number for e, x in self.sent if e == endpoint and isinstance(x, m.Request)]
        self.sent = [pair for pair in self.sent if pair[0] != endpoint]
        return numbers


def test_a_request_waits_for_the_welcome_and_its_reply_is_delivered_once() -> None:
    rig = Rig()
    request = rig.submit(1)
    assert rig.requests() == []
    rig.welcome()
    assert rig.requests() == [1]
    rig.reply(request)
    rig.reply(request)
    assert [type(end).__name__ for end in rig.ended] == ["Deliver"]
    assert rig.core.counters["duplicates"] == 1
    received = [x for _, x in rig.sent if isinstance(x, m.Received)]
    assert len(received) == 2  # the broker may forget both


def test_no_more_is_sent_than_the_window_and_in_order() -> None:
    rig = Rig()
    rig.welcome(window=2)
    requests = [rig.submit(number) for number in (1, 2, 3, 4)]
    assert rig.requests() == [1, 2]
    rig.reply(requests[1])
    assert rig.requests() == [3]


def test_a_restarted_broker_with_a_smaller_window_is_sent_no_more_than_that() -> None:
    rig = Rig()
    rig.welcome(window=4)
    asked = [rig.submit(number) for number in range(1, 5)]
    assert rig.requests() == [1, 2, 3, 4]
    rig.handle(Disconnected(A))
    rig.welcome(window=2, broker="b2")
    assert sorted(rig.requests()) == [1, 2]
    rig.reply(asked[1])
    assert rig.requests() == [3]
    for each in asked:
        rig.reply(each)
    assert [type(end).__name__ for end in rig.ended] == ["Deliver"] * 4


def test_replies_may_come_in_any_order() -> None:
    rig = Rig()
    rig.welcome()
    for request in reversed([rig.submit(number) for number in (1, 2, 3)]):
        rig.reply(request)
    assert [end.id.number for end in rig.ended] == [3, 2, 1]


def test_an_unanswered_request_is_resent_with_backoff() -> None:
    rig = Rig(resend_s=5.0, resend_max_s=10.0)
    rig.welcome()
    rig.submit(1)
    rig.requests()
    times = []
    for _ in range(80):
        rig.pass_time(0.5, A)
        if rig.requests():
            times.append(rig.now - 100.0)
    assert times == [5.0, 15.0, 25.0, 35.0]


def test_a_new_connection_gets_all_unfinished_requests_at_once() -> None:
    rig = Rig()
    rig.welcome()
    requests = [rig.submit(number) for number in (1, 2)]
    rig.reply(requests[0])
    rig.requests()
    rig.handle(Disconnected(A))
    rig.pass_time(0.5)
    assert rig.reopened == [A]
    rig.welcome(broker="b2")
    assert rig.requests() == [2]


def test_a_broker_that_falls_silent_is_connected_to_anew() -> None:
    rig = Rig()
    rig.welcome()
    rig.submit(1)
    rig.pass_time(4.5)
    assert rig.reopened == []
    rig.pass_time(1.5)
    assert rig.reopened == [A]


def test_heartbeats_are_sent_when_there_is_nothing_else_to_say() -> None:
    rig = Rig()
    rig.welcome()
    rig.sent.clear()
    rig.pass_time(3.0, A)
    beats = [x for _, x in rig.sent if isinstance(x, m.Heartbeat)]
    assert len(beats) == 3


def test_a_client_that_asks_and_is_answered_beats_its_heart_rarely() -> None:
    rig = Rig()
    rig.welcome()
    for number in range(40):
        rig.reply(rig.submit(number))
        rig.pass_time(0.5)
    beats = [x for _, x in rig.sent if isinstance(x, m.Heartbeat)]
    assert len(beats) == 4  # one in 5 s, of which each second has two requests


def test_requests_spread_over_brokers_and_fail_over() -> None:
    rig = Rig(A, B)
    rig.welcome(A, broker="a")
    rig.welcome(B, broker="b")
    for number in (1, 2, 3, 4):
        rig.submit(number)
    at_a, at_b = rig.requests(A), rig.requests(B)
    assert (len(at_a), len(at_b)) == (2, 2)
    rig.handle(Disconnected(A))
    assert rig.requests(B) == at_a


def gone_elsewhere() -> tuple[Rig, m.RequestId]:
    """A request that went to B when A was lost, and A is back."""
    rig = Rig(A, B)
    rig.welcome(A, broker="a")
    request = rig.submit(1)
    assert isinstance(request.message, m.Request)
    rig.handle(Disconnected(A))
    rig.welcome(B, broker="b")
    assert rig.requests(B) == [1]
    rig.welcome(A, broker="a")
    return rig, request.message.id


def test_a_broker_that_is_back_is_told_what_went_elsewhere() -> None:
    rig, request_id = gone_elsewhere()
    assert (A, m.Cancel(request_id)) in rig.sent
    assert (B, m.Cancel(request_id)) not in rig.sent


def test_with_one_broker_its_requests_wait_for_its_return() -> None:
    rig = Rig(A, B)
    rig.welcome(A)
    rig.submit(1)
    rig.handle(Disconnected(A))
    rig.handle(Tick())
    assert not rig.ended
    rig.welcome(B, broker="b")
    assert rig.requests(B) == [1]


@pytest.mark.parametrize(
    "change",
    [{"tokens_hash": 1}, {"mapping_id": "m1"}, {"encoding": "hidden"}, {"model": "other"}],
)
def test_a_reply_with_another_identity_is_an_error(change: dict) -> None:
    rig = Rig()
    rig.welcome()
    first = rig.submit(1)
    if "model" in change:
        assert isinstance(first.message, m.Request)
        named = m.Request(
            **{name: getattr(first.message, name) for name in first.message.__slots__}
            | {"id": m.RequestId("me", 7, 2), "model": "tiny"}
        )
        first = encode(named, first.payload)
        rig.handle(Submit(first, rig.now + 60))
    rig.reply(first, **change)
    (end,) = rig.ended
    assert isinstance(end, Fail)
    assert end.code == "identity"
    assert next(iter(change)) in end.text


def test_a_model_that_changes_in_mid_run_is_an_error() -> None:
    rig = Rig()
    rig.welcome()
    rig.reply(rig.submit(1))
    rig.reply(rig.submit(2), fingerprint="f1")
    assert isinstance(rig.ended[1], Fail)
    assert "fingerprint is 'f1' where 'f0' was expected" in rig.ended[1].text


def test_a_reply_has_the_layers_of_its_own_wish_and_a_named_one_those_of_the_first() -> None:
    wish = "layers=1,5;last"
    rig = Rig()
    rig.welcome()
    rig.reply(rig.submit(1))
    rig.reply(rig.submit(2, encoding=wish), encoding=wish, aux_layer_ids=(1, 5))
    assert not any(isinstance(end, Fail) for end in rig.ended)
    rig.reply(rig.submit(3, encoding=wish), encoding=wish, aux_layer_ids=(1, 6))
    rig.reply(rig.submit(4), aux_layer_ids=(1, 5))
    says = [end.text for end in rig.ended if isinstance(end, Fail)]
    assert "aux_layer_ids is (1, 6) where (1, 5) was expected" in says[0]
    assert "aux_layer_ids is (1, 5) where (1, 3, 4) was expected" in says[1]


def test_a_request_that_was_damaged_on_its_way_is_sent_again() -> None:
    rig = Rig()
    rig.welcome()
    request = rig.submit(1)
    assert rig.requests() == [1]
    rig.arrive(m.Failure(m.RequestId("me", 7, 1), "damaged", "payload frame 0 is damaged"))
    assert rig.requests() == [1]
    rig.reply(request)
    assert [type(ended) for ended in rig.ended] == [Deliver]
    assert rig.core.counters["damaged"] == 1


def test_a_socket_that_never_connects_is_opened_anew() -> None:
    rig = Rig()
    rig.pass_time(4.5)
    assert rig.reopened == []
    rig.pass_time(6)
    assert rig.reopened == [A, A]


def test_a_connection_that_ends_before_its_handshake_is_opened_anew_at_once() -> None:
    rig = Rig()
    rig.handle(Disconnected(A))
    rig.handle(Disconnected(A))
    rig.pass_time(0.5)
    assert rig.reopened == [A]
    rig.welcome()
    assert rig.core.links[A].ready
    rig.pass_time(4, A)
    assert rig.reopened == [A]


def test_a_damaged_reply_counts_as_lost() -> None:
    rig = Rig()
    rig.welcome()
    request = rig.submit(1)
    rig.requests()
    assert isinstance(request.message, m.Request)
    spec = m.TensorSpec("a", "uint8", (3,), 1)
    whole = encode(
        m.Reply(
            request.message.id, "w", "tiny", "f0", (1, 3, 4), payload_hash(request), "", "probs",
            1.0, "", (spec,),
        ),
        [b"abc"],
    )  # fmt: skip
    rig.arrive(replace(whole, frames=(whole.frames[0], b"abd")))
    assert not rig.ended
    acknowledged, resent = [x for _, x in rig.sent]
    assert isinstance(acknowledged, m.Received)  # or the broker would send the same bytes again
    assert isinstance(resent, m.Request)
    rig.arrive(whole)
    assert isinstance(rig.ended[0], Deliver)


def test_a_deadline_ends_a_request_with_its_story() -> None:
    rig = Rig()
    rig.welcome()
    rig.submit(1, deadline_s=12.0)
    rig.pass_time(13.0, A)
    (end,) = rig.ended
    assert isinstance(end, Fail)
    assert end.code == "deadline"
    assert "no answer within 12.0 s: it was sent 2 time(s), last to tcp://a:5555" in end.text
    assert isinstance(rig.sent[-1][1], m.Heartbeat | m.Cancel)


def test_a_cancelled_request_is_told_to_its_broker() -> None:
    rig = Rig()
    rig.welcome()
    request = rig.submit(1)
    assert isinstance(request.message, m.Request)
    rig.handle(CancelRequest(request.message.id))
    assert rig.sent[-1][1] == m.Cancel(request.message.id)
    assert not rig.core.tickets


@pytest.mark.parametrize("code", ["over_window", "damaged"])
def test_what_another_try_can_mend_is_tried_again_and_no_error(code: str) -> None:
    rig = Rig()
    rig.welcome()
    request = rig.submit(1)
    assert isinstance(request.message, m.Request)
    rig.requests()
    rig.arrive(m.Failure(request.message.id, code, "16 are under way"))
    assert not rig.ended
    rig.pass_time(1.5, A)
    assert rig.requests() == [1]


def test_a_failure_of_a_broker_that_no_longer_has_the_request_does_not_end_it() -> None:
    rig, request_id = gone_elsewhere()
    rig.arrive(m.Failure(request_id, "lost_workers", "given up"), A)
    assert not rig.ended
    rig.arrive(m.Failure(request_id, "target_failed", "no"), B)
    assert len(rig.ended) == 1


def test_a_wanted_mapping_is_offered() -> None:
    rig = Rig()
    rig.welcome()
    offer = mapping_offer(1, 5)
    rig.handle(KeepMapping(offer))
    assert isinstance(offer.message, m.MappingOffer)
    rig.arrive(m.MappingWanted(offer.message.mapping_id))
    assert rig.sent[-1][1] == offer.message
    rig.arrive(m.MappingWanted("m-unknown"))
    assert [log.event for log in rig.logs if log.level == "warning"] == ["unknown_mapping_wanted"]


def test_a_wanted_request_is_sent_again_or_is_not_wanted_any_more() -> None:
    rig = Rig()
    rig.welcome()
    request = rig.submit(1)
    assert isinstance(request.message, m.Request)
    assert rig.requests() == [1]
    rig.arrive(m.RequestWanted(request.message.id))
    assert rig.requests() == [1]
    rig.reply(request)
    rig.arrive(m.RequestWanted(request.message.id))
    assert rig.sent[-1][1] == m.Cancel(request.message.id)


def test_a_refusal_by_the_only_broker_ends_all_requests() -> None:
    rig = Rig()
    rig.welcome()
    rig.submit(1)
    rig.arrive(m.Refused("fenced", "two processes use one name"))
    rig.submit(2)
    assert [(end.code, end.text) for end in rig.ended if isinstance(end, Fail)] == [
        ("refused", "two processes use one name")
    ] * 2


def test_nothing_is_noticed_while_all_is_well_and_trouble_after_a_while() -> None:
    rig = Rig(notice_s=3.0, notice_again_s=30.0, resend_s=500.0, resend_max_s=500.0)
    rig.welcome()
    rig.submit(1)
    rig.pass_time(20, A)
    assert [log.event for log in rig.logs if log.level == "warning"] == []
    for _ in range(70):
        rig.now += 0.5
        rig.arrive(m.Heartbeat(0))
    warnings = [log for log in rig.logs if log.level == "warning"]
    assert [log.event for log in warnings] == ["waiting", "waiting"]  # once, and 30 s later
    assert "has no worker for this" in warnings[0].fields["why"]


@pytest.mark.parametrize("name", ["resend_s", "resend_max_s", "notice_s", "notice_again_s"])
def test_a_config_value_of_zero_is_an_error(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
        ClientConfig(**{name: 0})
