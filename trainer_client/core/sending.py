"""When requests go out: as windows allow, again when they are overdue, elsewhere when need be."""

from __future__ import annotations

from broker.peer.link import LinkState, SendTo
from broker.protocol import messages as m
from trainer_client.core.ledger import Ledger, Ticket
from trainer_client.core.places import Place
from trainer_client.core.trouble import trouble


class Sending:
    """Says which broker has which request."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def fail_over(self) -> None:
        """Send the requests of a lost broker to another one; without another, they wait."""
        ready = any(link.ready for link in self._ledger.links.values())
        for endpoint, link in self._ledger.links.items():
            if link.ready or not self._ledger.in_flight[endpoint]:
                continue
            if not ready and link.state is not LinkState.REFUSED:
                continue
            for request_id in sorted(
                self._ledger.in_flight[endpoint],
                key=lambda request_id: request_id.number,
                reverse=True,
            ):
                ticket = self._ledger.tickets[request_id]
                ticket.take_the_wire()
                ticket.story.append(f"lost the broker at {endpoint}")
                self._ledger.moved_away[endpoint].add(request_id)
                self._ledger.move(ticket, Place.WAITING, first=True)

    def resend_overdue(self, now: float) -> None:
        """Send requests again that waited long for an answer; end those past their deadline."""
        for request_id, ticket in list(self._ledger.tickets.items()):
            if now >= ticket.deadline:
                self._expire(request_id, ticket, now)
            elif (
                ticket.endpoint is not None
                and now >= ticket.resend_at
                and self._ledger.links[ticket.endpoint].ready
            ):
                self._ledger.counters["resends"] += 1
                ticket.take_the_wire()
                self._dispatch(ticket, ticket.endpoint, now)

    def pump(self, now: float) -> None:
        """Send waiting requests to the broker with the most room, as far as windows allow."""
        ledger = self._ledger
        room = {
            endpoint: free
            for endpoint, link in ledger.links.items()
            if link.ready and (free := link.window - len(ledger.in_flight[endpoint])) > 0
        }
        for request_id in list(ledger.waiting) if room else ():
            ticket = ledger.tickets[request_id]
            offer = ticket.request.offer
            fitting = [endpoint for endpoint in room if ledger.links[endpoint].may_serve(offer)]
            endpoint = max(fitting, key=lambda endpoint: room[endpoint], default=None)
            if endpoint is None:
                continue
            ledger.move(ticket, Place.IN_FLIGHT, endpoint=endpoint)
            self._dispatch(ticket, endpoint, now)
            room[endpoint] -= 1
            if not room[endpoint]:
                del room[endpoint]
            if not room:
                return

    def _dispatch(self, ticket: Ticket, endpoint: str, now: float) -> None:
        ticket.sent_at = ticket.sent_at if ticket.sends else now
        ticket.sends += 1
        if ticket.endpoint != endpoint:
            ticket.endpoint, ticket.resend_wait_s = endpoint, self._ledger.config.resend_s
        ticket.resend_at = now + ticket.resend_wait_s
        ticket.resend_wait_s = min(2 * ticket.resend_wait_s, self._ledger.config.resend_max_s)
        self._ledger.act(SendTo(endpoint, ticket.packet))

    def _expire(self, request_id: m.RequestId, ticket: Ticket, now: float) -> None:
        waited = now - ticket.submitted_at
        where = "it was never sent, for no broker had room"
        if ticket.reply is not None:
            where = "its answer came, and its tensors were still on their direct way"
        elif ticket.arriving is not None:
            here, parts = ticket.arriving.taken, ticket.arriving.reply.parts
            where = f"its answer was coming, {here} of {parts} parts of it were here"
        elif ticket.sends:
            where = f"it was sent {ticket.sends} time(s), last to {ticket.endpoint}"
        causes = [trouble(link, now, ticket.request.offer) for link in self._ledger.links.values()]
        story = "; ".join([where, *ticket.story, *(cause for cause in causes if cause)])
        if ticket.endpoint is not None and self._ledger.links[ticket.endpoint].ready:
            self._ledger.send(ticket.endpoint, m.Cancel(request_id))
        self._ledger.fail(request_id, "deadline", f"no answer within {waited:.1f} s: {story}")
