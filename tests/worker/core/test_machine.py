from __future__ import annotations

from dataclasses import replace

from broker.peer.link import Arrived, Connected, Disconnected, SendTo, Tick
from broker.peer.parts import in_parts
from broker.protocol import Packet, encode
from broker.protocol import messages as m
from tests.broker.core.rig import mapping_offer, model
from worker.core import (
    Compute,
    Computed,
    ComputeTogether,
    Drain,
    Exit,
    Forget,
    Learn,
    TargetFree,
    WorkerCore,
)
from worker.core.held import Stage

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
        self.handle(Computed(request_id, (encode(m.Reply(*reply)),)))

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
    rig.arrive(m.Draining())
    assert not [x for x in rig.done if isinstance(x, Exit)]
    rig.computed(one)
    assert [type(x).__name__ for _, x in rig.sent[-2:]] == ["Reply", "Goodbye"]
    assert Exit("") in rig.done
    rig.arrive(m.HelloWanted("b1"))  # nothing brings it back
    assert not isinstance(rig.sent[-1][1], m.WorkerHello)


def test_a_request_that_was_on_its_way_when_it_began_to_drain_is_finished() -> None:
    rig = Rig()
    rig.welcome()
    rig.handle(Drain("SIGTERM"))
    one = rig.request(1)
    rig.arrive(m.Draining())
    assert not [x for x in rig.done if isinstance(x, Exit)]
    rig.computed(one)
    assert [type(x).__name__ for _, x in rig.sent[-2:]] == ["Reply", "Goodbye"]


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
    assert Exit(f"the broker at {B} refused this worker: other weights") in rig.done


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
    return Computed(request_id, (encode(m.Reply(*reply)),))


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


def test_the_target_goes_on_while_the_answer_before_is_made() -> None:
    rig = Rig()
    rig.welcome()
    ids = [rig.request(number) for number in (1, 2)]
    assert rig.computing() == [1]
    rig.handle(TargetFree())
    assert rig.computing() == [2]
    assert rig.answers() == []
    rig.computed(ids[0])
    assert rig.answers() == ["Reply 1"]


def test_the_target_waits_when_too_many_answers_are_being_made() -> None:
    rig = Rig(max_staged=2)
    rig.welcome()
    ids = [rig.request(number) for number in (1, 2, 3, 4)]
    rig.handle(TargetFree())
    rig.handle(TargetFree())
    assert rig.computing() == [1, 2]
    rig.computed(ids[0])
    assert rig.computing() == [3]
    rig.handle(TargetFree())
    assert rig.computing() == []


def test_a_request_that_is_cancelled_while_its_answer_is_made_is_answered_so() -> None:
    rig = Rig()
    rig.welcome()
    one = rig.request(1)
    rig.handle(TargetFree())
    rig.arrive(m.Cancel(one))
    assert rig.answers() == []
    rig.computed(one)
    assert rig.answers() == ["Failure 1 cancelled"]


def test_a_request_whose_time_is_over_when_its_turn_comes_is_not_computed() -> None:
    rig = Rig()
    rig.welcome()
    one, two, three = (rig.request(number) for number in (1, 2, 3))
    rig.now += 59.0
    rig.request(3)  # it is still wanted
    rig.now += 2.0
    rig.computed(one)
    assert rig.computing() == [1, 3]
    assert rig.answers() == ["Reply 1", "Failure 2 cancelled"]
    assert list(rig.core.held) == [three]
    assert two not in rig.core.held


def shaped(rig: Rig, number: int, tokens: tuple[int, int], **changes: str) -> m.RequestId:
    """A generate request whose manifest says ids and masks of this shape."""
    request_id = m.RequestId("c", 1, number)
    names = ("input_ids", "attention_mask", "loss_mask")
    specs = tuple(m.TensorSpec(name, "int64", tokens, 1) for name in names)
    wanted = {"operation": "generate", "mapping_id": "", "encoding": "probs"} | changes
    request = m.Request(
        request_id,
        model="",
        step=number,
        n_tokens=tokens[0] * tokens[1],
        ttl_s=60.0,
        manifest=specs,
        **wanted,
    )
    rig.arrive(encode(request, [bytes(8 * tokens[0] * tokens[1])] * 3))
    return request_id


def batches(rig: Rig) -> list[list[int]]:
    """Numbers of the requests of each forward since the last call."""
    given = []
    for action in rig.done:
        if isinstance(action, (Compute, ComputeTogether)):
            parts = (action,) if isinstance(action, Compute) else action.parts
            given.append([part.packet.message.id.number for part in parts])  # type: ignore[union-attr]
    rig.done.clear()
    return given


def test_waiting_requests_run_in_one_forward_up_to_so_many_padded_tokens() -> None:
    rig = Rig(coalesce_tokens=64)
    rig.welcome()
    ids = [shaped(rig, 1, (2, 8)), shaped(rig, 2, (2, 8)), shaped(rig, 3, (1, 16))]
    shaped(rig, 4, (2, 16))  # with it: 5 rows of 16 tokens
    assert batches(rig) == [[1]]  # nothing else waited
    rig.handle(TargetFree())
    assert batches(rig) == [[2, 3]]
    for request_id in ids:
        rig.computed(request_id)
    assert batches(rig) == [[4]]
    assert rig.answers() == ["Reply 1", "Reply 2", "Reply 3"]


def test_requests_for_other_things_do_not_run_together_and_nobody_is_overtaken() -> None:
    rig = Rig(coalesce_tokens=1000)
    rig.welcome()
    shaped(rig, 1, (1, 4))
    shaped(rig, 2, (1, 4))
    shaped(rig, 3, (1, 4), encoding="hidden")
    shaped(rig, 4, (1, 4))
    shaped(rig, 5, (1, 4), operation="input_embeddings")
    found = batches(rig)
    while rig.core.computing:
        rig.computed(rig.core.computing[0])
        for request_id in rig.core.held:
            if rig.core.held[request_id].stage is Stage.STAGED:
                rig.computed(request_id)
        found += batches(rig)
    assert found == [[1], [2], [3], [4], [5]]


def test_of_requests_that_run_together_one_is_cancelled() -> None:
    rig = Rig(coalesce_tokens=1000)
    rig.welcome()
    one, two, three = (shaped(rig, number, (1, 4)) for number in (1, 2, 3))
    rig.computed(one)
    assert batches(rig) == [[1], [2, 3]]
    rig.arrive(m.Cancel(two))
    rig.handle(TargetFree())
    rig.computed(two)
    rig.computed(three)
    assert rig.answers() == ["Reply 1", "Failure 2 cancelled", "Reply 3"]
    assert not rig.core.held


def test_a_forward_of_several_counts_as_one_towards_those_whose_answers_are_made() -> None:
    rig = Rig(coalesce_tokens=1000, max_staged=2)
    rig.welcome()
    for number in range(1, 6):
        shaped(rig, number, (1, 4))
    rig.handle(TargetFree())
    shaped(rig, 6, (1, 4))
    rig.handle(TargetFree())
    assert batches(rig) == [[1], [2, 3, 4, 5]]
    rig.computed(m.RequestId("c", 1, 1))
    assert batches(rig) == [[6]]


def parts_of(request_id: m.RequestId) -> tuple[Packet, ...]:
    manifest = (m.TensorSpec("aux", "uint8", (4,), 2),)
    reply = (request_id, "w", "tiny", "f0", (1, 3, 4), 0, "", "probs", 1.0, "", manifest)
    return in_parts(m.Reply(*reply), [b"ab", b"cd"], nbytes=2)


def test_the_parts_of_a_reply_are_sent_behind_it() -> None:
    rig = Rig()
    rig.welcome()
    one = rig.request(1)
    rig.sent.clear()
    rig.handle(Computed(one, parts_of(one)))
    assert [message for _, message in rig.sent] == [x.message for x in parts_of(one)]
    assert not rig.core.held


def test_a_reply_in_parts_that_was_made_without_a_broker_is_sent_whole_when_it_is_back() -> None:
    rig = Rig()
    rig.welcome()
    one = rig.request(1)
    rig.handle(Disconnected(A))
    rig.handle(Computed(one, parts_of(one)))
    rig.sent.clear()
    rig.welcome()
    assert [message for _, message in rig.sent][1:] == [x.message for x in parts_of(one)]


def test_a_reply_in_parts_is_not_sent_when_it_was_cancelled_while_the_target_ran() -> None:
    rig = Rig()
    rig.welcome()
    one = rig.request(1)
    rig.arrive(m.Cancel(one))
    rig.handle(Computed(one, parts_of(one)))
    assert rig.answers() == ["Failure 1 cancelled"]


def notices(rig: Rig) -> list[str]:
    """What was said about brokers that do not welcome us."""
    said = [x for x in rig.done if getattr(x, "event", "") == "no_broker"]
    return [str(x.fields["why"]) for x in said]  # type: ignore[attr-defined]


def test_a_worker_that_reaches_no_broker_says_so_and_says_it_again_rarely() -> None:
    rig = Rig(A, B)
    rig.handle(Disconnected(A, "the name 'a' is not known (dns.test)"))
    for _ in range(100):
        rig.now += 1.0
        rig.handle(Tick())
    first, second = notices(rig)
    assert "the name 'a' is not known (dns.test); no broker answers at tcp://b:5556 (3 s)" in first
    assert "tcp://b:5556 (63 s)" in second


def test_a_worker_with_one_broker_of_two_says_nothing_until_it_is_lost() -> None:
    rig = Rig(A, B)
    rig.welcome(A)
    for _ in range(8):
        rig.now += 1.0
        rig.arrive(m.Heartbeat(-1))
    assert not notices(rig)
    rig.handle(Disconnected(A))
    for _ in range(4):
        rig.now += 1.0
        rig.handle(Tick())
    (said,) = notices(rig)
    assert "no broker answers at tcp://a:5556 (3 s)" in said


def test_a_refusal_names_the_broker_that_refuses() -> None:
    rig = Rig(A)
    rig.handle(Connected(A))
    rig.arrive(m.Refused("wrong_port", "this is the broker's port for clients"))
    (end,) = [x for x in rig.done if isinstance(x, Exit)]
    assert end.error.startswith("the broker at tcp://a:5556 refused this worker: this is the")
