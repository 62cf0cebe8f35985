"""The trainer client as a state machine: its unfinished requests, and where each of them stands.

It keeps every request until its answer is in the caller's hands, and trusts neither that an answer
comes once nor that answers come in order. A request goes out when a broker's window has room;
otherwise it waits here, not in the broker.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
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
class Received:
    """A direct transfer ended: ``tensors`` are its own, or None, and ``error`` says why."""

    id: m.RequestId
    tensors: Any
    error: str = ""


@dataclass(frozen=True)
class KeepMapping:
    """A vocab mapping to offer to whichever broker asks for it."""

    packet: Packet


Event = Union[  # noqa: UP007
    Connected, Disconnected, Arrived, Submit, CancelRequest, Received, KeepMapping, Tick
]


@dataclass(frozen=True)
class Deliver:
    """The answer, verified: hand it to the caller. The times are on the core's clock."""

    id: m.RequestId
    packet: Packet
    request: m.Request
    submitted_at: float
    #: when it was first sent
    sent_at: float
    arrived_at: float
    #: those that came directly
    tensors: Any = None


@dataclass(frozen=True)
class ReceiveDirectly:
    """Receive the tensors of this reply; an end of it is told by :class:`Received`.

    Also for replies that nobody waits for any more, so that the two ends stay in step.
    """

    reply: m.Reply


@dataclass(frozen=True)
class JoinChannel:
    """A worker invites this client to a direct channel."""

    worker: str
    invitation: m.Invitation


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


Action = Union[  # noqa: UP007
    SendTo, Reopen, Deliver, ReceiveDirectly, JoinChannel, Fail, Log
]


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

    #: the id that the caller knows; the packet has another after a direct transfer failed
    id: m.RequestId
    packet: Packet
    submitted_at: float
    deadline: float
    #: which broker has it; None while it waits for a window
    endpoint: str | None = None
    sent_at: float = 0.0
    resend_at: float = 0.0
    resend_wait_s: float = 0.0
    sends: int = 0
    #: the reply whose tensors are coming directly
    reply: Packet | None = None
    story: list[str] = field(default_factory=list)

    @property
    def request(self) -> m.Request:
        assert isinstance(self.packet.message, m.Request)
        return self.packet.message

    def take_the_wire(self, **changes: Any) -> None:
        """Have the packet ask for an answer on the wire, if it does not yet."""
        if self.request.direct is not None or changes:
            request = replace(self.request, direct=None, **changes)
            self.packet = encode(request, self.packet.payload)


#: What a client counts, since it began.
COUNTERS: Mapping[str, str] = {
    "requests": "Requests submitted.",
    "replies": "Replies delivered.",
    "reply_bytes": "Bytes of these replies.",
    "failures": "Requests that ended without a result.",
    "resends": "Requests sent again.",
    "duplicates": "Answers dropped because their request had already ended.",
    "damaged": "Replies dropped because a checksum was wrong.",
    "direct": "Replies whose tensors came directly.",
    "direct_failed": "Direct transfers that failed; their requests were asked again by wire.",
}


class ClientCore:
    """One client in one life (``incarnation``), linked to one or several brokers.

    ``note`` makes the line about its direct channels that heartbeats carry.
    """

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
        note: Callable[[], str] = str,
    ) -> None:
        self.client = client
        self.incarnation = incarnation
        self.config = config or ClientConfig()
        hello = m.ClientHello(client, incarnation, job or client, rank)
        self.links = {endpoint: Link(endpoint, lambda: hello, now, note) for endpoint in endpoints}
        self._numbers = itertools.count(1)
        #: every unfinished request, in order of submission
        self.tickets: OrderedDict[m.RequestId, _Ticket] = OrderedDict()
        #: those that no broker has, to be sent in order; a subset of the tickets
        self.waiting: OrderedDict[m.RequestId, None] = OrderedDict()
        self.in_flight: dict[str, set[m.RequestId]] = {endpoint: set() for endpoint in self.links}
        #: those that are answered and whose tensors are coming directly; a subset of the tickets
        self.receiving: set[m.RequestId] = set()
        self.mappings: dict[str, Packet] = {}
        #: model -> fingerprint and aux layer ids of its first reply; later ones must have the same
        self.identities: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.counters = dict.fromkeys(COUNTERS, 0)
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
        elif isinstance(event, Received):
            self._received(event, now)
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

    def new_id(self) -> m.RequestId:
        """An id that no request had before; from any thread."""
        return m.RequestId(self.client, self.incarnation, next(self._numbers))

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
        assert isinstance(event.packet.message, m.Request)
        ticket = _Ticket(event.packet.message.id, event.packet, now, event.deadline)
        if not self.tickets:
            self._noticed_at = now
        self.tickets[ticket.id] = ticket
        self.waiting[ticket.id] = None
        self.counters["requests"] += 1
        self._fail_if_refused()

    def _cancel(self, request_id: m.RequestId) -> None:
        asked = [asked for asked, ticket in self.tickets.items() if ticket.id == request_id]
        for request_id in asked:
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
        elif isinstance(message, m.RequestWanted):
            if message.id in self.in_flight[link.endpoint]:
                self.tickets[message.id].resend_at = now
            else:
                self._send(link.endpoint, m.Cancel(message.id))
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
        if isinstance(answer, m.Reply):
            self._direct(answer)
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
            if answer.transfer is not None:
                self._await_tensors(ticket, packet)
            else:
                self._deliver(answer.id, packet, now)

    def _deliver(
        self, request_id: m.RequestId, packet: Packet, now: float, tensors: Any = None
    ) -> None:
        ticket = self._finish(request_id)
        assert ticket is not None
        assert isinstance(packet.message, m.Reply)
        self.counters["replies"] += 1
        self.counters["reply_bytes"] += sum(spec.nbytes for spec in packet.message.manifest)
        times = (ticket.submitted_at, ticket.sent_at, now)
        self._actions.append(Deliver(ticket.id, packet, ticket.request, *times, tensors))

    # -- direct transfers -----------------------------------------------------------------------

    def _direct(self, reply: m.Reply) -> None:
        if reply.invitation is not None:
            self._actions.append(JoinChannel(reply.worker, reply.invitation))
        if reply.transfer is not None:
            self._actions.append(ReceiveDirectly(reply))

    def _await_tensors(self, ticket: _Ticket, packet: Packet) -> None:
        """The broker is done with the request; what is missing comes from the worker."""
        request_id = ticket.request.id
        self._let_go(request_id, ticket)
        self.receiving.add(request_id)
        ticket.endpoint, ticket.reply = None, packet

    def _received(self, event: Received, now: float) -> None:
        if event.id not in self.receiving:
            return  # cancelled, expired, answered by wire meanwhile, or told twice
        ticket = self.tickets[event.id]
        reply = ticket.reply
        assert reply is not None
        if event.tensors is not None:
            self.counters["direct"] += 1
            self._deliver(event.id, reply, now, event.tensors)
        else:
            self._ask_by_wire(event.id, ticket, reply, event.error)

    def _ask_by_wire(
        self, request_id: m.RequestId, ticket: _Ticket, reply: Packet, why: str
    ) -> None:
        """Ask anew, under a new id, so that nothing of the old transfer can answer it."""
        assert isinstance(reply.message, m.Reply)
        worker = reply.message.worker
        self.counters["direct_failed"] += 1
        self._log("warning", "direct_failed", request=str(request_id), worker=worker, why=why)
        ticket.story.append(f"the direct transfer from worker {worker} failed: {why}")
        self._finish(request_id)
        asked, ticket.reply = self.new_id(), None
        ticket.take_the_wire(id=asked, avoid=worker)
        self.tickets[asked] = ticket
        self.waiting[asked] = None
        self.waiting.move_to_end(asked, last=False)

    def _failed(self, link: Link, ticket: _Ticket, failure: m.Failure, now: float) -> None:
        if failure.code == "damaged":
            self.counters["damaged"] += 1
            ticket.story.append(f"the request was damaged on its way: {failure.text}")
            ticket.resend_at = now
        elif failure.code != "over_window":
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
                ticket.take_the_wire()
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
                ticket.take_the_wire()
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
        ticket.sent_at = ticket.sent_at if ticket.sends else now
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
        if ticket.reply is not None:
            where = "its answer came, and its tensors were still on their direct way"
        elif ticket.sends:
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
        ticket = self._finish(request_id)
        assert ticket is not None
        self.counters["failures"] += 1
        self._actions.append(Fail(ticket.id, code, text))

    def _finish(self, request_id: m.RequestId) -> _Ticket | None:
        ticket = self.tickets.pop(request_id, None)
        if ticket is not None:
            self._let_go(request_id, ticket)
        return ticket

    def _let_go(self, request_id: m.RequestId, ticket: _Ticket) -> None:
        """Take a ticket out of wherever it stands."""
        self.waiting.pop(request_id, None)
        self.receiving.discard(request_id)
        if ticket.endpoint is not None:
            self.in_flight[ticket.endpoint].discard(request_id)

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
        places = [*flying_ids, *self.waiting, *self.receiving]
        assert len(places) == len(set(places)) == len(self.tickets)
        assert set(places) == set(self.tickets)
        for request_id, ticket in self.tickets.items():
            assert ticket.request.id == request_id
            assert (ticket.reply is not None) == (request_id in self.receiving)


def _damage(packet: Packet) -> str:
    try:
        packet.verify()
    except RemoteProtocolError as error:
        return str(error)
    return ""
