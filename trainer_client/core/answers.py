"""Takes answers: checks each one, delivers it once, and gets its tensors by wire or directly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.peer.link import Link
from broker.peer.parts import Assembly
from broker.protocol import Packet, RemoteProtocolError, payload_hash
from broker.protocol import messages as m
from broker.protocol.wish import WishError, parse_wish
from trainer_client.core.events import Deliver, JoinChannel, Received, ReceiveDirectly
from trainer_client.core.ledger import Arriving, Identity, Ledger, Ticket
from trainer_client.core.places import Place


class Answers:
    """Trusts neither that an answer comes once nor that it is the one to its request."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def answered(self, link: Link, packet: Packet, now: float) -> None:
        """Take a reply or a failure, and acknowledge it whatever it is."""
        answer = packet.message
        assert isinstance(answer, (m.Reply, m.Failure))
        ticket = self._ledger.tickets.get(answer.id)
        if isinstance(answer, m.Reply):
            self._direct(answer)
            if answer.parts:
                self._begins(link, ticket, packet, answer, now)
                return
        self._ledger.send(link.endpoint, m.Received((answer.id,)))
        if ticket is None:
            self._ledger.counters["duplicates"] += 1
        elif isinstance(answer, m.Failure):
            self._failed(link, ticket, answer, now)
        elif not self._is_ours(ticket, answer):
            pass  # the ticket has ended with that
        elif answer.transfer is not None:
            self._await_tensors(ticket, packet)
        else:
            arriving = Arriving(packet, Assembly(answer.manifest))
            if self._placed(ticket, arriving, packet, now):
                self._deliver(answer.id, packet, now, arriving.assembly.octets)

    def _begins(
        self, link: Link, ticket: Ticket | None, packet: Packet, reply: m.Reply, now: float
    ) -> None:
        """A reply came whose payload comes in parts behind it: from the start, also where those of
        another one had begun to come.
        """
        if ticket is None or ticket.endpoint != link.endpoint:
            self._ledger.counters["duplicates"] += 1
            self._ledger.send(link.endpoint, m.Cancel(reply.id))
        elif not self._is_ours(ticket, reply):
            self._ledger.send(link.endpoint, m.Cancel(reply.id))
        else:
            ticket.arriving = Arriving(packet, Assembly(reply.manifest))
            self._ledger.move(ticket, Place.ARRIVING)
            ticket.resend_at = max(ticket.resend_at, now + self._ledger.config.resend_s)

    def part(self, link: Link, packet: Packet, now: float) -> None:
        """Take the next part of a reply, and drop it where nobody waits for that reply."""
        part = packet.message
        assert isinstance(part, m.Part)
        ticket = self._ledger.tickets.get(part.id)
        if ticket is None or ticket.arriving is None or ticket.endpoint != link.endpoint:
            return
        arriving = ticket.arriving
        ticket.resend_at = max(ticket.resend_at, now + self._ledger.config.resend_s)
        if not self._placed(ticket, arriving, packet, now):
            self._ledger.move(ticket, Place.IN_FLIGHT)
            self._ledger.send(link.endpoint, m.Cancel(part.id))  # the broker thinks all is well
        elif arriving.taken == arriving.reply.parts:
            self._ledger.send(link.endpoint, m.Received((part.id,)))
            self._deliver(part.id, arriving.packet, now, arriving.assembly.octets)

    def _placed(self, ticket: Ticket, arriving: Arriving, packet: Packet, now: float) -> bool:
        """Put a payload where it belongs; False where it is not sound, and the request is sent
        again.
        """
        try:
            if isinstance(part := packet.message, m.Part) and part.number != arriving.taken:
                raise RemoteProtocolError(f"part {part.number} came for part {arriving.taken}")
            arriving.assembly.add(packet)
            arriving.taken += 1
            if arriving.taken >= arriving.reply.parts and not arriving.assembly.complete:
                raise RemoteProtocolError("it ended before all of its tensors were here")
        except RemoteProtocolError as error:
            self._ledger.counters["damaged"] += 1
            ticket.story.append(f"a damaged reply was dropped: {error}")
            self._ledger.log(
                "warning", "damaged_reply", request=str(ticket.request.id), text=str(error)
            )
            ticket.resend_at = now
            return False
        return True

    def _deliver(
        self,
        request_id: m.RequestId,
        packet: Packet,
        now: float,
        octets: Sequence[NDArray[np.uint8]] = (),
        tensors: Any = None,
    ) -> None:
        ticket = self._ledger.finish(request_id)
        assert ticket is not None
        assert isinstance(packet.message, m.Reply)
        self._ledger.counters["replies"] += 1
        self._ledger.counters["reply_bytes"] += packet.message.tensor_bytes
        times = (ticket.submitted_at, ticket.sent_at, now)
        self._ledger.act(Deliver(ticket.id, packet, ticket.request, *times, octets, tensors))

    def _direct(self, reply: m.Reply) -> None:
        if reply.invitation is not None:
            self._ledger.act(JoinChannel(reply.worker, reply.invitation))
        if reply.transfer is not None:
            self._ledger.act(ReceiveDirectly(reply))

    def _await_tensors(self, ticket: Ticket, packet: Packet) -> None:
        """Wait for tensors that come from the worker; the broker is done with the request."""
        self._ledger.move(ticket, Place.RECEIVING)
        ticket.reply = packet

    def received(self, event: Received, now: float) -> None:
        """Deliver what a direct transfer brought, or ask by wire where it failed."""
        if event.id not in self._ledger.receiving:
            return  # cancelled, expired, answered by wire meanwhile, or told twice
        ticket = self._ledger.tickets[event.id]
        reply = ticket.reply
        assert reply is not None
        if event.tensors is not None:
            self._ledger.counters["direct"] += 1
            self._deliver(event.id, reply, now, tensors=event.tensors)
        else:
            self._ask_by_wire(event.id, ticket, reply, event.error)

    def _ask_by_wire(
        self, request_id: m.RequestId, ticket: Ticket, reply: Packet, why: str
    ) -> None:
        """Ask anew, under a new id, so that nothing of the old transfer can answer it."""
        assert isinstance(reply.message, m.Reply)
        worker = reply.message.worker
        self._ledger.counters["direct_failed"] += 1
        self._ledger.log(
            "warning", "direct_failed", request=str(request_id), worker=worker, why=why
        )
        ticket.story.append(f"the direct transfer from worker {worker} failed: {why}")
        del self._ledger.tickets[request_id]
        self._ledger.move(ticket, Place.NEW)
        asked, ticket.reply = self._ledger.new_id(), None
        ticket.take_the_wire(id=asked, avoid=worker)
        self._ledger.tickets[asked] = ticket
        self._ledger.move(ticket, Place.WAITING, first=True)

    def _failed(self, link: Link, ticket: Ticket, failure: m.Failure, now: float) -> None:
        if ticket.endpoint != link.endpoint:  # the broker that has it now will answer
            self._ledger.counters["duplicates"] += 1
        elif failure.code == "damaged":
            self._ledger.counters["damaged"] += 1
            ticket.story.append(f"the request was damaged on its way: {failure.text}")
            ticket.resend_at = now
        elif failure.code != "over_window":
            self._ledger.fail(failure.id, failure.code, failure.text)
        else:
            ticket.story.append(f"broker {link.broker}: {failure.text}")
            ticket.resend_at = now + link.heartbeat_s

    def _is_ours(self, ticket: Ticket, reply: m.Reply) -> bool:
        """Whether a reply belongs to this request; if not, the request ends with an error."""
        if stranger := self._stranger(ticket.packet, reply):
            self._ledger.fail(reply.id, "identity", stranger)
            return False
        request = ticket.request
        known = self._ledger.identities.setdefault(reply.model, Identity(reply.fingerprint))
        if _wished_layers(request) is None:
            known.aux_layer_ids = reply.aux_layer_ids
        return True

    def _stranger(self, packet: Packet, reply: m.Reply) -> str:
        """Why a reply does not belong to this request; empty if it does."""
        request = packet.message
        assert isinstance(request, m.Request)
        known = self._ledger.identities.get(reply.model, Identity(reply.fingerprint))
        layers = _wished_layers(request)
        if layers is None:  # the worker's own, which are the same for ever
            layers = known.aux_layer_ids or reply.aux_layer_ids
        expected = {
            "tokens_hash": (payload_hash(packet), reply.tokens_hash),
            "mapping_id": (request.mapping_id, reply.mapping_id),
            "encoding": (request.encoding, reply.encoding),
            "model": (request.model or reply.model, reply.model),
            "offer": (request.offer or reply.offer, reply.offer),
            "fingerprint": (known.fingerprint, reply.fingerprint),
            "aux_layer_ids": (layers, reply.aux_layer_ids),
        }
        wrong = [
            f"{name} is {got!r} where {wanted!r} was expected"
            for name, (wanted, got) in expected.items()
            if wanted != got
        ]
        if not wrong:
            return ""
        return f"worker {reply.worker} sent a reply that is not ours: {'; '.join(wrong)}"


def _wished_layers(request: m.Request) -> tuple[int, ...] | None:
    """The layers that a request asks for; None where it takes the worker's own."""
    try:
        wish = parse_wish(request.encoding)
    except WishError:
        return None  # a worker will refuse it
    return None if wish.name else wish.layers
