from __future__ import annotations

from dataclasses import replace

from broker.protocol import Packet, encode
from broker.protocol import messages as m
from broker.protocol.link import Arrived, Connected, Disconnected, SendTo, Tick
from tests.broker.rig import mapping_offer, model
from worker.core import Compute, Computed, Drain, Exit, Forget, Learn, WorkerCore

A, B = "tcp://a:5556", "tcp://b:5556"


class Rig:
    """A worker core with its own clock; every step checks every invariant."""

    def __init__(self, *endpoints: str, **options: object) -> None:
        self.now = 100.0
        ends = endpoints or (A,)
        self.core = WorkerCore("w", 3, model(), ends, self.now, **options)  # type: ignore[arg-type]
        self.sent: list[tuple[str, m.Message]] = []
        self.done: list[object] = []

    def handle(self, event: object) -> None:
        for action in self.core.handle(event, self.now):  # type: ignore[arg-type]
            if isinstance(action, SendTo):
                self.sent.append((action.endpoint, action.packet.message))
            else:
                self.done.append(action)
        self.core.validate()

    def welcome(self, endpoint: str = A) -> None:
        self.handle(Connected(endpoint))
        rules = (1.0, 5.0, 1 << 20, 8192, 64 << 20, 64 << 20, 4 << 30)
        self.arrive(m.Welcome("b1", 0, *rules), endpoint)

    def arrive(self, message: m.Message | Packet, endpoint: str = A) -> None:
        packet = message if isinstance(message, Packet) else encode(message)
        self.handle(Arrived(endpoint, packet))

    def request(self, number: int, endpoint: str = A, mapping_id: str = "") -> m.RequestId:
        request_id = m.RequestId("c", 1, number)
        fields = (request_id, "generate", "", number, 1, mapping_id, "probs", 60.0, ())
        self.arrive(m.Request(*fields), endpoint)
        return request_id

    def computed(self, request_id: m.RequestId) -> None:
        reply = (request_id, "w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", ())
        self.handle(Computed(request_id, encode(m.Reply(*reply))))

    def computing(self) -> list[int]:
        """Numbers of the requests given to the target since the last call."""
        given = [x.packet.message.id.number for x in self.done if isinstance(x, Compute)]  # type: ignore[union-attr]
        self.done = [x for x in self.done if not isinstance(x, Compute)]
        return given

    def answers(self, endpoint: str = A) -> list[str]:
        kinds = (m.Reply, m.Failure)
        shown = [
            f"{type(x).__name__} {x.id.number}{' ' + x.code if isinstance(x, m.Failure) else ''}"
            for e, x in self.sent
            if e == endpoint and isinstance(x, kinds)
        ]
        self.sent = [pair for pair in self.sent if pair[0] != endpoint]
        return shown


def test_requests_are_computed_one_after_the_other_in_order() -> None:
    rig = Rig()
    rig.welcome()
    ids = [rig.request(number) for number in (1, 2)]
    assert rig.computing() == [1]
    rig.computed(ids[0])
    assert rig.answers() == ["Reply 1"]
    assert rig.computing() == [2]


def test_a_request_that_is_held_already_is_not_computed_twice() -> None:
    rig = Rig()
    rig.welcome()
    rig.request(1)
    rig.request(1)
    assert rig.computing() == [1]
    assert len(rig.core.held) == 1


def test_a_hello_says_what_is_still_held() -> None:
    rig = Rig()
    rig.welcome()
    one, two = rig.request(1), rig.request(2)
    rig.handle(Disconnected(A))
    rig.handle(Connected(A))
    hello = rig.sent[-1][1]
    assert isinstance(hello, m.WorkerHello)
    assert hello.held == (one, two)


def test_a_result_made_without_a_broker_is_sent_when_it_is_back() -> None:
    rig = Rig()
    rig.welcome()
    one = rig.request(1)
    rig.handle(Disconnected(A))
    rig.computed(one)
    assert rig.answers() == []
    rig.welcome()
    assert rig.answers() == ["Reply 1"]
    assert not rig.core.held


def test_a_cancelled_request_is_answered_so_that_the_credit_returns() -> None:
    rig = Rig()
    rig.welcome()
    one, two = rig.request(1), rig.request(2)
    rig.arrive(m.Cancel(two))
    assert rig.answers() == ["Failure 2 cancelled"]
    rig.arrive(m.Cancel(one))
    assert rig.answers() == []  # the target is at it
    rig.computed(one)
    assert rig.answers() == ["Failure 1 cancelled"]


def test_two_brokers_that_ask_for_one_request_are_both_answered_by_one_forward() -> None:
    rig = Rig(A, B)
    rig.welcome(A)
    rig.welcome(B)
    one = rig.request(1, A)
    rig.request(1, B)  # the client failed over
    rig.handle(Disconnected(A))
    assert rig.computing() == [1]
    rig.computed(one)
    assert rig.answers(B) == ["Reply 1"]
    rig.welcome(A)
    assert rig.answers(A) == ["Reply 1"]
    assert not rig.core.held


def test_a_request_that_one_of_two_brokers_cancels_goes_on_for_the_other() -> None:
    rig = Rig(A, B)
    rig.welcome(A)
    rig.welcome(B)
    one = rig.request(1, A)
    rig.request(1, B)
    rig.arrive(m.Cancel(one), A)
    rig.computed(one)
    assert rig.answers(A) == ["Failure 1 cancelled"]
    assert rig.answers(B) == ["Reply 1"]


def test_a_cancelled_request_that_is_asked_again_is_answered() -> None:
    rig = Rig()
    rig.welcome()
    one = rig.request(1)
    rig.arrive(m.Cancel(one))  # the broker had lost its client, which then came back
    rig.request(1)
    rig.computed(one)
    assert rig.answers() == ["Reply 1"]


def test_an_unknown_mapping_is_said_and_a_known_one_learned_once() -> None:
    offer = mapping_offer(1, 5)
    assert isinstance(offer.message, m.MappingOffer)
    name = offer.message.mapping_id
    rig = Rig()
    rig.welcome()
    rig.request(1, mapping_id=name)
    assert rig.answers() == ["Failure 1 unknown_mapping"]
    rig.arrive(offer)
    rig.arrive(offer)
    assert [x for x in rig.done if isinstance(x, Learn)] == [Learn(offer)]
    rig.request(1, mapping_id=name)
    assert rig.computing() == [1]


def test_a_damaged_mapping_is_not_learned_and_is_asked_for_again() -> None:
    rig = Rig()
    rig.welcome()
    offer = mapping_offer(1, 5)
    assert isinstance(offer.message, m.MappingOffer)
    rig.arrive(replace(offer, frames=(offer.frames[0], bytes(16))))
    rig.request(1, mapping_id=offer.message.mapping_id)
    assert rig.answers() == ["Failure 1 unknown_mapping"]
    assert not any(isinstance(action, Learn) for action in rig.done)


def test_the_least_recently_used_mapping_goes_first_and_none_that_is_needed() -> None:
    offers = [mapping_offer(1, 5 + n) for n in range(3)]
    names = [x.message.mapping_id for x in offers]  # type: ignore[union-attr]
    rig = Rig(max_mappings=2)
    rig.welcome()
    rig.arrive(offers[0])
    rig.request(1, mapping_id=names[0])
    rig.arrive(offers[1])
    rig.arrive(offers[2])
    assert [x for x in rig.done if isinstance(x, Forget)] == [Forget(names[1])]


def test_draining_finishes_what_is_held_says_goodbye_and_leaves() -> None:
    rig = Rig()
    rig.welcome()
    one = rig.request(1)
    rig.handle(Drain("SIGTERM"))
    assert isinstance(rig.sent[-1][1], m.Draining)
    assert not [x for x in rig.done if isinstance(x, Exit)]
    rig.computed(one)
    assert [type(x).__name__ for _, x in rig.sent[-2:]] == ["Reply", "Goodbye"]
    assert Exit("") in rig.done
    rig.arrive(m.HelloWanted("b1"))  # nothing brings it back
    assert not isinstance(rig.sent[-1][1], m.WorkerHello)


def test_draining_ends_at_its_limit_and_gives_the_rest_back() -> None:
    rig = Rig(drain_s=3.0)
    rig.welcome()
    rig.request(1)
    rig.handle(Drain("SIGTERM"))
    for _ in range(4):
        rig.now += 1.0
        rig.arrive(m.Heartbeat(1))
    assert rig.sent[-1][1] == m.Goodbye("drained, 1 requests given back")
    assert Exit("") in rig.done


def test_a_worker_without_a_broker_leaves_at_once() -> None:
    rig = Rig()
    rig.handle(Drain("SIGTERM"))
    assert Exit("") in rig.done


def test_one_worker_serves_two_brokers() -> None:
    rig = Rig(A, B)
    rig.welcome(A)
    rig.welcome(B)
    one, two = rig.request(1, A), rig.request(2, B)
    rig.computed(one)
    rig.computed(two)
    assert rig.answers(A) == ["Reply 1"]
    assert rig.answers(B) == ["Reply 2"]


def test_refused_by_every_broker_it_leaves_with_the_reason() -> None:
    rig = Rig(A, B)
    rig.welcome(A)
    rig.welcome(B)
    rig.arrive(m.Refused("other_model", "other weights"), A)
    assert not [x for x in rig.done if isinstance(x, Exit)]
    rig.arrive(m.Refused("other_model", "other weights"), B)
    assert Exit("other weights") in rig.done


def test_it_beats_its_heart_while_the_target_computes() -> None:
    rig = Rig()
    rig.welcome()
    rig.request(1)
    rig.sent.clear()
    for _ in range(6):
        rig.now += 0.5
        rig.arrive(m.Heartbeat(1))
        rig.handle(Tick())
    assert [type(x).__name__ for _, x in rig.sent] == ["Heartbeat"] * 3


def test_a_mapping_that_was_damaged_on_its_way_is_not_learned() -> None:
    rig = Rig()
    rig.welcome()
    offer = mapping_offer(1, 2, 3)
    header, payload = offer.frames
    rig.arrive(replace(offer, frames=(header, bytes(payload)[:-1] + b"\1")))
    assert isinstance(offer.message, m.MappingOffer)
    rig.request(1, mapping_id=offer.message.mapping_id)
    assert rig.answers() == ["Failure 1 unknown_mapping"]
    rig.arrive(offer)
    rig.request(2, mapping_id=offer.message.mapping_id)
    assert rig.computing() == [2]


def direct_answer(request_id: m.RequestId) -> Computed:
    transfer = m.Transfer("w/c", 1, 0)
    reply = (request_id, "w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", (), transfer)
    return Computed(request_id, encode(m.Reply(*reply)))


def test_a_cancelled_request_whose_tensors_are_on_their_way_is_answered() -> None:
    rig = Rig()
    rig.welcome()
    request_id = rig.request(1)
    rig.arrive(m.Cancel(request_id))
    rig.handle(direct_answer(request_id))
    assert rig.answers() == ["Reply 1"]


def test_news_of_a_transfer_do_not_wait_for_the_broker() -> None:
    rig = Rig()
    rig.welcome()
    request_id = rig.request(1)
    rig.handle(Disconnected(A))
    rig.handle(direct_answer(request_id))
    assert rig.core.held == {}
    rig.welcome()
    assert rig.answers() == []
