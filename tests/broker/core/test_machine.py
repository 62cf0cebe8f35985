from __future__ import annotations

import pytest

from broker.core import BrokerConfig, Side
from broker.core.inspect import snapshot
from broker.protocol import messages as m
from tests.broker.core.rig import Rig, mapping_offer, model

CLIENT, WORKER = Side.CLIENT, Side.WORKER


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_a_request_goes_to_a_worker_and_its_reply_to_the_client(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    assert rig.requests("w") == ["a#1"]
    rig.reply("w", one)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]
    assert repr(rig.core) == "<Broker clients=1 workers=1 queued=0 running=0>"


def test_a_welcome_says_the_rules(rig: Rig) -> None:
    rig.client("a")
    (welcome,) = rig.got("a")
    assert isinstance(welcome, m.Welcome)
    assert (welcome.window, welcome.heartbeat_s, welcome.liveness_s) == (16, 1.0, 5.0)
    assert welcome.limits() == rig.core.config.limits


def test_a_request_waits_for_the_first_worker(rig: Rig) -> None:
    rig.client("a")
    rig.ask("a", 1, model="tiny")
    rig.ask("a", 2)
    rig.worker("w", credits=2)
    assert rig.requests("w") == ["a#1", "a#2"]


def test_a_worker_is_never_given_more_than_its_credits(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w", credits=2)
    one, *_ = [rig.ask("a", number) for number in (1, 2, 3, 4)]
    assert rig.requests("w") == ["a#1", "a#2"]
    rig.reply("w", one)
    assert rig.requests("w") == ["a#3"]


def test_the_earliest_step_goes_first_then_every_rank_in_turn(rig: Rig) -> None:
    rig.worker("w", credits=1)
    for name in "abc":
        rig.client(name)
    rig.ask("a", 1, step=0)
    for number in (2, 3):
        rig.ask("a", number, step=5)
    rig.ask("b", 1, step=5)
    rig.ask("c", 1, step=4)
    order = []
    while given := rig.requests("w"):
        order += given
        client, number = given[0].split("#")
        rig.reply("w", rig.id(client, int(number)))
    assert order == ["a#1", "c#1", "a#2", "b#1", "a#3"]


def test_two_jobs_share_by_tokens_whatever_their_step_numbers(rig: Rig) -> None:
    rig.worker("w", credits=1)
    rig.client("old", job="old")
    rig.client("new", job="new")
    rig.ask("old", 1, step=0)
    for number in range(2, 6):
        rig.ask("old", number, step=9000 + number)
        rig.ask("new", number, step=number)
    order = []
    while given := rig.requests("w"):
        order += given
        client, number = given[0].split("#")
        rig.reply("w", rig.id(client, int(number)))
    assert [name.split("#")[0] for name in order[1:7]].count("old") == 3


def test_the_faster_of_two_free_workers_gets_the_request(rig: Rig) -> None:
    rig.client("a")
    rig.worker("slow", credits=1)
    one = rig.ask("a", 1)
    rig.reply("slow", one, compute_s=4.0)
    rig.worker("fast", credits=1)
    two = rig.ask("a", 2)
    assert rig.requests("fast") == ["a#2"]
    rig.reply("fast", two, compute_s=1.0)
    rig.ask("a", 3)
    assert rig.requests("fast") == ["a#3"]


# -- resends ------------------------------------------------------------------------------------


def test_a_resend_of_a_running_request_changes_nothing(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w", credits=2)
    rig.ask("a", 1)
    rig.ask("a", 1)
    assert rig.requests("w") == ["a#1"]
    assert rig.core.counters["resends"] == 1


def test_a_resend_of_an_answered_request_is_answered_from_the_store(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.reply("w", one)
    rig.got("a")
    rig.ask("a", 1)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]
    assert rig.requests("w") == ["a#1"]  # one forward


def test_an_acknowledged_answer_is_forgotten(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.reply("w", one)
    assert len(rig.core.answers) == 1
    rig.from_client("a", m.Received((one,)))
    assert len(rig.core.answers) == 0


def test_the_store_of_answers_is_bounded_in_bytes() -> None:
    rig = Rig(held_answer_bytes=1000)
    rig.client("a")
    rig.worker("w")
    for number in range(1, 50):
        rig.reply("w", rig.ask("a", number))
    assert 0 < rig.core.answers.held_bytes <= 1000


def test_another_client_cannot_acknowledge_or_ask_in_a_clients_name(rig: Rig) -> None:
    rig.client("a")
    rig.client("b")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.reply("w", one)
    rig.from_client("b", m.Received((one,)))
    assert len(rig.core.answers) == 1
    rig.ask("a", 2, connection="b")
    assert rig.requests("w") == ["a#1"]
    assert "foreign_request" in rig.logs


def test_a_request_over_the_window_is_refused_with_both_numbers() -> None:
    rig = Rig(window=2)
    rig.client("a")
    for number in (1, 2, 3):
        rig.ask("a", number)
    (failure,) = rig.got("a", m.Failure)
    assert failure.code == "over_window"
    assert "2 requests are under way, the window is 2" in failure.text


# -- connections --------------------------------------------------------------------------------


def test_a_stranger_is_asked_for_a_hello(rig: Rig) -> None:
    rig.ask("a", 1)
    rig.from_worker("w", m.Heartbeat(-1))
    assert rig.got("a") == [m.HelloWanted("b1")]
    assert rig.got("w") == [m.HelloWanted("b1")]


def test_a_message_from_the_wrong_side_is_logged_and_dropped(rig: Rig) -> None:
    rig.client("a")
    rig.from_client("a", m.Draining())
    rig.from_worker("a", m.Received(()))
    assert rig.logs.count("wrong_message") == 2


def test_garbage_is_counted_and_another_version_is_told(rig: Rig) -> None:
    rig.garbage(CLIENT, "x")
    assert rig.got("x") == []
    rig.garbage(CLIENT, "y", other_version=True)
    (refused,) = rig.got("y")
    assert refused == m.Refused("version", "not a message")
    assert rig.core.counters["bad_messages"] == 2


def test_a_client_that_reconnects_gets_the_reply_on_its_new_connection(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.cut(CLIENT, "a")
    rig.client("a", connection="a2")
    rig.reply("w", one)
    assert [reply.id for reply in rig.got("a2", m.Reply)] == [one]


def test_an_answer_to_a_disconnected_client_is_kept_for_its_resend(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.cut(CLIENT, "a")
    rig.reply("w", one)
    rig.client("a", connection="a2")
    rig.ask("a", 1, connection="a2")
    assert [reply.id for reply in rig.got("a2", m.Reply)] == [one]


def test_a_newer_life_of_a_client_fences_off_the_older(rig: Rig) -> None:
    rig.client("a", incarnation=5)
    rig.worker("w", credits=2)
    rig.ask("a", 1)
    rig.got("a")
    rig.client("a", incarnation=6, connection="a2")
    (refused,) = rig.got("a")
    assert isinstance(refused, m.Refused)
    assert refused.code == "fenced"
    assert [cancel.id for cancel in rig.got("w", m.Cancel)] == [m.RequestId("a", 5, 1)]
    rig.reply("w", m.RequestId("a", 5, 1))
    assert not rig.got("a2", m.Reply)
    rig.client("a", incarnation=5, connection="a3")
    (refused,) = rig.got("a3")
    assert "incarnation 6" in refused.text
    assert "incarnation 5 is fenced off" in refused.text


def test_a_silent_client_is_forgotten_with_its_requests(rig: Rig) -> None:
    rig.client("a")
    rig.client("b")
    rig.ask("a", 1)
    rig.pass_time(6, (CLIENT, "b"))
    assert list(rig.core.clients) == ["b"]
    assert not rig.core.entries


def test_a_heartbeat_says_whether_anyone_serves_what_the_client_waits_for(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w", description=model("other"))
    rig.ask("a", 1, model="tiny")
    rig.got("a")
    rig.from_client("a", m.Heartbeat(-1))
    other = model("other").offer
    assert rig.got("a") == [m.Heartbeat(0, "", (other,))]
    rig.worker("v")
    rig.from_client("a", m.Heartbeat(-1))
    assert rig.got("a") == [m.Heartbeat(2, "", (other, model().offer))]


# -- workers that come and go -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["cut", "silence", "goodbye"])
def test_a_lost_workers_requests_go_to_another_before_all_others(rig: Rig, how: str) -> None:
    rig.client("a")
    rig.worker("w")
    rig.ask("a", 9, step=9)
    rig.ask("a", 1, step=1)
    rig.got("w")
    if how == "cut":
        rig.cut(WORKER, "w")
    elif how == "goodbye":
        rig.from_worker("w", m.Goodbye("stopped"))
    else:
        rig.pass_time(6, (CLIENT, "a"))
    assert not rig.core.workers
    rig.worker("v")
    assert rig.requests("v") == ["a#9"]
    assert rig.core.counters["requeues"] == 1


def test_the_late_answer_of_a_lost_worker_is_used_once(rig: Rig) -> None:
    """Worker w is cut off while it computes, and comes back with the result."""
    rig.client("a")
    rig.worker("w")
    rig.worker("v", credits=0 + 1)
    one = rig.ask("a", 1)
    first, second = ("w", "v") if rig.requests("w") else ("v", "w")
    rig.cut(WORKER, first)
    assert rig.requests(second) == ["a#1"]
    rig.worker(first, connection="again", held=(one,))
    rig.reply("again", one)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]
    assert [cancel.id for cancel in rig.got(second, m.Cancel)] == [one]
    rig.reply(second, one)
    assert rig.got("a", m.Reply) == []
    assert rig.core.counters["late_answers"] == 1


@pytest.mark.parametrize("n_tokens", [0, 1 << 40])
def test_a_request_may_say_any_number_of_tokens(n_tokens: int) -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("fast", credits=1)
    rig.worker("slow", credits=2)
    for name, seconds in (("fast", 0.1), ("slow", 1.0)):
        rig.ask("c", 1 if name == "fast" else 2)
        rig.now += seconds
        (asked,) = [x.id for x in rig.got(name, m.Request)]
        rig.reply(name, asked, compute_s=seconds)
    asked = [rig.ask("c", number, n_tokens=n_tokens) for number in range(3, 9)]
    for _ in range(20):
        for name in ("fast", "slow"):
            rig.now += 0.01
            for message in rig.got(name, m.Request):
                rig.reply(name, message.id, compute_s=0.01)
    assert {message.id for message in rig.got("c", m.Reply)} >= set(asked)


def test_a_failure_of_a_cancelled_run_says_nothing_of_the_next() -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("w", credits=1)
    request_id = rig.ask("c", 1)
    rig.from_client("c", m.Cancel(request_id))
    rig.ask("c", 1)
    assert rig.requests("w") == ["c#1"]
    rig.fail("w", request_id, "cancelled")
    assert rig.requests("w") == ["c#1"]
    rig.reply("w", request_id)
    assert len(rig.got("c", m.Reply)) == 1


def test_a_worker_that_reconnects_without_its_request_loses_it(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.ask("a", 1)
    rig.got("w")
    rig.worker("w", connection="again")
    assert rig.requests("again") == ["a#1"]


def test_a_request_that_took_down_three_workers_is_refused_with_its_story(rig: Rig) -> None:
    rig.client("a")
    rig.ask("a", 1)
    for name in ("w1", "w2", "w3"):
        rig.worker(name)
        rig.pass_time(2, (CLIENT, "a"))
        rig.cut(WORKER, name)
    assert rig.got("a", m.Failure) == []  # they may come back
    rig.worker("w4")
    assert rig.requests("w4") == []
    rig.pass_time(6, (CLIENT, "a"))
    (failure,) = rig.got("a", m.Failure)
    assert failure.code == "lost_workers"
    for name in ("w1", "w2", "w3"):
        assert f"worker {name} had it for 2.0 s: its connection closed" in failure.text


def test_a_worker_that_comes_back_clears_the_request_that_it_had(rig: Rig) -> None:
    """A switch that blinks cuts all workers off at once, and takes none of them down."""
    rig.client("a")
    names = ("w1", "w2", "w3")
    for name in names:
        rig.worker(name)
    one = rig.ask("a", 1)
    for name in names:
        rig.cut(WORKER, name)
    rig.worker("w4")
    assert rig.requests("w4") == []
    rig.worker("w2", connection="again")
    assert [*rig.requests("w4"), *rig.requests("again")] == ["a#1"]
    rig.pass_time(20, (CLIENT, "a"), (WORKER, "w4"), (WORKER, "again"))
    assert rig.got("a", m.Failure) == []
    assert rig.core.entries[one].failed_on == ["w1", "w3"]


def test_a_worker_that_comes_back_in_a_new_life_was_taken_down(rig: Rig) -> None:
    rig.client("a")
    for life in (1, 2, 3, 4):
        rig.worker("w", incarnation=life, connection=f"w{life}")
        if life == 1:
            rig.ask("a", 1)
        if life < 4:
            rig.cut(WORKER, f"w{life}")
    rig.pass_time(6, (CLIENT, "a"))
    (failure,) = rig.got("a", m.Failure)
    assert failure.code == "lost_workers"


def test_any_number_of_cuts_of_a_healthy_worker_fails_no_request(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w", connection="w0")
    one = rig.ask("a", 1)
    for number in range(10):
        rig.cut(WORKER, f"w{number}")
        rig.now += 0.1
        rig.worker("w", connection=f"w{number + 1}", held=(one,) if number % 2 else ())
    rig.reply("w10", one)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]


@pytest.mark.parametrize("side", [CLIENT, WORKER])
def test_a_peer_whose_message_was_damaged_is_asked_to_begin_again(rig: Rig, side: Side) -> None:
    rig.client("peer")
    rig.worker("peer")
    rig.got("peer")
    rig.garbage(side, "peer")
    assert [type(message) for message in rig.got("peer")] == [m.HelloWanted]
    rig.garbage(side, "stranger")
    assert rig.got("stranger") == []


def test_a_reply_that_was_damaged_on_its_way_is_made_again(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.garbage(WORKER, "w")
    rig.worker("w")
    assert rig.requests("w") == ["a#1", "a#1"]
    rig.reply("w", one)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]


def test_a_target_that_raises_is_tried_elsewhere_first(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w1")
    rig.worker("w2")
    one = rig.ask("a", 1)
    first, second = ("w1", "w2") if rig.requests("w1") else ("w2", "w1")
    rig.fail(first, one, "target_failed", "out of memory")
    assert rig.requests(second) == ["a#1"]
    rig.reply(second, one)
    assert len(rig.got("a", m.Reply)) == 1


def test_a_bad_request_is_answered_at_once_and_not_tried_again(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w1")
    rig.worker("w2")
    one = rig.ask("a", 1)
    rig.fail("w1" if rig.requests("w1") else "w2", one, "bad_request", "ids out of range")
    (failure,) = rig.got("a", m.Failure)
    assert failure.text == "ids out of range"
    assert rig.core.counters["requeues"] == 0


def test_a_draining_worker_gets_nothing_new(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w", credits=2)
    one = rig.ask("a", 1)
    rig.got("w")
    rig.from_worker("w", m.Draining())
    rig.ask("a", 2)
    assert rig.requests("w") == []
    rig.reply("w", one)
    rig.from_worker("w", m.Goodbye("drained"))
    rig.worker("v")
    assert rig.requests("v") == ["a#2"]
    assert rig.core.counters["requeues"] == 0


def test_a_worker_with_another_model_behind_the_name_is_refused_with_both(rig: Rig) -> None:
    rig.worker("w")
    rig.worker("v", description=model(fingerprint="f1", aux_layer_ids=(2, 3, 4)))
    (refused,) = rig.got("v")
    assert isinstance(refused, m.Refused)
    for fact in ("fingerprint='f0'", "fingerprint='f1'", "(1, 3, 4)", "(2, 3, 4)"):
        assert fact in refused.text
    assert list(rig.core.workers) == ["w"]


def test_a_pool_that_everyone_left_may_be_founded_anew(rig: Rig) -> None:
    rig.worker("w")
    rig.cut(WORKER, "w")
    rig.worker("v", description=model(fingerprint="f1"))
    assert list(rig.core.workers) == ["v"]


def test_requests_go_to_the_pool_of_their_model(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.worker("v", description=model("large"))
    rig.ask("a", 1, model="large")
    rig.ask("a", 2, model="tiny")
    assert rig.requests("v") == ["a#1"]
    assert rig.requests("w") == ["a#2"]


@pytest.mark.parametrize(
    ("wanted", "says"), [("huge", "'huge'; the models here are: large, tiny"), ("", "name one")]
)
def test_an_unknown_model_is_an_error_after_a_moment_of_grace(
    rig: Rig, wanted: str, says: str
) -> None:
    rig.client("a")
    rig.worker("w")
    rig.worker("v", description=model("large"))
    rig.ask("a", 1, model=wanted)
    alive = (CLIENT, "a"), (WORKER, "w"), (WORKER, "v")
    rig.pass_time(5, *alive)
    assert rig.got("a", m.Failure) == []
    rig.pass_time(6, *alive)
    (failure,) = rig.got("a", m.Failure)
    assert failure.code == "unknown_model"
    assert says in failure.text


def test_without_any_worker_a_request_waits_past_the_grace(rig: Rig) -> None:
    rig.client("a")
    rig.ask("a", 1, model="tiny")
    rig.pass_time(30, (CLIENT, "a"))
    assert rig.got("a", m.Failure) == []
    rig.worker("w")
    assert rig.requests("w") == ["a#1"]


def test_a_request_whose_time_is_over_is_answered_so(rig: Rig) -> None:
    rig.client("a")
    rig.ask("a", 1, ttl_s=7.0)
    rig.pass_time(20, (CLIENT, "a"))
    (failure,) = rig.got("a", m.Failure)
    assert failure.code == "expired"


def test_a_cancelled_request_is_forgotten_and_its_worker_told(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w", credits=1)
    one, two = rig.ask("a", 1), rig.ask("a", 2)
    rig.from_client("a", m.Cancel(one))
    rig.from_client("a", m.Cancel(two))
    assert [cancel.id for cancel in rig.got("w", m.Cancel)] == [one]
    rig.fail("w", one, "cancelled")
    assert rig.got("a", m.Failure) == []
    assert not rig.core.entries


def test_an_answer_that_nobody_asked_of_this_worker_is_dropped(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.worker("v")
    one = rig.ask("a", 1)
    other = "v" if rig.requests("w") else "w"
    rig.reply(other, one)
    assert rig.got("a", m.Reply) == []
    assert "unasked_answer" in rig.logs


# -- mappings -----------------------------------------------------------------------------------


def test_a_mapping_is_asked_for_once_needed_and_told_to_each_worker_once(rig: Rig) -> None:
    offer = mapping_offer(1, 5, 9)
    name = offer.message.mapping_id
    rig.client("a")
    rig.worker("w", credits=4)
    rig.ask("a", 1, mapping_id=name)
    assert rig.got("a", m.MappingWanted) == [m.MappingWanted(name)]
    assert rig.got("w", m.Request) == []
    rig.from_client("a", offer)
    rig.ask("a", 2, mapping_id=name)
    kinds = [type(message).__name__ for message in rig.got("w")]
    assert kinds == ["MappingOffer", "Request", "Request"]


def test_two_jobs_with_different_mappings_share_a_worker(rig: Rig) -> None:
    one, two = mapping_offer(1, 5), mapping_offer(2, 6)
    rig.worker("w", credits=2)
    for name, offer in (("a", one), ("b", two)):
        rig.client(name, job=name)
        rig.ask(name, 1, mapping_id=offer.message.mapping_id)
        rig.from_client(name, offer)
    assert rig.requests("w") == ["a#1", "b#1"]


def test_a_mapping_under_a_false_name_is_not_believed(rig: Rig) -> None:
    right, wrong = mapping_offer(1, 5), mapping_offer(2, 6)
    rig.client("a")
    rig.worker("w")
    rig.ask("a", 1, mapping_id=right.message.mapping_id)
    forged = m.MappingOffer(right.message.mapping_id, 64, wrong.message.manifest)
    from broker.protocol import encode

    rig.from_client("a", encode(forged, wrong.payload))
    assert rig.requests("w") == []
    assert "false_mapping" in rig.logs


def test_a_worker_that_forgot_a_mapping_is_told_again(rig: Rig) -> None:
    offer = mapping_offer(1, 5)
    rig.client("a")
    rig.worker("w")
    rig.from_client("a", offer)
    one = rig.ask("a", 1, mapping_id=offer.message.mapping_id)
    rig.got("w")
    rig.fail("w", one, "unknown_mapping")
    kinds = [type(message).__name__ for message in rig.got("w")]
    assert kinds == ["MappingOffer", "Request"]
    assert rig.got("a", m.Failure) == []


# -- restart ------------------------------------------------------------------------------------


def test_a_restarted_broker_learns_everything_from_its_peers() -> None:
    offer = mapping_offer(1, 5)
    rig = Rig()  # the new broker; a#1 is still computed by w, which the old one had given it to
    one = m.RequestId("a", 1, 1)
    rig.worker("w", held=(one,), credits=1)
    rig.client("a")
    rig.ask("a", 1, mapping_id=offer.message.mapping_id)
    rig.ask("a", 2, mapping_id=offer.message.mapping_id)
    assert rig.got("w", m.Request) == []  # no second forward of a#1, no credit for a#2
    rig.from_client("a", offer)
    rig.reply("w", one)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]
    assert rig.requests("w") == ["a#2"]


def test_a_result_from_before_the_restart_is_kept_until_its_client_asks_again() -> None:
    rig = Rig()
    one = m.RequestId("a", 1, 1)
    rig.worker("w", held=(one,))
    rig.reply("w", one)
    rig.client("a")
    rig.ask("a", 1)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]
    assert rig.requests("w") == []


def test_what_a_returning_worker_held_is_dropped_when_it_dies_and_nobody_asked() -> None:
    rig = Rig()
    rig.worker("w", held=(m.RequestId("a", 1, 1),))
    rig.cut(WORKER, "w")
    assert not rig.core.entries
    assert not rig.core.pools


def test_an_answer_is_not_held_for_ever_for_a_client_that_never_takes_it(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.reply("w", rig.ask("a", 1))  # the acknowledgement is lost on its way
    rig.pass_time(59.0, (CLIENT, "a"), (WORKER, "w"))
    assert len(rig.core.answers) == 1
    rig.pass_time(61.0, (CLIENT, "a"), (WORKER, "w"))
    assert len(rig.core.answers) == 0


def test_a_damaged_answer_costs_neither_the_request_nor_the_credit(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.got("w")
    rig.garbage(WORKER, "w")  # it was the answer, and the worker has forgotten the request
    assert [type(message) for message in rig.got("w")] == [m.HelloWanted]
    rig.worker("w")
    assert rig.requests("w") == ["a#1"]
    rig.reply("w", one)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]


def test_a_cancel_of_before_does_not_end_what_a_client_that_came_back_asks(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w", credits=2)
    one = rig.ask("a", 1)
    rig.pass_time(6.0, (WORKER, "w"))  # the client is silent, and its requests are dropped
    assert m.Cancel(one) in rig.got("w")
    rig.client("a", connection="a again")
    rig.ask("a", 1, connection="a again")
    rig.fail("w", one, "cancelled")
    assert rig.requests("w") == ["a#1", "a#1"]
    rig.reply("w", one)
    assert [reply.id for reply in rig.got("a again", m.Reply)] == [one]


def test_workers_that_leave_in_good_order_are_not_held_against_their_requests(rig: Rig) -> None:
    rig.client("a")
    one = rig.ask("a", 1)
    for name in ("w1", "w2", "w3"):
        rig.worker(name)
        assert rig.requests(name) == ["a#1"]
        rig.from_worker(name, m.Goodbye("drained, 1 requests given back"))
    rig.worker("w4")
    rig.reply("w4", one)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]


def test_a_worker_that_reconnects_is_alive_and_not_held_against_its_requests(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    for _ in range(3):  # each time the request is damaged on its way
        assert rig.requests("w") == ["a#1"]
        rig.worker("w")
    rig.reply("w", one)
    assert [reply.id for reply in rig.got("a", m.Reply)] == [one]


def test_a_mapping_that_no_store_can_keep_is_an_error_and_not_asked_for_for_ever() -> None:
    rig = Rig(held_mapping_bytes=100)
    rig.client("a")
    rig.worker("w")
    offer = mapping_offer(1, 5)
    assert isinstance(offer.message, m.MappingOffer)
    rig.ask("a", 1, mapping_id=offer.message.mapping_id)
    rig.from_client("a", offer)
    got = rig.got("a")
    assert [type(message) for message in got] == [m.Welcome, m.MappingWanted, m.Failure]
    assert isinstance(got[-1], m.Failure)
    assert (got[-1].code, "keeps 100" in got[-1].text) == ("too_large", True)


def test_a_pool_ends_with_the_last_request_that_waited_for_it(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    one = rig.ask("a", 1)
    rig.cut(WORKER, "w")
    rig.from_client("a", m.Cancel(one))
    rig.pass_time(6.0, (CLIENT, "a"))
    assert not rig.core.pools
    rig.worker("w2", description=model(fingerprint="f1"))  # a new release of the model
    assert isinstance(rig.got("w2")[0], m.Welcome)


def test_a_request_that_a_worker_brought_along_keeps_the_time_its_client_gives(rig: Rig) -> None:
    rig.client("a")
    one = m.RequestId("a", 1, 1)
    rig.worker("w", held=(one,))
    rig.ask("a", 1, ttl_s=60.0)
    rig.pass_time(30.0, (CLIENT, "a"), (WORKER, "w"))
    assert not rig.got("a", m.Failure)


# -- to look at ---------------------------------------------------------------------------------


def test_the_snapshot_shows_who_is_there_and_what_waits(rig: Rig) -> None:
    rig.client("a")
    rig.worker("w")
    rig.ask("a", 1)
    rig.ask("a", 2)
    shown = snapshot(rig.core, rig.now)
    assert shown["requests"] == {
        "running": 1,
        "queued": 1,
        "without_worker": 0,
        "without_mapping": 0,
    }
    assert [(w["worker"], w["state"]) for w in shown["workers"]] == [("w", "busy")]
    assert [(c["client"], c["requests"]) for c in shown["clients"]] == [("a", 2)]


@pytest.mark.parametrize("field", ["window", "heartbeat_s", "liveness_s", "max_losses"])
def test_a_config_value_of_zero_is_an_error(field: str) -> None:
    with pytest.raises(ValueError, match=f"{field} must be above 0, got 0"):
        BrokerConfig(**{field: 0})


def test_liveness_below_two_heartbeats_is_an_error() -> None:
    with pytest.raises(ValueError, match="at least twice heartbeat_s"):
        BrokerConfig(heartbeat_s=3.0, liveness_s=5.0)
