"""Peers that say what is not true, or what nobody says: it costs them, and nobody else."""

from __future__ import annotations

import dataclasses

import pytest

from broker.core import BrokerCore, Received, Side
from broker.core.inspect import snapshot, validate
from broker.protocol import LocalProtocolError, encode
from broker.protocol import messages as m
from tests.broker.core.rig import NO_PAYLOAD, Rig, model

OTHER = model("tiny", fingerprint="other weights")


@pytest.fixture
def rig() -> Rig:
    return Rig()


def reply_of(description: m.ModelDescription, worker: str, request_id: m.RequestId) -> m.Reply:
    return m.Reply(
        request_id,
        worker,
        description.model,
        description.fingerprint,
        description.aux_layer_ids,
        NO_PAYLOAD,
        "",
        "probs",
        1.0,
        "",
        (),
        offer=description.offer,
    )


# -- offers -----------------------------------------------------------------------------------


def test_an_offer_is_the_hash_of_what_a_worker_serves_and_not_of_where() -> None:
    assert model().offer == model(tokenizer="/another/path", config_json='{"a": 1}').offer
    changes = {"fingerprint": "f1", "aux_layer_ids": (1, 2, 4), "dtype": "bfloat16", "model": "t"}
    others = {model(**{name: value}).offer for name, value in changes.items()}
    assert len(others | {model().offer}) == 5


def test_a_request_waits_for_its_offer_and_is_never_given_to_another_of_the_same_name(
    rig: Rig,
) -> None:
    rig.client("c")
    rig.worker("base")
    first = rig.ask("c", 1, offer=model().offer)
    rig.reply("base", first)
    rig.from_worker("base", m.Goodbye("maintenance"))
    waiting = rig.ask("c", 2, offer=model().offer)
    rig.worker("instruct", description=OTHER)
    rig.pass_time(60, (Side.CLIENT, "c"), (Side.WORKER, "instruct"))
    assert rig.got("instruct", m.Request) == []
    assert rig.got("c", m.Failure) == []
    shown = " ".join(snapshot(rig.core, rig.now)["warnings"])
    assert f"for the offer {model().offer[:8]}" in shown
    rig.from_worker("instruct", m.Goodbye("moved"))
    rig.worker("base", incarnation=2)
    assert [asked.id for asked in rig.got("base", m.Request)][-1:] == [waiting]


def test_a_second_model_does_not_end_a_training_that_named_its_offer(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    rig.worker("v", description=model("second"))
    for number in (1, 2):
        asked = rig.ask("c", number, offer=model().offer)
        rig.reply("w", asked)
    rig.pass_time(15, (Side.CLIENT, "c"), (Side.WORKER, "w"), (Side.WORKER, "v"))
    assert rig.got("c", m.Failure) == []
    assert rig.got("v", m.Request) == []


def test_an_emptied_pool_does_not_refuse_newcomers_of_its_name(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    rig.ask("c", 1, offer=model().offer)
    rig.from_worker("w", m.Goodbye("gone"))
    rig.worker("v", description=OTHER)
    assert rig.got("v", m.Refused) == []
    assert "v" in rig.core.workers


def test_while_it_is_served_a_name_is_one_models(rig: Rig) -> None:
    rig.worker("w")
    rig.worker("v", description=OTHER)
    (refused,) = rig.got("v", m.Refused)
    assert refused.code == "other_model"


# -- connections ------------------------------------------------------------------------------


@pytest.mark.parametrize("side", list(Side))
def test_two_names_on_one_connection_and_a_cut(rig: Rig, side: Side) -> None:
    hello = rig.client if side is Side.CLIENT else rig.worker
    for name in ("a", "b", "a", "c"):
        hello(name, connection="one")
    rig.cut(side, "one")
    rig.pass_time(30)
    assert not rig.core.clients
    assert not rig.core.workers


def test_a_new_life_on_the_same_connection_is_welcome(rig: Rig) -> None:
    rig.client("a", connection="one")
    rig.got("one")
    rig.client("a", incarnation=2, connection="one")
    assert rig.got("one", m.Refused) == []
    rig.worker("w", connection="two")
    rig.worker("w", incarnation=2, connection="two")
    assert rig.got("two", m.Refused) == []


# -- what a worker says that it holds ---------------------------------------------------------


def test_a_worker_cannot_steal_a_queued_request_of_another_model(rig: Rig) -> None:
    rig.client("c")
    rig.worker("busy")
    rig.ask("c", 1, offer=model().offer)
    queued = rig.ask("c", 2, offer=model().offer)
    rig.worker("thief", description=model("second"), held=(queued,))
    rig.from_worker("thief", reply_of(model("second"), "thief", queued))
    assert rig.got("c", m.Reply) == []
    rig.reply("busy", rig.id("c", 1))
    rig.reply("busy", queued)
    assert [reply.id.number for reply in rig.got("c", m.Reply)] == [1, 2]


def test_an_answer_in_parts_to_a_request_to_come_is_not_passed_on(rig: Rig) -> None:
    rig.client("c")
    future = rig.id("c", 7)
    rig.worker("thief", description=model("second"), held=(future,))
    spec = m.TensorSpec("supervision", "uint8", (8,), 2)
    forged = reply_of(model("second"), "thief", future)
    rig.from_worker("thief", dataclasses.replace(forged, manifest=(spec,), parts=2))
    assert rig.got("c", m.Reply) == []
    rig.worker("honest")
    rig.ask("c", 7, model="tiny")
    assert [asked.id for asked in rig.got("honest", m.Request)] == [future]


@pytest.mark.parametrize("answer", ["reply", "failure"])
def test_an_answer_laid_down_for_a_request_to_come_is_not_given(rig: Rig, answer: str) -> None:
    future = m.RequestId("c", 1, 7)
    rig.worker("thief", description=model("second"), held=(future,))
    if answer == "reply":
        rig.from_worker("thief", reply_of(model("second"), "thief", future))
    else:
        rig.fail("thief", future, "bad_request", "forged")
    rig.from_worker("thief", m.Goodbye("bye"))
    rig.client("c")
    rig.worker("honest")
    asked = rig.ask("c", 7, offer=model().offer)
    assert rig.got("c", m.Failure) == []
    rig.reply("honest", asked)
    (reply,) = rig.got("c", m.Reply)
    assert reply.worker == "honest"


def test_who_claims_a_request_of_another_model_does_not_hold_it_up(rig: Rig) -> None:
    future = m.RequestId("c", 1, 7)
    rig.worker("thief", description=model("second"), held=(future,))
    rig.client("c")
    rig.worker("honest")
    rig.ask("c", 7, offer=model().offer)
    assert [asked.id for asked in rig.got("honest", m.Request)] == [future]


def test_long_after_the_beginning_nothing_is_believed_that_was_not_given(rig: Rig) -> None:
    rig.client("c")
    rig.pass_time(120, (Side.CLIENT, "c"))
    held = tuple(m.RequestId("c", 1, number) for number in range(1, 1000))
    rig.worker("thief", credits=64, held=held)
    assert not rig.core.entries
    rig.cut(Side.WORKER, "thief")
    assert not rig.core.entries


def test_a_claim_is_no_truer_the_second_time(rig: Rig) -> None:
    held = tuple(m.RequestId("c", 1, number) for number in range(1, 1000))
    for connection in ("first", "second", "third"):
        rig.worker("thief", credits=3, held=held, connection=connection)
    assert len(rig.core.entries) == 3
    rig.pass_time(120)
    assert not rig.core.entries


def test_a_long_claim_costs_what_a_short_one_does_for_each_request() -> None:
    """Counted in looks at requests, of which there must not be one for each pair of them."""
    looks = []
    for n_held in (500, 4000):
        core = BrokerCore("b1")
        core.entries = entries = Counted()  # type: ignore[assignment]
        held = tuple(m.RequestId("c", 1, number) for number in range(n_held))
        core.handle(Received(Side.WORKER, b"s", encode(sound_hello())), 0.0)
        core.workers["sound"].seconds_per_token = 0.1
        core.pools[model().offer].choice.free()  # which takes note of it
        for connection in (b"first", b"second"):
            hello = m.WorkerHello("thief", 1, model(), 4096, held)
            core.handle(Received(Side.WORKER, connection, encode(hello)), 1.0)
        looks.append(entries.looks)
    assert looks[1] < 10 * looks[0]


class Counted(dict):  # type: ignore[type-arg]
    looks = 0

    def get(self, *args: object) -> object:
        self.looks += 1
        return super().get(*args)


def sound_hello() -> m.WorkerHello:
    return m.WorkerHello("sound", 1, model(), 1, ())


def test_requests_that_a_worker_claims_to_have_are_of_their_clients_window() -> None:
    rig = Rig(window=2)
    rig.client("c")
    rig.worker("thief", credits=64, held=tuple(rig.id("c", number) for number in range(5)))
    for number in range(5):
        rig.ask("c", number)
    refused = rig.got("c", m.Failure)
    assert [f.code for f in refused] == ["over_window"] * 3  # type: ignore[union-attr]


def test_a_claim_is_bounded_by_the_credits(rig: Rig) -> None:
    held = tuple(m.RequestId("c", 1, number) for number in range(1, 1000))
    rig.worker("thief", credits=3, held=held)
    assert len(rig.core.entries) == 3


# -- numbers and texts ------------------------------------------------------------------------


@pytest.mark.parametrize("compute_s", [1e9, 5e-324, 0.0])
def test_a_claimed_compute_time_is_at_most_what_passed(rig: Rig, compute_s: float) -> None:
    rig.client("c")
    rig.worker("w")
    asked = rig.ask("c", 1)
    rig.now += 2
    answer = reply_of(model(), "w", asked)
    rig.from_worker("w", m.Reply(**(fields(answer) | {"compute_s": compute_s})))
    speed = rig.core.workers["w"].seconds_per_token
    assert speed is not None
    assert 0 <= speed <= 2 / 100
    shown = snapshot(rig.core, rig.now)["workers"][0]["tokens_per_s"]
    assert shown is None or shown < 1e12


def fields(message: m.Reply) -> dict[str, object]:
    return {name: getattr(message, name) for name in message.__slots__}


def test_claimed_tokens_are_those_of_the_tensors(rig: Rig) -> None:
    rig.client("liar")
    spec = m.TensorSpec("input_ids", "int64", (2, 8), 1)
    for claimed in (0, 1 << 40):
        request = m.Request(
            rig.id("liar", claimed + 1), "generate", "", 0, claimed, "", "probs", 60.0, (spec,)
        )
        rig.from_client("liar", encode(request, [bytes(2 * 8 * 8)]))
    assert [entry.n_tokens for entry in rig.core.entries.values()] == [16, 16]


@pytest.mark.parametrize(
    "message",
    [
        m.ClientHello("c" * 257, 1, "job", 0),
        m.ClientHello("c", -1, "job", 0),
        m.ClientHello("c", 1, "é" * 129, 0),
        m.WorkerHello("w", 1, model("m" * 257), 1, ()),
        m.WorkerHello("w", 1, model(fingerprint="f" * 257), 1, ()),
        m.WorkerHello("w", 1, model(), 1 << 20, ()),
        m.MappingOffer("m0", -1, ()),
        m.Request(m.RequestId("c", 1, 1), "generate", "", 0, -1, "", "", 9.0, ()),
        m.Request(m.RequestId("c", 1, 1), "generate", "", 0, 1, "", "", 1e300, ()),
        m.Goodbye("\ud800" * 3),
    ],
    ids=lambda message: type(message).__name__,
)
def test_what_is_out_of_bounds_is_no_message(message: m.Message) -> None:
    if isinstance(message, m.Goodbye):  # a text for people is mended, not refused
        encode(message)
        return
    with pytest.raises(LocalProtocolError):
        encode(message)


def test_long_texts_are_cut_in_all_that_the_broker_says(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    asked = rig.ask("c", 1)
    rig.fail("w", asked, "bad_request", "x" * 100_000)
    (failure,) = rig.got("c", m.Failure)
    assert len(failure.text) == 2000
    validate(rig.core)
