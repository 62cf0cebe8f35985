"""How many bytes the broker may have for each client, and for all together.

A request lies here with its payload until it is answered. A reply lies here from its arrival until
its client says that it has it; so a request is given to a worker only when there is room for its
reply, and until then it waits, and so does its caller. How large a reply will be is learned from
those before: a client's requests are much alike.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator

from broker.core.state import Entry
from broker.protocol.messages import RequestId

#: Of those that wait for room so many are looked at: a client's requests, or clients.
_LOOK_PAST = 64


#: A client may have so many times what it leaves free to others.
_LEAVES = 7


class Room:
    """Bytes that are taken, by client and request. Whoever has nothing may always have one thing,
    however large.

    A client that has something takes more of the total only while that leaves a seventh as much
    free (dynamic thresholds, Choudhury and Hahne, IEEE/ACM ToN 1998): a few that take all they can
    leave something to the next. Beside the total there is a lane for one thing of any size.
    """

    def __init__(self, client_bytes: int, total_bytes: int) -> None:
        self.client_bytes = client_bytes
        self.total_bytes = total_bytes
        self.taken_bytes = 0
        #: what was last let into the lane; it is free when that is no longer here
        self._in_lane: RequestId | None = None
        self._freed: dict[str, None] = {}
        #: client -> request -> bytes; no empty ones
        self._taken: defaultdict[str, dict[RequestId, int]] = defaultdict(dict)

    def fits_client(self, client: str, nbytes: int) -> bool:
        """Whether this client may have so much more."""
        taken = self._taken.get(client)
        return not taken or sum(taken.values()) + nbytes <= self.client_bytes

    def fits_total(self, client: str, nbytes: int) -> bool:
        """Whether there is so much more beside what all have, and some is left after it."""
        has = sum(self._taken.get(client, {}).values())
        free = self.total_bytes - (self.taken_bytes - self._lane_bytes) - nbytes
        return not self._taken or free >= (has and (has + nbytes) / _LEAVES)

    def take_lane(self, request_id: RequestId) -> bool:
        """Let this one in beside the total, if nothing else is; it is put next."""
        if self._lane_bytes and self._in_lane != request_id:
            return False
        self._in_lane = request_id
        return True

    @property
    def _lane_bytes(self) -> int:
        there = self._in_lane
        return 0 if there is None else self._taken.get(there.client, {}).get(there, 0)

    def put(self, request_id: RequestId, nbytes: int) -> None:
        """Take so much, in place of what the request had."""
        self.free(request_id)
        self._taken[request_id.client][request_id] = nbytes
        self.taken_bytes += nbytes

    def free(self, request_id: RequestId) -> None:
        """It is no longer there, or nobody wants it any more."""
        taken = self._taken.get(request_id.client)
        if taken is None or request_id not in taken:
            return
        self.taken_bytes -= taken.pop(request_id)
        self._freed[request_id.client] = None
        if not taken:
            del self._taken[request_id.client]

    def take_freed(self) -> list[str]:
        """Clients for whom anything was freed since the last call."""
        freed, self._freed = list(self._freed), {}
        return freed

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        assert all(self._taken.values())
        assert self.taken_bytes == sum(sum(taken.values()) for taken in self._taken.values())


#: Shapes whose sizes are remembered for one client, and for all together. A run has a handful.
_SHAPES_EACH, _SHAPES = 16, 1024

#: Things of one client that are counted; of more, the reply that was sent first is taken for read.
_UNACKNOWLEDGED = 4096

#: What replies have in common that have the same bytes for each token: the pool, the operation, the
#: wish, the mapping, whether the tensors may go past the broker, and whether tokens are counted.
_Shape = tuple[str, str, str, str, bool, bool]


class ReplyRoom(Room):
    """Bytes of replies: expected from workers, or sent to clients and not acknowledged."""

    def __init__(self, client_bytes: int, total_bytes: int) -> None:
        super().__init__(client_bytes, total_bytes)
        #: client -> shape -> bytes of its last reply, for one token; for all of it without tokens
        self._learned: dict[str, dict[_Shape, float]] = {}
        #: the same for whoever asked last
        self._learned_of_all: dict[_Shape, float] = {}
        #: replies that were sent and are not acknowledged -> since when; the oldest first
        self._sent: dict[RequestId, float] = {}

    def expected_bytes(self, entry: Entry) -> int:
        """As the client's last reply of this shape, or anybody's; before any, a quarter of what it
        may have. Never more than that, so that a false count of tokens keeps no request waiting.
        """
        shape = _shape(entry)
        known = self._learned.get(entry.client, {}).get(shape, self._learned_of_all.get(shape))
        if known is None:
            return self.client_bytes // 4
        return int(min(self.client_bytes, known * max(1, entry.n_tokens)))

    def expect(self, entry: Entry) -> None:
        """A worker computes this reply."""
        self.put(entry.id, self.expected_bytes(entry))

    def learn(self, entry: Entry, nbytes: int) -> None:
        """A reply with so many bytes came for the entry: the next ones of its shape are alike."""
        known = nbytes / max(1, entry.n_tokens)
        _remember(self._learned.setdefault(entry.client, {}), _shape(entry), known, _SHAPES_EACH)
        _remember(self._learned_of_all, _shape(entry), known, _SHAPES)

    def sent(self, request_id: RequestId, nbytes: int, now: float) -> None:
        """The whole reply is on its way to the client."""
        self.put(request_id, nbytes)
        self._sent[request_id] = now
        taken = self._taken[request_id.client]
        if len(taken) > _UNACKNOWLEDGED:
            self.free(next(id_ for id_ in taken if id_ in self._sent))

    def free(self, request_id: RequestId) -> None:
        """It is no longer there, or nobody wants it any more."""
        self._sent.pop(request_id, None)
        super().free(request_id)

    def free_unacknowledged(self, than: float) -> None:
        """Free what was sent at ``than`` or before: a client that reads says so much sooner."""
        for request_id in list(itertools.takewhile(lambda i: self._sent[i] <= than, self._sent)):
            self.free(request_id)

    @property
    def awaits_acknowledgements(self) -> bool:
        """Whether anything that was sent is not acknowledged."""
        return bool(self._sent)

    def forget(self, client: str) -> None:
        """The client has left."""
        for request_id in list(self._taken.get(client, ())):
            self.free(request_id)
        self._freed[client] = None
        self._learned.pop(client, None)
        if not self._learned:
            self._learned_of_all.clear()

    def free_sent(self, client: str, unfinished: set[RequestId]) -> None:
        """The client's connection is gone, with all that was on it; not what is still computed."""
        for request_id in [id_ for id_ in self._taken.get(client, {}) if id_ not in unfinished]:
            self.free(request_id)

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        super().validate()
        assert all(request_id in self._taken[request_id.client] for request_id in self._sent)


def _shape(entry: Entry) -> _Shape:
    asked = entry.request
    direct, counted = asked.direct is not None, entry.n_tokens > 0
    return entry.pool, asked.operation, asked.encoding, asked.mapping_id, direct, counted


def _remember(learned: dict[_Shape, float], shape: _Shape, value: float, limit: int) -> None:
    """Put it last; the one that was learned longest ago goes for it."""
    learned.pop(shape, None)
    learned[shape] = value
    if len(learned) > limit:
        del learned[next(iter(learned))]


#: client -> its requests in the order in which they came; no empty ones
_ByClient = dict[str, dict[RequestId, Entry]]


class Waiting:
    """Requests for which there is no room now.

    A client's own come in their order: a smaller one may pass a larger one until that has waited
    for ``patience_s``; from then on what the client's others free is kept for it. Clients take
    turns, and do not wait for each other's: who has waited for ``patience_s`` may take the lane.
    """

    def __init__(self, room: Room, size: Callable[[Entry], int], patience_s: float) -> None:
        self._room = room
        self._size = size
        self._patience_s = patience_s
        #: those that wait because their client has enough itself
        self._parked: _ByClient = {}
        #: those that wait because all clients together have enough; who is looked at next is first
        self._crowded: _ByClient = {}
        #: when the oldest of these has waited for long enough to take the lane
        self._look_at = math.inf

    def __contains__(self, entry: Entry) -> bool:
        return any(entry.id in each.get(entry.client, {}) for each in (self._crowded, self._parked))

    def __len__(self) -> int:
        return sum(len(w) for each in (self._crowded, self._parked) for w in each.values())

    @property
    def next_look(self) -> float:
        """When :meth:`take_ready` may find something although nothing was freed."""
        return self._look_at

    def why_wait(self, entry: Entry, now: float) -> str:
        """Why there is no room for it; nothing where there is, and it is put there next."""
        nbytes = self._size(entry)
        if self._has_client_full(entry, nbytes, now):
            return f"client {entry.client} has enough, {nbytes} bytes more are over its limit"
        if self._fits_all(entry, now):
            entry.room_since = None
            return ""
        return f"all clients together have enough, {nbytes} bytes more are over their limit"

    def _has_client_full(self, entry: Entry, nbytes: int, now: float) -> bool:
        if not self._room.fits_client(entry.client, nbytes):
            return True
        first = next(iter(self._parked.get(entry.client, {}).values()), entry)
        return self._due(first, now) <= now and self._due(first, now) < self._due(entry, now)

    def _fits_all(self, entry: Entry, now: float) -> bool:
        if self._room.fits_total(entry.client, self._size(entry)):
            return True
        return self._due(entry, now) <= now and self._room.take_lane(entry.id)

    def _due(self, entry: Entry, now: float) -> float:
        return (now if entry.room_since is None else entry.room_since) + self._patience_s

    def add(self, entry: Entry, now: float) -> None:
        """It waits, until :meth:`take_ready` gives it and it is discarded."""
        if entry.room_since is None:
            entry.room_since = now
        if self._has_client_full(entry, self._size(entry), now):
            self._parked.setdefault(entry.client, {})[entry.id] = entry
        else:
            self._crowded.setdefault(entry.client, {})[entry.id] = entry
            self._look_at = min(self._look_at, max(now, self._due(entry, now)))

    def discard(self, entry: Entry) -> None:
        """It waits no longer."""
        for each in (self._crowded, self._parked):
            if waiting := each.get(entry.client):
                waiting.pop(entry.id, None)
                if not waiting:
                    del each[entry.client]

    def take_ready(self, now: float) -> Iterator[Entry]:
        """Those for which there is room now; what the caller does with one counts for the next, and
        it moves each.
        """
        freed = self._room.take_freed()
        for client in freed:
            yield from self._take_parked(client, now)
        if freed or now >= self._look_at:
            yield from self._take_crowded(now)
            first = (next(iter(waiting.values())) for waiting in self._crowded.values())
            dues = [due for entry in first if (due := self._due(entry, now)) > now]
            again = now + self._patience_s if self._crowded else math.inf
            self._look_at = min(dues, default=again)

    def _take_parked(self, client: str, now: float) -> Iterator[Entry]:
        waiting = self._parked.get(client, {})
        for entry in list(itertools.islice(waiting.values(), _LOOK_PAST)):
            if waiting.get(entry.id) is not entry:
                continue
            if self._room.fits_client(client, self._size(entry)):
                yield entry
            elif self._due(entry, now) <= now:
                return

    def _take_crowded(self, now: float) -> Iterator[Entry]:
        for client in list(itertools.islice(self._crowded, _LOOK_PAST)):
            waiting = self._crowded.get(client)
            while waiting and self._fits_all(first := next(iter(waiting.values())), now):
                yield first
                if waiting.get(first.id) is first:  # it waits again
                    break
            if waiting and client in self._crowded:
                self._crowded[client] = self._crowded.pop(client)

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        for each in (self._crowded, self._parked):
            assert all(each.values())
            for entry in (entry for waiting in each.values() for entry in waiting.values()):
                assert entry.room_since is not None
