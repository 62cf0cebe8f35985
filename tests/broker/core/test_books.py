"""What the broker keeps is bounded by who is there, and nothing stays of who has left."""

from __future__ import annotations

import gc
import weakref

import pytest

from broker.core import Side
from broker.core.measures import _MAX_GONE
from broker.core.queue import _MAX_EMPTY, _TURNS
from broker.core.room import _UNACKNOWLEDGED
from broker.core.state import _KNOWN_MAPPINGS
from broker.protocol import encode
from broker.protocol import messages as m
from tests.broker.core.rig import Rig, mapping_offer, model
from tests.sim.footprint import footprint


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_request_that_was_answered_is_not_kept_by_its_timer(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    tokens = m.TensorSpec("input_ids", "int64", (1, 8), 1)
    asked = m.Request(rig.id("c", 1), "generate", "", 0, 8, "", "probs", 60.0, (tokens,))
    rig.from_client("c", encode(asked, [bytes(64)]))
    entry = weakref.ref(rig.core.entries[asked.id])
    rig.from_client("c", m.Cancel(asked.id))
    rig.fail("w", asked.id, "cancelled")
    gc.collect()
    assert entry() is None
    assert len(rig.core.timers) == 2  # whether the client and the worker are silent


def test_timers_do_not_pile_up_with_requests(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w", credits=2)
    for number in range(1, 500):
        rig.reply("w", rig.ask("c", number, n_tokens=1 << 40), 0.0)
        rig.from_client("c", m.Received((rig.id("c", number),)))
    assert len(rig.core.timers) <= 4


def test_lives_of_one_name_leave_no_timers(rig: Rig) -> None:
    for life in range(1, 200):
        rig.client("c", incarnation=life, connection="one")
        rig.worker("w", incarnation=life, connection="two")
    assert len(rig.core.timers) <= 2


def test_names_on_one_connection_leave_one_session(rig: Rig) -> None:
    for number in range(200):
        rig.client(f"c{number}", connection="one")
        rig.worker(f"w{number}", connection="two", description=model(f"m{number}"))
    assert list(rig.core.clients) == ["c199"]
    assert list(rig.core.workers) == ["w199"]
    assert list(rig.core.pools) == [model("m199").offer]


def test_a_worker_that_comes_and_goes_sets_one_timer_for_its_pool(rig: Rig) -> None:
    rig.client("c")
    rig.worker("busy")
    rig.ask("c", 1, offer=model().offer)
    rig.from_worker("busy", m.Goodbye("gone"))
    for life in range(2, 100):
        rig.worker("busy", incarnation=life, credits=0)
        rig.from_worker("busy", m.Goodbye("gone"))
    assert len(rig.core.timers) <= 3


def test_measures_of_models_that_are_gone_are_forgotten_and_of_those_that_serve_kept(
    rig: Rig,
) -> None:
    rig.client("c")
    rig.worker("honest", description=model("honest"))
    rig.reply("honest", rig.ask("c", 1, model="honest"))
    for number in range(2, 100):
        name = f"m{number}"
        rig.worker("w", incarnation=number, description=model(name))
        rig.fail("w", rig.ask("c", number, model=name), "bad_request")
    assert "honest" in rig.core.measures.models
    assert len(rig.core.measures.models) <= _MAX_GONE + 2


def test_a_worker_is_taken_to_know_so_many_mappings(rig: Rig) -> None:
    rig.client("c")
    rig.worker("w")
    for number in range(1, _KNOWN_MAPPINGS + 50):
        offer = mapping_offer(1, number + 1, vocab_size=1 << 20)
        assert isinstance(offer.message, m.MappingOffer)
        rig.from_client("c", offer)
        asked = rig.ask("c", number, mapping_id=offer.message.mapping_id)
        rig.fail("w", asked, "bad_request")
    assert len(rig.core.workers["w"].mappings) == _KNOWN_MAPPINGS


def test_steps_and_jobs_that_nobody_waits_for_are_forgotten(rig: Rig) -> None:
    rig.worker("w")
    rig.client("honest")
    rig.ask("honest", 1)  # is running
    rig.client("waiting", job="j")
    rig.ask("waiting", 1, step=-1)  # keeps the queue from being empty
    rig.client("c", job="j")
    for number in range(1, 3 * _TURNS):
        rig.from_client("c", m.Cancel(rig.ask("c", number, step=number)))
    (pool,) = rig.core.pools.values()
    assert len(pool.queue._jobs["j"].turns) <= _TURNS + 8
    for life in range(2, 2 * _MAX_EMPTY):
        rig.client("c", incarnation=life, job=f"job {life}")
        rig.ask("c", 1)
    assert len(pool.queue._jobs) <= _MAX_EMPTY + 2


def test_replies_that_a_client_never_acknowledges_have_a_bound(rig: Rig) -> None:
    room = rig.core.reply_room
    for number in range(_UNACKNOWLEDGED + 10):
        room.sent(m.RequestId("c", 1, number), 1, rig.now)
    room.validate()
    assert room.taken_bytes == _UNACKNOWLEDGED


def test_the_story_of_a_request_that_goes_on_and_on_has_a_bound(rig: Rig) -> None:
    rig.client("c")
    asked = None
    for _ in range(100):
        rig.worker("w")
        asked = asked or rig.ask("c", 1, ttl_s=1e9)
        rig.cut(Side.WORKER, "w")
    assert asked is not None
    assert len(rig.core.entries[asked].story) <= 20


def test_nothing_is_left_of_a_burst_of_peers(rig: Rig) -> None:
    rig.client("stays")
    rig.worker("serves")
    rig.reply("serves", rig.ask("stays", 1))
    rig.from_client("stays", m.Received((rig.id("stays", 1),)))
    before = sum(footprint(rig.core).values())
    for number in range(100):
        rig.client(f"c{number}", job=f"job {number}")
        rig.worker(f"w{number}", description=model(f"m{number}"))
        rig.ask(f"c{number}", 1, offer=model(f"m{number}").offer)
        rig.ask(f"c{number}", 2, offer="nobody serves that")
    for number in range(100):
        rig.cut(Side.CLIENT, f"c{number}")
        rig.cut(Side.WORKER, f"w{number}")
    rig.pass_time(130, (Side.CLIENT, "stays"), (Side.WORKER, "serves"))
    # some cancelled timers may lie about
    assert sum(footprint(rig.core).values()) <= before + 64
