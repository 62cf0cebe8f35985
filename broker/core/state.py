"""The records that the broker's core keeps, and the bounded stores."""

from __future__ import annotations

import enum
import math
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Generic, TypeVar, cast

from broker.core.places import Place
from broker.core.timers import Timer
from broker.protocol.messages import Admission, Part, Reply, Request, RequestId
from broker.protocol.wire import Packet

K = TypeVar("K")


#: Tokens that a request without tensors may claim: a long batch.
_CLAIMED_TOKENS = 1 << 20
#: Sentences of a request's story that are kept: the first and the last, of each so many.
_STORY = 8
#: Vocab mappings that a worker is taken to know: many times what it keeps itself. One that it was
#: told before is told again, which costs no more than its bytes.
_KNOWN_MAPPINGS = 256


@dataclass(eq=False)
class ClientSession:
    """One life of one client. Outlives its connection for ``liveness_s``."""

    id: str
    incarnation: int
    job: str
    rank: int
    #: None while the connection is lost and the client may still come back
    connection: bytes | None
    last_seen: float
    #: the number of this life, and which broker gave it; and the lives that it followed here
    admission: Admission = field(default_factory=lambda: Admission("", 0))
    replaced: tuple[int, ...] = ()
    #: requests queued or running; never more than the window
    requests: set[RequestId] = field(default_factory=set)
    #: what it last said of its direct channels
    direct: str = ""
    answered: int = 0
    #: notices that it is silent
    watch: Timer | None = None


@dataclass(eq=False)
class WorkerSession:
    """One life of one worker on one connection."""

    id: str
    incarnation: int
    model: str
    #: the pool that it belongs to
    offer: str
    connection: bytes
    credits: int
    last_seen: float
    #: the number of this life, and which broker gave it; and the lives that it followed here
    admission: Admission = field(default_factory=lambda: Admission("", 0))
    replaced: tuple[int, ...] = ()
    #: assigned and not yet answered -> when assigned; at most ``credits``, but for what it held
    #: before a reconnect
    running: dict[RequestId, float] = field(default_factory=dict)
    #: replies whose parts are coming from it; it is done with them, and has their credits back
    passing: set[RequestId] = field(default_factory=set)
    #: notices that it has had a request for too long
    timers: dict[RequestId, Timer] = field(default_factory=dict)
    #: what it was told, the oldest first
    mappings: dict[str, None] = field(default_factory=dict)
    draining: bool = False
    #: seconds for one token, learned from answers; None until the first
    seconds_per_token: float | None = None
    #: of the last few answers but the first of its life
    last_seconds_per_token: tuple[float, ...] = ()
    #: requests that it has had for far longer than expected; it gets no other until they are over
    overdue: set[RequestId] = field(default_factory=set)
    #: since when it has had nothing to do, if it has nothing
    idle_since: float = 0.0
    #: when it should have finished all that it has
    busy_until: float = 0.0
    answered: int = 0
    #: what it last said of its direct channels
    direct: str = ""
    #: when anything of a reply last came from it
    moved_at: float = 0.0
    #: notices that it is silent
    watch: Timer | None = None

    def learn(self, mapping_id: str) -> None:
        """It is told a vocab mapping."""
        self.mappings[mapping_id] = None
        if len(self.mappings) > _KNOWN_MAPPINGS:
            del self.mappings[next(iter(self.mappings))]

    @property
    def free(self) -> int:
        """Requests it may still be given."""
        return 0 if self.draining or self.overdue else max(0, self.credits - len(self.running))


@dataclass(eq=False)
class Passing:
    """A reply in parts on its way through here, until its client says that it has all of it.

    The broker keeps none of its parts: where the reply or its client's connection breaks off, the
    request runs again.
    """

    worker: str
    packet: Packet
    #: when the worker was given the request
    since: float
    #: parts that have come
    parts: int = 0
    #: bytes that have come
    nbytes: int = 0
    #: when its client should have said that it has it; nobody knows before the last part
    awaited_until: float = math.inf
    #: notices that nothing more of it comes
    watch: Timer | None = None

    @property
    def reply(self) -> Reply:
        return cast(Reply, self.packet.message)

    def take(self, part: Packet) -> str:
        """Count the next part; what is wrong with it, or nothing."""
        number = cast(Part, part.message).number
        if number != self.parts:
            return f"part {number} came for part {self.parts}"
        self.parts += 1
        self.nbytes += part.nbytes - len(part.frames[0])
        announced = self.reply.tensor_bytes
        if self.nbytes > announced or (self.complete and self.nbytes < announced):
            return f"{self.nbytes} bytes came in {self.parts} parts, announced were {announced}"
        return ""

    @property
    def complete(self) -> bool:
        return self.parts >= self.reply.parts


@dataclass(eq=False)
class Entry:
    """One request from acceptance to answer: queued, waiting for its mapping, or running."""

    request: Request
    #: None for a request that a worker brought along and whose client has not asked again yet, and
    #: for one that is waiting for room
    packet: Packet | None
    job: str
    accepted_at: float
    expires_at: float
    #: of the packet
    nbytes: int = 0
    #: the offer whose pool took it, once one has
    pool: str = ""
    #: whether a worker had it before its client asked for it here: nobody knows since when
    adopted: bool = False
    #: where it is, since when, and why; only :meth:`broker.core.places.Places.move` writes these
    place: Place = Place.NEW
    place_since: float = 0.0
    why: str = ""
    #: ends its stay there, and is cancelled where it leaves before
    timer: Timer | None = None
    #: seconds in the places where it has been
    spent_s: dict[Place, float] = field(default_factory=dict)
    workers: set[str] = field(default_factory=set)
    #: its reply, while the parts of it come
    passing: Passing | None = None
    #: the worker of the second run, once there is one
    hedge: str = ""
    #: workers on which it failed or which it took down; others are tried first
    failed_on: list[str] = field(default_factory=list)
    #: those of them, with their incarnations, that fell silent or lost their connection; who comes
    #: back in the same life was not taken down
    suspects: dict[str, int] = field(default_factory=dict)
    #: workers that gave it back without having tried; others are tried first
    given_back_by: list[str] = field(default_factory=list)
    #: since when it has waited for room, while it does
    room_since: float | None = None
    #: its beginning and its end
    story: list[str] = field(default_factory=list)
    #: B*T as the tensors have it; where there are none, what is claimed, within bounds
    n_tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.place_since = self.accepted_at
        self.ask(self.request)

    def ask(self, request: Request) -> None:
        """Its client has asked for it, the first time or again."""
        self.request = request
        shapes = [math.prod(spec.shape) for spec in request.manifest]
        self.n_tokens = max(shapes, default=min(request.n_tokens, _CLAIMED_TOKENS))

    def tell(self, what: str) -> None:
        """Go on with its story; of a long one the middle is left out."""
        self.story.append(what)
        if len(self.story) > 2 * _STORY:
            self.story[_STORY : _STORY + 2] = ["..."]

    @property
    def id(self) -> RequestId:
        return self.request.id

    @property
    def client(self) -> str:
        return self.request.id.client

    @property
    def under_way(self) -> bool:
        """Whether a worker has it, or its reply is coming from one."""
        return bool(self.workers) or self.passing is not None

    @property
    def step(self) -> int:
        return self.request.step

    @property
    def avoid(self) -> set[str]:
        """Workers that others are tried before."""
        return {*self.failed_on, *self.given_back_by, self.request.avoid} - {""}


class Blame(enum.Enum):
    """Whether a worker was lost because of what it was working on."""

    NONE = "it left on purpose, or is still there"
    SUSPECT = "it fell silent or lost its connection, and may come back"
    GUILTY = "it began a new life"


#: A small packet takes a kilobyte beside its bytes, so their number has a bound as well.
_MAX_PACKETS = 65536


class PacketStore(Generic[K]):
    """Packets by key, bounded in bytes and number; the least recently used one goes first."""

    def __init__(self, capacity_bytes: int, max_packets: int = _MAX_PACKETS) -> None:
        self.capacity_bytes = capacity_bytes
        self.max_packets = max_packets
        self.held_bytes = 0
        self._packets: OrderedDict[K, Packet] = OrderedDict()
        self._since: dict[K, float] = {}

    def __len__(self) -> int:
        return len(self._packets)

    def __contains__(self, key: K) -> bool:
        return key in self._packets

    def get(self, key: K) -> Packet | None:
        packet = self._packets.get(key)
        if packet is not None:
            self._packets.move_to_end(key)
        return packet

    def put(self, key: K, packet: Packet, now: float) -> None:
        self.discard(key)
        if packet.nbytes > self.capacity_bytes:
            return
        self._packets[key] = packet
        self._since[key] = now
        self.held_bytes += packet.nbytes
        while self.held_bytes > self.capacity_bytes or len(self._packets) > self.max_packets:
            self.discard(next(iter(self._packets)))

    def discard(self, key: K) -> None:
        packet = self._packets.pop(key, None)
        if packet is not None:
            self.held_bytes -= packet.nbytes
            del self._since[key]

    def discard_older(self, than: float) -> None:
        """Discard what was put at ``than`` or before."""
        for key in [key for key, since in self._since.items() if since <= than]:
            self.discard(key)

    def validate(self) -> None:
        held = sum(packet.nbytes for packet in self._packets.values())
        assert held == self.held_bytes <= self.capacity_bytes
        assert len(self._packets) <= self.max_packets
        assert self._since.keys() == self._packets.keys()
