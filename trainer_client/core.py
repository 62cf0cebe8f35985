"""The trainer client as a state machine: its unfinished requests, and where each of them stands.

It keeps every request until its answer is in the caller's hands, and trusts neither that an answer
comes once nor that answers come in order. A request goes out when a broker's window has room;
otherwise it waits here, not in the broker.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Union

from broker.protocol import Packet, RemoteProtocolError, encode, payload_hash
from broker.protocol import messages as m
from broker.protocol.link import (
    Arrived,
    Connected,
    Disconnected,
    Link,
    LinkState,
    Reopen,
    SendTo,
    Tick,
)


@dataclass(frozen=True)
class Submit:
    """A new request. ``deadline`` is on the core's clock."""

    packet: Packet
    deadline: float


@dataclass(frozen=True)
class CancelRequest:
    """Nobody wants this request any more."""

    id: m.RequestId


@dataclass(frozen=True)
class KeepMapping:
    """A vocab mapping to offer to whichever broker asks for it."""

    packet: Packet


Event = Union[  # noqa: UP007
    Connected, Disconnected, Arrived, Submit, CancelRequest, KeepMapping, Tick
]


@dataclass(frozen=True)
class Deliver:
    """The answer, verified: hand it to the caller."""

    id: m.RequestId
    packet: Packet


@dataclass(frozen=True)
class Fail:
    """The request ended without a result. ``code`` is a failure code, or one of the client's own:
    ``deadline``, ``refused``, ``identity``.
    """

    id: m.RequestId
    code: str
    text: str


@dataclass(frozen=True)
class Log:
    """Something the user may want to know."""

    level: str
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)


Action = Union[SendTo, Reopen, Deliver, Fail, Log]  # noqa: UP007


@dataclass(frozen=True)
class ClientConfig:
    """How patient a client is, each default with its reason."""

    #: A request unanswered for so long is sent again; a lost connection resends at once, so this
    #: covers only what vanishes without one. Doubled after each resend.
    resend_s: float = 5.0
    #: Resends are small and cost a broker that knows the request nothing.
    resend_max_s: float = 30.0
    #: Silence about a missing broker or worker for so long; a restart takes less.
    notice_s: float = 3.0
    #: And how often it is repeated.
    notice_again_s: float = 30.0

    def __post_init__(self) -> None:
        for name in ("resend_s", "resend_max_s", "notice_s", "notice_again_s"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")


@dataclass(eq=False)
class _Ticket:
    """One unfinished request."""

    packet: Packet
    submitted_at: float
    deadline: float
    #: which broker has it; None while it waits for a window
    endpoint: str | None = None
    resend_at: float = 0.0
    resend_wait_s: float = 0.0
    sends: int = 0
    story: list[str] = field(default_factory=list)

    @property
    def request(self) -> m.Request:
        assert isinstance(self.packet.message, m.Request)
        return self.packet.message


class ClientCore:
    """One client in one life (``incarnation``), linked to one or several brokers."""

    def __init__(
        self,
        client: str,
        incarnation: int,
        endpoints: Iterable[str],
        now: float,
        *,
        job: str = "",
        rank: int = 0,
        config: ClientConfig | None = None,
    ) -> None:
        self.client = client
        self.incarnation = incarnation
        self.config = config or ClientConfig()
        hello = m.ClientHello(client, incarnation, job or client, rank)
        self.links = {endpoint: Link(endpoint, lambda: hello, now) for endpoint in endpoints}
        #: every unfinished request, in order of submission
        self.tickets: OrderedDict[m.RequestId, _Ticket] = OrderedDict()
        #: those that no broker has, to be sent in order; a subset of the tickets
        self.waiting: OrderedDict[m.RequestId, None] = OrderedDict()
        self.in_flight: dict[str, set[m.RequestId]] = {endpoint: set() for endpoint in self.links}
        self.mappings: dict[str, Packet] = {}
        #: model -> fingerprint and aux layer ids of its first reply; later ones must have the same
        self.identities: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.counters = dict.fromkeys(
            ("requests", "replies", "failures", "resends", "duplicates", "damaged"), 0
        )
        self._noticed_at = now
        self._actions: list[Action] = []

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; say what to send and deliver. ``now`` is monotonic seconds."""
        self._actions = []
        if isinstance(event, Arrived):
            self._arrived(self.links[event.endpoint], event.packet, now)
        elif isinstance(event, Submit):
            self._submit(event, now)
        elif isinstance(event, CancelRequest):
            self._cancel(event.id)
        elif isinstance(event, KeepMapping):
            assert isinstance(event.packet.message, m.MappingOffer)
            self.mappings[event.packet.message.mapping_id] = event.packet
        elif isinstance(event, Connected):
            self._actions += self.links[event.endpoint].connected(now)
        elif isinstance(event, Disconnected):
            self._actions += self.links[event.endpoint].disconnected(now, event.why)
        for link in self.links.values():
            self._actions += link.tick(now)
        self._fail_over()
        self._resend_overdue(now)
        self._pump(now)
        self._notice(now)
        return self._actions

    def goodbye(self) -> list[Action]:
        """Tell the brokers that this client leaves."""
        return [action for link in self.links.values() for action in link.goodbye("closed")]

    @property
    def next_timer(self) -> float | None:
        """When :class:`Tick` should come at the latest."""
        timers = [link.next_timer for link in self.links.values()]
        for ticket in self.tickets.values():
            timers.append(ticket.deadline)
            if ticket.endpoint is not None and self.links[ticket.endpoint].ready:
                timers.append(ticket.resend_at)
        if self.tickets:
            timers.append(self._noticed_at + self.config.notice_s)
        return min((timer for timer in timers if timer is not None), default=None)

    # -- from the caller ------------------------------------------------------------------------

    def _submit(self, event: Submit, now: float) -> None:
        ticket = _Ticket(event.packet, now, event.deadline)
        if not self.tickets:
            self._noticed_at = now
        self.tickets[ticket.request.id] = ticket
        self.waiting[ticket.request.id] = None
        self.counters["requests"] += 1
        self._fail_if_refused()

    def _cancel(self, request_id: m.RequestId) -> None:
        ticket = self._finish(request_id)
        if ticket is not None and ticket.endpoint and self.links[ticket.endpoint].ready:
            self._send(ticket.endpoint, m.Cancel(request_id))

    # -- from the broker ------------------------------------------------------------------------

    def _arrived(self, link: Link, packet: Packet, now: float) -> None:
        message = packet.message
        was_ready = link.ready
        self._actions += link.received(message, now)
        if isinstance(message, (m.Reply, m.Failure)):
            self._answered(link, packet, now)
        elif isinstance(message, m.MappingWanted):
            self._offer(link, message.mapping_id)
        elif isinstance(message, m.Refused):
            self._log("error", "refused", endpoint=link.endpoint, text=message.text)
            self._fail_if_refused()
        if link.ready and not was_ready:
            self._log("debug", "welcomed", endpoint=link.endpoint, broker=link.broker)
            for request_id in self.in_flight[link.endpoint]:
                self.tickets[request_id].resend_at = now  # the new connection knows nothing of it

    def _answered(self, link: Link, packet: Packet, now: float) -> None:
        answer = packet.message
        assert isinstance(answer, (m.Reply, m.Failure))
        ticket = self.tickets.get(answer.id)
        self._send(link.endpoint, m.Received((answer.id,)))
        if ticket is None:
            self.counters["duplicates"] += 1
        elif isinstance(answer, m.Failure):
            self._failed(link, ticket, answer, now)
        elif damage := _damage(packet):
            self.counters["damaged"] += 1
            ticket.story.append(f"a damaged reply was dropped: {damage}")
            self._log("warning", "damaged_reply", request=str(answer.id), text=damage)
            ticket.resend_at = now
        elif stranger := self._stranger(ticket.packet, answer):
            self._fail(answer.id, "identity", stranger)
        else:
            self.identities.setdefault(answer.model, (answer.fingerprint, answer.aux_layer_ids))
            self.counters["replies"] += 1
            self._finish(answer.id)
            self._actions.append(Deliver(answer.id, packet))

    def _failed(self, link: Link, ticket: _Ticket, failure: m.Failure, now: float) -> None:
        if failure.code != "over_window":
            self._fail(failure.id, failure.code, failure.text)
        elif ticket.endpoint == link.endpoint:
            ticket.story.append(f"broker {link.broker}: {failure.text}")
            ticket.resend_at = now + link.heartbeat_s

    def _stranger(self, packet: Packet, reply: m.Reply) -> str:
        """Why a reply is not the one to this request, or nothing."""
        request = packet.message
        assert isinstance(request, m.Request)
        first = self.identities.get(reply.model, (reply.fingerprint, reply.aux_layer_ids))
        expected = {
            "tokens_hash": (payload_hash(packet), reply.tokens_hash),
            "mapping_id": (request.mapping_id, reply.mapping_id),
            "encoding": (request.encoding, reply.encoding),
            "model": (request.model or reply.model, reply.model),
            "fingerprint": (first[0], reply.fingerprint),
            "aux_layer_ids": (first[1], reply.aux_layer_ids),
        }
        wrong = [
            f"{name} is {got!r} where {wanted!r} was expected"
            for name, (wanted, got) in expected.items()
            if wanted != got
        ]
        if not wrong:
            return ""
        return f"worker {reply.worker} sent a reply that is not ours: {'; '.join(wrong)}"

    def _offer(self, link: Link, mapping_id: str) -> None:
        packet = self.mappings.get(mapping_id)
        if packet is None:
            self._log("warning", "unknown_mapping_wanted", mapping=mapping_id)
        elif link.ready:
            self._actions.append(SendTo(link.endpoint, packet))

    # -- sending --------------------------------------------------------------------------------

    def _fail_over(self) -> None:
        """What a lost broker had goes to the others, if one of them is there; else it waits."""
        ready = any(link.ready for link in self.links.values())
        for endpoint, link in self.links.items():
            if link.ready or not self.in_flight[endpoint]:
                continue
            if not ready and link.state is not LinkState.REFUSED:
                continue
            for request_id in sorted(
                self.in_flight[endpoint], key=lambda request_id: request_id.number, reverse=True
            ):
                ticket = self.tickets[request_id]
                ticket.endpoint = None
                ticket.story.append(f"lost the broker at {endpoint}")
                self.waiting[request_id] = None
                self.waiting.move_to_end(request_id, last=False)
            self.in_flight[endpoint].clear()

    def _resend_overdue(self, now: float) -> None:
        for request_id, ticket in list(self.tickets.items()):
            if now >= ticket.deadline:
                self._expire(request_id, ticket, now)
            elif (
                ticket.endpoint is not None
                and now >= ticket.resend_at
                and self.links[ticket.endpoint].ready
            ):
                self.counters["resends"] += 1
                self._dispatch(ticket, ticket.endpoint, now)

    def _pump(self, now: float) -> None:
        """Send what waits, as far as windows allow, to the broker with the most room."""
        while self.waiting:
            room = {
                endpoint: link.window - len(self.in_flight[endpoint])
                for endpoint, link in self.links.items()
                if link.ready
            }
            endpoint = max(room, key=lambda endpoint: room[endpoint], default=None)
            if endpoint is None or room[endpoint] <= 0:
                return
            request_id, _ = self.waiting.popitem(last=False)
            self.in_flight[endpoint].add(request_id)
            self._dispatch(self.tickets[request_id], endpoint, now)

    def _dispatch(self, ticket: _Ticket, endpoint: str, now: float) -> None:
        ticket.sends += 1
        if ticket.endpoint != endpoint:
            ticket.endpoint, ticket.resend_wait_s = endpoint, self.config.resend_s
        ticket.resend_at = now + ticket.resend_wait_s
        ticket.resend_wait_s = min(2 * ticket.resend_wait_s, self.config.resend_max_s)
        self._actions.append(SendTo(endpoint, ticket.packet))

    # -- endings --------------------------------------------------------------------------------

    def _expire(self, request_id: m.RequestId, ticket: _Ticket, now: float) -> None:
        waited = now - ticket.submitted_at
        where = "it was never sent, for no broker had room"
        if ticket.sends:
            where = f"it was sent {ticket.sends} time(s), last to {ticket.endpoint}"
        causes = [self._trouble(link, now) for link in self.links.values()]
        story = "; ".join([where, *ticket.story, *(cause for cause in causes if cause)])
        if ticket.endpoint is not None and self.links[ticket.endpoint].ready:
            self._send(ticket.endpoint, m.Cancel(request_id))
        self._fail(request_id, "deadline", f"no answer within {waited:.1f} s: {story}")

    def _fail_if_refused(self) -> None:
        if all(link.state is LinkState.REFUSED for link in self.links.values()):
            for request_id in list(self.tickets):
                refusals = [link.refusal.text for link in self.links.values() if link.refusal]
                self._fail(request_id, "refused", "; ".join(refusals))

    def _fail(self, request_id: m.RequestId, code: str, text: str) -> None:
        self._finish(request_id)
        self.counters["failures"] += 1
        self._actions.append(Fail(request_id, code, text))

    def _finish(self, request_id: m.RequestId) -> _Ticket | None:
        ticket = self.tickets.pop(request_id, None)
        self.waiting.pop(request_id, None)
        if ticket is not None and ticket.endpoint is not None:
            self.in_flight[ticket.endpoint].discard(request_id)
        return ticket

    # -- small things ---------------------------------------------------------------------------

    def _notice(self, now: float) -> None:
        """Say why nothing happens, after a few seconds of it, and go on waiting."""
        if not self.tickets or now < self._noticed_at + self.config.notice_s:
            return
        troubles = [self._trouble(link, now) for link in self.links.values()]
        if all(troubles):
            self._log("warning", "waiting", requests=len(self.tickets), why="; ".join(troubles))
            self._noticed_at = now + self.config.notice_again_s - self.config.notice_s
        else:
            self._noticed_at = now

    def _trouble(self, link: Link, now: float) -> str:
        if link.state is LinkState.REFUSED:
            return f"the broker at {link.endpoint} refused this client"
        if link.trouble:
            return link.trouble
        if not link.ready:
            down_s = now - link.down_since
            return f"no broker answers at {link.endpoint} ({down_s:.0f} s); is it running?"
        if link.workers == 0:
            return f"the broker at {link.endpoint} has no worker for this; start a draftmq worker"
        return ""

    def _send(self, endpoint: str, message: m.Message) -> None:
        if self.links[endpoint].ready:
            self._actions.append(SendTo(endpoint, encode(message)))

    def _log(self, level: str, event: str, **fields: Any) -> None:
        self._actions.append(Log(level, event, fields))

    def __repr__(self) -> str:
        ready = sum(link.ready for link in self.links.values())
        return (
            f"<Client {self.client} brokers={ready}/{len(self.links)} "
            f"in_flight={sum(map(len, self.in_flight.values()))} waiting={len(self.waiting)}>"
        )

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        for endpoint, flying in self.in_flight.items():
            link = self.links[endpoint]
            assert not link.ready or len(flying) <= link.window
            assert all(self.tickets[request_id].endpoint == endpoint for request_id in flying)
        flying_ids = [request_id for flying in self.in_flight.values() for request_id in flying]
        assert sorted(flying_ids, key=str) == sorted(set(flying_ids), key=str)
        assert {*flying_ids, *self.waiting} == set(self.tickets)
        assert not set(flying_ids) & set(self.waiting)


def _damage(packet: Packet) -> str:
    try:
        packet.verify()
    except RemoteProtocolError as error:
        return str(error)
    return ""
