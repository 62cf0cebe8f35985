"""All that the parts of a client's core share: its unfinished requests, and where each stands."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from broker.log_line import Log
from broker.peer.link import Link, LinkState, SendTo
from broker.peer.parts import Assembly
from broker.protocol import Packet, encode
from broker.protocol import messages as m
from trainer_client.core.config import ClientConfig
from trainer_client.core.events import Action, Fail
from trainer_client.core.places import TRANSITIONS, IllegalMoveError, Place


@dataclass
class Identity:
    """What does not change in a model's replies."""

    fingerprint: str
    #: of named wishes; empty until one was answered
    aux_layer_ids: tuple[int, ...] = ()


@dataclass(eq=False)
class Arriving:
    """A reply, and what has come of its payload: all at once, or in parts."""

    packet: Packet
    assembly: Assembly
    #: messages of it that are here
    taken: int = 0

    @property
    def reply(self) -> m.Reply:
        assert isinstance(self.packet.message, m.Reply)
        return self.packet.message


@dataclass(eq=False)
class Ticket:
    """One unfinished request."""

    #: the id that the caller knows; the packet has another after a direct transfer failed
    id: m.RequestId
    packet: Packet
    submitted_at: float
    deadline: float
    #: only :meth:`Ledger.move` writes it
    place: Place = Place.NEW
    #: which broker has it; None while it waits for a window
    endpoint: str | None = None
    sent_at: float = 0.0
    resend_at: float = 0.0
    resend_wait_s: float = 0.0
    sends: int = 0
    #: the reply whose tensors are coming directly
    reply: Packet | None = None
    #: the one whose parts are coming from the broker that has the request
    arriving: Arriving | None = None
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


class Ledger:
    """The client's records: links, tickets and counters. No finished request stands in them."""

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

        def hello_for(endpoint: str) -> Callable[[], m.ClientHello]:
            return lambda: m.ClientHello(
                client, incarnation, job or client, rank, self.links[endpoint].admission
            )

        self.links = {
            endpoint: Link(endpoint, hello_for(endpoint), now, note) for endpoint in endpoints
        }
        self._numbers = itertools.count(1)
        #: every unfinished request, in order of submission
        self.tickets: OrderedDict[m.RequestId, Ticket] = OrderedDict()
        #: those that no broker has, to be sent in order; a subset of the tickets
        self.waiting: OrderedDict[m.RequestId, None] = OrderedDict()
        self.in_flight: dict[str, set[m.RequestId]] = {endpoint: set() for endpoint in self.links}
        #: broker -> requests that it had when it was lost, and that went elsewhere; it is told so
        #: when it is back, since they may still wait there and take room
        self.moved_away: dict[str, set[m.RequestId]] = {endpoint: set() for endpoint in self.links}
        #: those that are answered and whose tensors are coming directly; a subset of the tickets
        self.receiving: set[m.RequestId] = set()
        self.mappings: dict[str, Packet] = {}
        #: model -> what its first reply said of it; later ones must say the same
        self.identities: dict[str, Identity] = {}
        self.counters = dict.fromkeys(COUNTERS, 0)
        #: since when there is something to be said if nothing happens
        self.noticed_at = now
        self._actions: list[Action] = []

    def new_id(self) -> m.RequestId:
        """An id that no request had before; from any thread."""
        return m.RequestId(self.client, self.incarnation, next(self._numbers))

    # -- endings ----------------------------------------------------------------------------------

    def fail(self, request_id: m.RequestId, code: str, text: str) -> None:
        """End a request without a result."""
        ticket = self.finish(request_id)
        assert ticket is not None
        self.counters["failures"] += 1
        self.act(Fail(ticket.id, code, text))

    def fail_if_refused(self) -> None:
        """End them all if no broker will have this client."""
        if all(link.state is LinkState.REFUSED for link in self.links.values()):
            for request_id in list(self.tickets):
                refusals = [link.refusal.text for link in self.links.values() if link.refusal]
                self.fail(request_id, "refused", "; ".join(refusals))

    def finish(self, request_id: m.RequestId) -> Ticket | None:
        """Take a request out of the books, if it is still there."""
        ticket = self.tickets.pop(request_id, None)
        if ticket is not None:
            self.move(ticket, Place.ENDED)
        return ticket

    def move(
        self, ticket: Ticket, to: Place, *, endpoint: str | None = None, first: bool = False
    ) -> None:
        """Take a ticket from its place to the next, the only writer of the containers below.

        ``endpoint`` is the broker that has it from now on; ``first`` puts it before all that wait.
        Raises :class:`IllegalMoveError` where the table has no such transition.
        """
        request_id = ticket.request.id
        if to not in TRANSITIONS[ticket.place]:
            raise IllegalMoveError(
                f"{request_id} cannot go from {ticket.place.name} to {to.name}; "
                + "; ".join(ticket.story)
            )
        self.waiting.pop(request_id, None)
        self.receiving.discard(request_id)
        stays = to in (Place.IN_FLIGHT, Place.ARRIVING) and endpoint is None
        if ticket.endpoint is not None and not stays:
            self.in_flight[ticket.endpoint].discard(request_id)
        if to is not Place.ARRIVING:
            ticket.arriving = None
        if to is Place.WAITING:
            self.waiting[request_id] = None
            self.waiting.move_to_end(request_id, last=not first)
        elif to is Place.RECEIVING:
            self.receiving.add(request_id)
        elif endpoint is not None:
            self.in_flight[endpoint].add(request_id)
        if to in (Place.WAITING, Place.RECEIVING):
            ticket.endpoint = None
        ticket.place = to

    # -- what is said -----------------------------------------------------------------------------

    def act(self, action: Action) -> None:
        """Have this done when the event has been taken."""
        self._actions.append(action)

    def take_actions(self) -> list[Action]:
        """What is to be done; it is handed out once."""
        actions, self._actions = self._actions, []
        return actions

    def send(self, endpoint: str, message: m.Message) -> None:
        if self.links[endpoint].ready:
            self.act(SendTo(endpoint, encode(message)))

    def log(self, level: str, event: str, **fields: Any) -> None:
        self.act(Log(level, event, fields))

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
            place = {
                request_id in self.waiting: Place.WAITING,
                request_id in self.receiving: Place.RECEIVING,
                request_id in flying_ids and ticket.arriving is None: Place.IN_FLIGHT,
                ticket.arriving is not None: Place.ARRIVING,
            }[True]
            assert ticket.place is place, f"{request_id} is {place}, it says {ticket.place}"
            if (arriving := ticket.arriving) is not None:
                assert ticket.endpoint is not None
                assert arriving.taken < arriving.reply.parts
