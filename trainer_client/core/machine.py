"""The trainer client as a state machine: ``handle(event, now) -> actions``.

It keeps every request until its answer is in the caller's hands, and trusts neither that an answer
comes once nor that answers come in order. A request goes out when a broker's window has room;
otherwise it waits here, not in the broker.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from broker.peer.link import Arrived, Connected, Disconnected, Link, SendTo, note_said
from broker.protocol import Packet
from broker.protocol import messages as m
from trainer_client.core.answers import Answers
from trainer_client.core.config import ClientConfig
from trainer_client.core.events import Action, CancelRequest, Event, KeepMapping, Received, Submit
from trainer_client.core.ledger import Ledger, Ticket
from trainer_client.core.places import Place
from trainer_client.core.sending import Sending
from trainer_client.core.trouble import trouble


class ClientCore(Ledger):
    """One client in one life (``incarnation``), linked to one or several brokers.

    :class:`Answers` knows what becomes of answers, and :class:`Sending` when requests go out.
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
        super().__init__(
            client, incarnation, endpoints, now, job=job, rank=rank, config=config, note=note
        )
        self._answers = Answers(self)
        self._sending = Sending(self)

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; say what to send and deliver. ``now`` is monotonic seconds."""
        if isinstance(event, Arrived):
            self._arrived(self.links[event.endpoint], event.packet, now)
        elif isinstance(event, Submit):
            self._submit(event, now)
        elif isinstance(event, CancelRequest):
            self._cancel(event.id)
        elif isinstance(event, Received):
            self._answers.received(event, now)
        elif isinstance(event, KeepMapping):
            assert isinstance(event.packet.message, m.MappingOffer)
            self.mappings[event.packet.message.mapping_id] = event.packet
        elif isinstance(event, Connected):
            self._actions += self.links[event.endpoint].connected(now)
        elif isinstance(event, Disconnected):
            self._actions += self.links[event.endpoint].disconnected(now, event.why)
        for link in self.links.values():
            self._actions += link.tick(now)
        self._sending.fail_over()
        self._sending.resend_overdue(now)
        self._sending.pump(now)
        self._notice(now)
        actions = self.take_actions()
        note_said(self.links, actions, now)
        return actions

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
            timers.append(self.noticed_at + self.config.notice_s)
        return min((timer for timer in timers if timer is not None), default=None)

    def _submit(self, event: Submit, now: float) -> None:
        assert isinstance(event.packet.message, m.Request)
        ticket = Ticket(event.packet.message.id, event.packet, now, event.deadline)
        if not self.tickets:
            self.noticed_at = now
        self.tickets[ticket.id] = ticket
        self.move(ticket, Place.WAITING)
        self.counters["requests"] += 1
        self.fail_if_refused()

    def _cancel(self, request_id: m.RequestId) -> None:
        asked = [asked for asked, ticket in self.tickets.items() if ticket.id == request_id]
        for request_id in asked:
            ticket = self.finish(request_id)
            if ticket is not None and ticket.endpoint and self.links[ticket.endpoint].ready:
                self.send(ticket.endpoint, m.Cancel(request_id))

    def _arrived(self, link: Link, packet: Packet, now: float) -> None:
        message = packet.message
        was_ready = link.ready
        self._actions += link.received(message, now)
        if isinstance(message, (m.Reply, m.Failure)):
            self._answers.answered(link, packet, now)
        elif isinstance(message, m.Part):
            self._answers.part(link, packet, now)
        elif isinstance(message, m.MappingWanted):
            self._offer(link, message.mapping_id)
        elif isinstance(message, m.RequestWanted):
            if message.id in self.in_flight[link.endpoint]:
                self.tickets[message.id].resend_at = now
            else:
                self.send(link.endpoint, m.Cancel(message.id))
        elif isinstance(message, m.Refused):
            self.log("error", "refused", endpoint=link.endpoint, text=message.text)
            self.fail_if_refused()
        if link.ready and not was_ready:
            self.log("debug", "welcomed", endpoint=link.endpoint, broker=link.broker)
            for request_id in sorted(self.moved_away[link.endpoint], key=lambda i: i.number):
                self.send(link.endpoint, m.Cancel(request_id))
            self.moved_away[link.endpoint].clear()
            for request_id in self.in_flight[link.endpoint]:
                ticket = self.tickets[request_id]  # the new connection knows nothing of it
                ticket.resend_at = now
                if ticket.place is Place.ARRIVING:
                    self.move(ticket, Place.IN_FLIGHT)
        if isinstance(message, m.Welcome):
            self._keep_within_window(link)

    def _keep_within_window(self, link: Link) -> None:
        """Another life of a broker may allow less than the last: the newest requests wait here."""
        flying = sorted(self.in_flight[link.endpoint], key=lambda request_id: request_id.number)
        for request_id in reversed(flying[link.window :]):
            self.move(self.tickets[request_id], Place.WAITING, first=True)

    def _offer(self, link: Link, mapping_id: str) -> None:
        packet = self.mappings.get(mapping_id)
        if packet is None:
            self.log("warning", "unknown_mapping_wanted", mapping=mapping_id)
        elif link.ready:
            self.act(SendTo(link.endpoint, packet))

    def _notice(self, now: float) -> None:
        """Say why nothing happens, after a few seconds of it, and go on waiting."""
        if not self.tickets or now < self.noticed_at + self.config.notice_s:
            return
        first = next(iter(self.tickets.values())).request
        troubles = [trouble(link, now, first.offer) for link in self.links.values()]
        if all(troubles):
            self.log("warning", "waiting", requests=len(self.tickets), why="; ".join(troubles))
            self.noticed_at = now + self.config.notice_again_s - self.config.notice_s
        else:
            self.noticed_at = now
