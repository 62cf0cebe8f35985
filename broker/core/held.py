"""Answers on their way to clients: the broker keeps each for a while, for clients that resend."""

from __future__ import annotations

from typing import cast

from broker.core.ledger import Ledger
from broker.protocol import Packet, payload_hash
from broker.protocol import messages as m


class HeldAnswers:
    """Keeps answers and counts the room of replies until they are acknowledged, or for
    ``held_answer_s``.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        #: whether a timer is set that lets old ones go
        self._watches = False

    def find(self, packet: Packet) -> Packet | None:
        """The kept answer that belongs to this request, if there is one. Another may be kept under
        its id: a worker may have sent that before any client asked here.
        """
        request = cast(m.Request, packet.message)
        held = self._ledger.answers.get(request.id)
        if held is None or isinstance(held.message, m.Failure):
            return held
        if answers(cast(m.Reply, held.message), packet):
            return held
        self._ledger.answers.discard(request.id)
        return None

    def keep(self, request_id: m.RequestId, answer: Packet, now: float) -> None:
        """Keep an answer for a while: it may be lost on its way, and its client may ask again."""
        self._ledger.answers.put(request_id, answer, now)
        self._watch(now)

    def sent(self, request_id: m.RequestId, nbytes: int, now: float) -> None:
        """Count a reply's bytes until its client acknowledges it."""
        self._ledger.reply_room.sent(request_id, nbytes, now)
        self._watch(now)

    def _watch(self, now: float) -> None:
        if not self._watches:
            self._watches = True
            self._ledger.at(now + self._ledger.config.held_answer_s, self._let_go)

    def _let_go(self, now: float) -> None:
        """Forget answers that nobody will ask for any more."""
        ledger = self._ledger
        ledger.answers.discard_older(now - ledger.config.held_answer_s)
        ledger.reply_room.free_unacknowledged(now - ledger.config.held_answer_s)
        self._watches = False
        if len(ledger.answers) or ledger.reply_room.awaits_acknowledgements:
            self._watch(now)


def answers(reply: m.Reply, packet: Packet) -> bool:
    """Whether a reply says that it is the one to this request."""
    request = cast(m.Request, packet.message)
    named = request.offer in ("", reply.offer) and request.model in ("", reply.model)
    told = (reply.mapping_id, reply.encoding, reply.tokens_hash)
    return named and told == (request.mapping_id, request.encoding, payload_hash(packet))
