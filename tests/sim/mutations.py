"""Planted bugs: each is one thing that a core could forget, and the simulation must find it.

Most change what goes into a core's ``handle`` or what comes out, so they outlive changes inside.
Those that replace a method fail at once when it is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from broker.core import BrokerCore, Received, Send
from broker.protocol import Packet, decode
from broker.protocol import messages as m
from broker.protocol.link import Arrived, Link, SendTo
from trainer_client import core as client_core
from trainer_client.core import ClientCore, Deliver, Submit
from worker.core import Drain, Learn, WorkerCore

Plant = Callable[[], AbstractContextManager[None]]
MUTATIONS: dict[str, Plant] = {}


def mutation(plant: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
    """Register a planted bug under its name."""
    MUTATIONS[plant.__name__] = contextlib.contextmanager(plant)
    return plant


@contextlib.contextmanager
def instead(owner: Any, name: str, other: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what ``other`` makes of it. Raises where there is none."""
    real = getattr(owner, name)
    setattr(owner, name, other(real))
    try:
        yield
    finally:
        setattr(owner, name, real)


def hearing(core: type, change: Callable[[Any, Any], Any]) -> AbstractContextManager[None]:
    """A core that is told ``change(core, event)`` instead; None is an event it ignores."""

    def other(handle: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, event: Any, now: float) -> Any:
            event = change(self, event)
            return handle(self, event, now) if event is not None else []

        return changed

    return instead(core, "handle", other)


def saying(core: type, change: Callable[[Any, Any], list[Any]]) -> AbstractContextManager[None]:
    """A core whose every action becomes those of ``change(core, action)``."""

    def other(handle: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, event: Any, now: float) -> Any:
            return [new for old in handle(self, event, now) for new in change(self, old)]

        return changed

    return instead(core, "handle", other)


def _heard(event: Any, *kinds: type) -> Any:
    """The message that an event brings, if it is one of these kinds."""
    if not isinstance(event, (Received, Arrived)):
        return None
    return event.packet.message if isinstance(event.packet.message, kinds) else None


def _said(action: Any, *kinds: type) -> Any:
    """The message that an action sends, if it is one of these kinds."""
    if isinstance(action, SendTo):
        message: Any = action.packet.message
    elif isinstance(action, Send):
        message = decode(action.frames).message
    else:
        return None
    return message if isinstance(message, kinds) else None


def _as(event: Any, **changes: Any) -> Any:
    """The event with another message in it."""
    message = replace(event.packet.message, **changes)
    packet = Packet(message, event.packet.frames, event.packet.checksums)
    return replace(event, packet=packet)


# -- the broker ---------------------------------------------------------------------------------


@mutation
def broker_forgets_that_it_knows_a_resent_request() -> Iterator[None]:
    def other(_: Any) -> Any:
        return lambda self, entry, packet, client, now: self._route(entry, now)

    with instead(BrokerCore, "_asked_again", other):
        yield


@mutation
def broker_forgets_to_requeue_what_a_lost_worker_had() -> Iterator[None]:
    with instead(BrokerCore, "_retry", lambda _: lambda self, *story: None):
        yield


@mutation
def broker_leaks_the_credit_of_a_failed_request() -> Iterator[None]:
    with hearing(
        BrokerCore,
        lambda core, event: (
            None if (f := _heard(event, m.Failure)) and f.code == "cancelled" else event
        ),
    ):
        yield


@mutation
def broker_gives_a_worker_more_than_its_credits() -> Iterator[None]:
    def generous(core: Any, event: Any) -> Any:
        hello = _heard(event, m.WorkerHello)
        return event if hello is None else _as(event, credits=hello.credits + 1)

    with hearing(BrokerCore, generous):
        yield


def _accepts_stale(registry: str, hello: type, name: str) -> Iterator[None]:
    def as_new(core: Any, event: Any) -> Any:
        message = _heard(event, hello)
        session = getattr(core, registry).get(getattr(message, name)) if message else None
        if session is None or session.incarnation <= message.incarnation:
            return event
        return _as(event, incarnation=session.incarnation)

    with hearing(BrokerCore, as_new):
        yield


@mutation
def broker_accepts_a_stale_client() -> Iterator[None]:
    yield from _accepts_stale("clients", m.ClientHello, "client")


@mutation
def broker_accepts_a_stale_worker() -> Iterator[None]:
    yield from _accepts_stale("workers", m.WorkerHello, "worker")


@mutation
def broker_keeps_what_was_cancelled() -> Iterator[None]:
    with hearing(BrokerCore, lambda core, event: None if _heard(event, m.Cancel) else event):
        yield


@mutation
def broker_answers_the_wrong_client() -> Iterator[None]:
    def astray(core: BrokerCore, action: Any) -> list[Any]:
        others = [c for c in core.client_connections if _said(action, m.Reply)]
        return [replace(action, connection=max(others))] if others else [action]

    with saying(BrokerCore, astray):
        yield


@mutation
def broker_never_drops_a_held_answer() -> Iterator[None]:
    def deaf(core: BrokerCore, event: Any) -> Any:
        return None if _heard(event, m.Received) else event

    with (
        hearing(BrokerCore, deaf),
        instead(BrokerCore, "_let_go", lambda _: lambda self, now: None),
    ):
        yield


@mutation
def broker_forgets_to_tell_a_worker_the_mapping() -> Iterator[None]:
    def silent(core: BrokerCore, action: Any) -> list[Any]:
        return [] if _said(action, m.MappingOffer) else [action]

    with saying(BrokerCore, silent):
        yield


@mutation
def broker_ignores_deadlines() -> Iterator[None]:
    def endless(core: BrokerCore, event: Any) -> Any:
        return _as(event, ttl_s=1e9) if _heard(event, m.Request) else event

    with hearing(BrokerCore, endless):
        yield


@mutation
def broker_watches_clients_that_have_left() -> Iterator[None]:
    def other(_: Any) -> Any:
        def watch(self: Any, client: Any) -> None:
            self._at(
                client.last_seen + self.config.liveness_s,
                lambda now: self._at(now + 1.0, lambda now: watch(self, client)),
            )

        return watch

    with instead(BrokerCore, "_watch_client", other):
        yield


@mutation
def broker_does_not_ask_strangers_for_a_hello() -> Iterator[None]:
    def silent(core: BrokerCore, action: Any) -> list[Any]:
        return [] if _said(action, m.HelloWanted) else [action]

    with saying(BrokerCore, silent):
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
            for request_id in [held for held in core.held if held != core.computing]:
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
        failure = _said(action, m.Failure)
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
        request = _said(action, m.Request)
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
        return _as(event, window=1000) if _heard(event, m.Welcome) else event

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
    with instead(client_core, "_damage", lambda _: lambda packet: ""):
        yield


@mutation
def client_does_not_acknowledge_answers() -> Iterator[None]:
    def silent(core: ClientCore, action: Any) -> list[Any]:
        return [] if _said(action, m.Received) else [action]

    with (
        saying(ClientCore, silent),
        instead(BrokerCore, "_let_go", lambda _: lambda self, now: None),
    ):
        yield


@mutation
def client_ignores_a_wanted_mapping() -> Iterator[None]:
    with hearing(ClientCore, lambda core, event: None if _heard(event, m.MappingWanted) else event):
        yield


# -- both peers ---------------------------------------------------------------------------------


@mutation
def peers_do_not_beat_their_hearts() -> Iterator[None]:
    def other(real: Any) -> Any:
        def tick(self: Link, now: float) -> list[Any]:
            return [a for a in real(self, now) if not _said(a, m.Heartbeat)]

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
