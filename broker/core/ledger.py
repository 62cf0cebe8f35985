"""All that the parts of the broker's core share: the books, the timers, and what is to be sent.

Nothing here decides anything; who changes an entry of the books also keeps the others true.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

from broker.core import fencing
from broker.core.config import BrokerConfig
from broker.core.events import Action, Send, Side
from broker.core.measures import Measures
from broker.core.places import Places
from broker.core.pool import Pool
from broker.core.room import ReplyRoom, Room, Waiting
from broker.core.state import ClientSession, Entry, PacketStore, WorkerSession
from broker.core.timers import Timer, Timers
from broker.log_line import Log
from broker.protocol import Packet, encode
from broker.protocol import messages as m

#: Vocab mappings that are kept at the most, however small.
_MAX_MAPPINGS = 1024


class Ledger:
    """Who is there, who waits, who works on what."""

    def __init__(self, incarnation: str, config: BrokerConfig) -> None:
        self.incarnation = incarnation
        #: numbers the lives of peers in the order in which they first come
        self._newcomers = itertools.count(1)
        self.config = config
        self.clients: dict[str, ClientSession] = {}
        self.workers: dict[str, WorkerSession] = {}
        self.client_connections: dict[bytes, ClientSession] = {}
        self.worker_connections: dict[bytes, WorkerSession] = {}
        #: by offer
        self.pools: dict[str, Pool] = {}
        #: when it was told the first event
        self.began_at: float | None = None
        #: every accepted request that is not answered yet
        self.entries: dict[m.RequestId, Entry] = {}
        #: requests that no pool can take yet, in order of arrival
        self.waiting_for_pool: dict[m.RequestId, Entry] = {}
        #: requests that have lost a worker which may come back
        self.orphaned: dict[m.RequestId, Entry] = {}
        #: requests that may have taken down too many workers, which have some time to return
        self.suspected: dict[m.RequestId, Entry] = {}
        #: mapping -> requests that wait for its content
        self.waiting_for_mapping: dict[str, dict[m.RequestId, Entry]] = {}
        self.mappings: PacketStore[str] = PacketStore(config.held_mapping_bytes, _MAX_MAPPINGS)
        self.answers: PacketStore[m.RequestId] = PacketStore(config.held_answer_bytes)
        #: requests that run a second time
        self.hedged: set[m.RequestId] = set()
        self.counters: dict[str, int] = dict.fromkeys(COUNTERS, 0)
        self.measures = Measures()
        self.request_room = Room(config.max_client_request_bytes, config.max_total_request_bytes)
        #: requests whose payload was let go, and will be asked for when there is room for it
        self.waiting_for_request_room = Waiting(
            self.request_room, lambda entry: entry.nbytes, config.patience_s
        )
        #: those that were asked for again; the room for them is taken
        self.recalled: dict[m.RequestId, Entry] = {}
        self.reply_room = ReplyRoom(config.max_client_bytes, config.max_total_bytes)
        #: requests that are not given to a worker yet, for want of room for the reply
        self.waiting_for_reply_room = Waiting(
            self.reply_room, self.reply_room.expected_bytes, config.patience_s
        )
        #: moves requests from one of these to another
        self.places = Places(self)
        self.timers = Timers()
        self._actions: list[Action] = []

    # -- timers ---------------------------------------------------------------------------------

    @property
    def next_timer(self) -> float | None:
        """When the first timer is due."""
        return self.timers.next

    def at(self, when: float, call: Callable[[float], None], old: Timer | None = None) -> Timer:
        """Have ``call(now)`` called then, in place of an ``old`` timer if there is one."""
        self.timers.cancel(old)
        return self.timers.at(when, call)

    # -- what is to be done ---------------------------------------------------------------------

    def take_actions(self) -> list[Action]:
        """What is to be done since the last call."""
        actions, self._actions = self._actions, []
        return actions

    def send(self, side: Side, connection: bytes, message: m.Message) -> None:
        """Say something to a peer."""
        self._actions.append(Send(side, connection, encode(message).frames))

    def answer(self, client: ClientSession, message: m.Message) -> None:
        """Say something to a client, if it is connected."""
        if client.connection is not None:
            self.send(Side.CLIENT, client.connection, message)

    def forward(self, side: Side, connection: bytes | None, packet: Packet) -> None:
        """Pass on what another peer said, if this one is connected."""
        if connection is not None:
            self._actions.append(Send(side, connection, packet.frames))

    def log(self, level: str, event: str, **fields: Any) -> None:
        """Tell the operator."""
        self._actions.append(Log(level, event, fields))

    def pools_called(self, name: str) -> list[Pool]:
        """The pools of a model's name: one, and perhaps some that have lost their workers."""
        return [pool for pool in self.pools.values() if pool.description.model == name]

    def offers(self) -> tuple[str, ...]:
        """What workers serve just now."""
        served = (offer for offer, pool in self.pools.items() if pool.workers)
        return tuple(itertools.islice(served, m.MAX_OFFERS))

    def admission(self, hello: fencing.Hello, session: fencing.Life | None) -> m.Admission:
        """The number of the life that says ``hello``; one that has none is given one here."""
        if hello.admission is not None:
            return hello.admission
        if session is not None and session.incarnation == hello.incarnation:
            return session.admission
        return m.Admission(self.incarnation, next(self._newcomers))

    def welcome(self, side: Side, session: ClientSession | WorkerSession) -> None:
        """Answer a hello that was accepted."""
        assert session.connection is not None
        limits = self.config.limits
        welcome = m.Welcome(
            broker=self.incarnation,
            window=self.config.window if side is Side.CLIENT else 0,
            heartbeat_s=float(self.config.heartbeat_s),
            liveness_s=float(self.config.liveness_s),
            max_header_bytes=limits.max_header_bytes,
            max_frames=limits.max_frames,
            max_frame_bytes=limits.max_frame_bytes,
            max_request_bytes=limits.max_request_bytes,
            max_reply_bytes=limits.max_reply_bytes,
            offers=self.offers() if side is Side.CLIENT else (),
            number=session.admission.number if session.admission.broker == self.incarnation else 0,
        )
        self.send(side, session.connection, welcome)


@functools.lru_cache(maxsize=16)
def heartbeat(n_workers: int, offers: tuple[str, ...] = ()) -> Packet:
    """What a broker says to each of its peers, most of the time the same."""
    return encode(m.Heartbeat(n_workers, "", offers))


COUNTERS = (
    "requests",
    "assignments",
    "replies",
    "direct_replies",
    "reply_bytes",
    "failures",
    "resends",
    "answered_again",
    "recalls",
    "requeues",
    "hedges",
    "hedges_won",
    "late_answers",
    "unasked_answers",
    "expired",
    "bad_messages",
    "failed_messages",
)
