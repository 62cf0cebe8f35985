"""Planted bugs: each is one thing that a core could forget, and the simulation must find it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from broker.core import BrokerCore, fencing
from broker.core.clients import Clients
from broker.core.fencing import is_older
from broker.core.held import HeldAnswers
from broker.core.requests import Requests
from broker.peer.link import Link
from broker.protocol import encode
from broker.protocol import messages as m
from tests.sim.planting import (
    MUTATIONS,
    heard,
    hearing,
    instead,
    mutation,
    said,
    saying,
    with_message,
)
from trainer_client.core import ClientCore, Deliver, Submit
from trainer_client.core import answers as client_answers
from worker.core import Drain, Learn, WorkerCore

__all__ = ["MUTATIONS"]

# -- the broker ---------------------------------------------------------------------------------


@mutation
def broker_forgets_that_it_knows_a_resent_request() -> Iterator[None]:
    def other(_: Any) -> Any:
        return lambda self, entry, packet, client, now: self.route(entry, now)

    with instead(Requests, "_asked_again", other):
        yield


@mutation
def broker_forgets_to_requeue_what_a_lost_worker_had() -> Iterator[None]:
    with instead(Requests, "retry", lambda _: lambda self, *story: None):
        yield


@mutation
def broker_leaks_the_credit_of_a_failed_request() -> Iterator[None]:
    with hearing(
        BrokerCore,
        lambda core, event: (
            None if (f := heard(event, m.Failure)) and f.code == "cancelled" else event
        ),
    ):
        yield


@mutation
def broker_gives_a_worker_more_than_its_credits() -> Iterator[None]:
    def generous(core: Any, event: Any) -> Any:
        hello = heard(event, m.WorkerHello)
        return event if hello is None else with_message(event, credits=hello.credits + 1)

    with hearing(BrokerCore, generous):
        yield


def _accepts_stale(registry: str, hello: type, name: str) -> Iterator[None]:
    def as_new(core: Any, event: Any) -> Any:
        message = heard(event, hello)
        session = getattr(core, registry).get(getattr(message, name)) if message else None
        if session is None or not is_older(message, session, core.incarnation):
            return event
        return with_message(event, incarnation=session.incarnation)

    with hearing(BrokerCore, as_new):
        yield


@mutation
def broker_accepts_a_stale_client() -> Iterator[None]:
    yield from _accepts_stale("clients", m.ClientHello, "client")


@mutation
def broker_accepts_a_stale_worker() -> Iterator[None]:
    yield from _accepts_stale("workers", m.WorkerHello, "worker")


@mutation
def broker_takes_the_higher_incarnation_for_the_newer() -> Iterator[None]:
    def by_clock(_: Any) -> Any:
        return lambda hello, session, broker: hello.incarnation < session.incarnation

    with instead(fencing, "is_older", by_clock):
        yield


@mutation
def broker_takes_whoever_comes_last_for_the_newer() -> Iterator[None]:
    with instead(fencing, "is_older", lambda _: lambda hello, session, broker: False):
        yield


@mutation
def peers_forget_their_numbers() -> Iterator[None]:
    def unnumbered(core: Any, event: Any) -> Any:
        return with_message(event, number=0) if heard(event, m.Welcome) else event

    with hearing(ClientCore, unnumbered), hearing(WorkerCore, unnumbered):
        yield


@mutation
def broker_keeps_what_was_cancelled() -> Iterator[None]:
    with hearing(BrokerCore, lambda core, event: None if heard(event, m.Cancel) else event):
        yield


@mutation
def broker_answers_the_wrong_client() -> Iterator[None]:
    def astray(core: BrokerCore, action: Any) -> list[Any]:
        others = [c for c in core.client_connections if said(action, m.Reply)]
        return [replace(action, connection=max(others))] if others else [action]

    with saying(BrokerCore, astray):
        yield


@mutation
def broker_never_drops_a_held_answer() -> Iterator[None]:
    def deaf(core: BrokerCore, event: Any) -> Any:
        return None if heard(event, m.Received) else event

    with (
        hearing(BrokerCore, deaf),
        instead(HeldAnswers, "_let_go", lambda _: lambda self, now: None),
    ):
        yield


@mutation
def broker_forgets_to_tell_a_worker_the_mapping() -> Iterator[None]:
    def silent(core: BrokerCore, action: Any) -> list[Any]:
        return [] if said(action, m.MappingOffer) else [action]

    with saying(BrokerCore, silent):
        yield


@mutation
def broker_ignores_deadlines() -> Iterator[None]:
    def endless(core: BrokerCore, event: Any) -> Any:
        return with_message(event, ttl_s=1e9) if heard(event, m.Request) else event

    with hearing(BrokerCore, endless):
        yield


@mutation
def broker_watches_clients_that_have_left() -> Iterator[None]:
    def other(_: Any) -> Any:
        def watch(self: Any, client: Any) -> None:
            ledger = self._ledger
            ledger.at(
                client.last_seen + ledger.config.liveness_s,
                lambda now: ledger.at(now + 1.0, lambda now: watch(self, client)),
            )

        return watch

    with instead(Clients, "_watch", other):
        yield


@mutation
def broker_does_not_ask_strangers_for_a_hello() -> Iterator[None]:
    def silent(core: BrokerCore, action: Any) -> list[Any]:
        return [] if said(action, m.HelloWanted) else [action]

    with saying(BrokerCore, silent):
        yield


@mutation
def broker_forgets_a_reply_that_broke_off() -> Iterator[None]:
    with instead(Requests, "break_off", lambda _: lambda self, entry, why, now: None):
        yield


@mutation
def broker_goes_on_with_parts_for_a_client_that_was_away() -> Iterator[None]:
    with instead(Requests, "end_passing", lambda _: lambda self, client: None):
        yield


@mutation
def broker_passes_a_part_on_twice() -> Iterator[None]:
    with saying(
        BrokerCore,
        lambda core, action: [action, action] if said(action, m.Part) else [action],
    ):
        yield


# -- the worker ---------------------------------------------------------------------------------


@mutation
def worker_forgets_a_mapping() -> Iterator[None]:
    with saying(WorkerCore, lambda core, action: [] if isinstance(action, Learn) else [action]):
        yield


@mutation
def worker_that_drains_drops_what_it_holds() -> Iterator[None]:
    def forgetful(core: WorkerCore, event: Any) -> Any:
        if isinstance(event, Drain) and not core.computing:
            core.held.clear()
        elif isinstance(event, Drain):
            for request_id in [held for held in core.held if held not in core.computing]:
                del core.held[request_id]
        return event

    with hearing(WorkerCore, forgetful):
        yield


@mutation
def worker_answers_only_the_first_broker_that_asks() -> Iterator[None]:
    def other(_: Any) -> Any:
        return lambda self, held, link, request_id: None

    with instead(WorkerCore, "_asked_again", other):
        yield


@mutation
def worker_leaves_a_cancelled_request_unanswered() -> Iterator[None]:
    def silent(core: WorkerCore, action: Any) -> list[Any]:
        failure = said(action, m.Failure)
        return [] if failure and failure.code == "cancelled" else [action]

    with saying(WorkerCore, silent):
        yield


# -- the client ---------------------------------------------------------------------------------


@mutation
def client_delivers_twice() -> Iterator[None]:
    with saying(
        ClientCore,
        lambda core, action: [action, action] if isinstance(action, Deliver) else [action],
    ):
        yield


@mutation
def client_never_resends() -> Iterator[None]:
    sent: set[tuple[int, m.RequestId]] = set()

    def once(core: ClientCore, action: Any) -> list[Any]:
        request = said(action, m.Request)
        if request is None:
            return [action]
        if (id(core), request.id) in sent:
            return []
        sent.add((id(core), request.id))
        return [action]

    with saying(ClientCore, once):
        yield


@mutation
def client_ignores_its_window() -> Iterator[None]:
    def greedy(core: ClientCore, event: Any) -> Any:
        return with_message(event, window=1000) if heard(event, m.Welcome) else event

    with hearing(ClientCore, greedy):
        yield


@mutation
def client_ignores_deadlines() -> Iterator[None]:
    def patient(core: ClientCore, event: Any) -> Any:
        return replace(event, deadline=event.deadline + 5.0) if isinstance(event, Submit) else event

    with hearing(ClientCore, patient):
        yield


@mutation
def client_takes_damaged_tensors() -> Iterator[None]:
    def trusting(real: Any) -> Any:
        class Trusting(real):  # type: ignore[misc]
            def add(self, packet: Any) -> None:
                super().add(encode(packet.message, packet.payload))

        return Trusting

    with instead(client_answers, "Assembly", trusting):
        yield


@mutation
def client_does_not_acknowledge_answers() -> Iterator[None]:
    def silent(core: ClientCore, action: Any) -> list[Any]:
        return [] if said(action, m.Received) else [action]

    with (
        saying(ClientCore, silent),
        instead(HeldAnswers, "_let_go", lambda _: lambda self, now: None),
    ):
        yield


@mutation
def client_ignores_a_wanted_mapping() -> Iterator[None]:
    with hearing(ClientCore, lambda core, event: None if heard(event, m.MappingWanted) else event):
        yield


# -- both peers ---------------------------------------------------------------------------------


@mutation
def peers_do_not_beat_their_hearts() -> Iterator[None]:
    def other(real: Any) -> Any:
        def tick(self: Link, now: float) -> list[Any]:
            return [a for a in real(self, now) if not said(a, m.Heartbeat)]

        return tick

    with instead(Link, "tick", other):
        yield


@mutation
def peers_wait_for_ever_for_a_silent_broker() -> Iterator[None]:
    def other(real: Any) -> Any:
        def tick(self: Link, now: float) -> list[Any]:
            self.liveness_s = 1e9
            return list(real(self, now))

        return tick

    with instead(Link, "tick", other):
        yield
