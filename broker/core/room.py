"""How many bytes the broker may have for each client, and for all together.

A request lies here with its payload until it is answered. A reply lies here from its arrival until
its client says that it has it; so a request is given to a worker only when there is room for its
reply, and until then it waits, and so does its caller. How large a reply will be is learned from
those before: a client's requests are much alike.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator

from broker.core.state import Entry
from broker.protocol.messages import RequestId


class Room:
    """Bytes that are taken, by client and request. Whoever has nothing may always have one thing,
    however large.
    """

    def __init__(self, client_bytes: int, total_bytes: int) -> None:
        self.client_bytes = client_bytes
        self.total_bytes = total_bytes
        self.taken_bytes = 0
        self._freed: dict[str, None] = {}
        #: client -> request -> bytes; no empty ones
        self._taken: defaultdict[str, dict[RequestId, int]] = defaultdict(dict)

    def fits_client(self, client: str, nbytes: int) -> bool:
        """Whether this client may have so much more."""
        taken = self._taken.get(client)
        return not taken or sum(taken.values()) + nbytes <= self.client_bytes

    def fits_total(self, client: str, nbytes: int) -> bool:
        """Whether there is so much more beside what all have."""
        return not self._taken or self.taken_bytes + nbytes <= self.total_bytes

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


class ReplyRoom(Room):
    """Bytes of replies: expected from workers, or sent to clients and not acknowledged."""

    def __init__(self, client_bytes: int, total_bytes: int) -> None:
        super().__init__(client_bytes, total_bytes)
        #: client -> bytes of its last reply, for one token
        self._bytes_per_token: dict[str, float] = {}
        self._last_bytes_per_token: float | None = None

    def expected_bytes(self, entry: Entry) -> int:
        """As the client's last reply, or anybody's; before any, a quarter of what it may have."""
        known = self._bytes_per_token.get(entry.client, self._last_bytes_per_token)
        return self.client_bytes // 4 if known is None else int(known * max(1, entry.n_tokens))

    def expect(self, entry: Entry) -> None:
        """A worker computes this reply."""
        self.put(entry.id, self.expected_bytes(entry))

    def owe(self, request_id: RequestId, n_tokens: int, nbytes: int) -> None:
        """The reply came, and is on its way to the client."""
        known = self._last_bytes_per_token = nbytes / max(1, n_tokens)
        self._bytes_per_token[request_id.client] = known
        self.put(request_id, nbytes)

    def forget(self, client: str) -> None:
        """The client has left."""
        self.taken_bytes -= sum(self._taken.pop(client, {}).values())
        self._freed[client] = None
        self._bytes_per_token.pop(client, None)

    def free_sent(self, client: str, unfinished: set[RequestId]) -> None:
        """The client's connection is gone, with all that was on it; not what is still computed."""
        for request_id in [id_ for id_ in self._taken.get(client, {}) if id_ not in unfinished]:
            self.free(request_id)


class Waiting:
    """Requests for which there is no room now, in the order in which they came."""

    def __init__(self, room: Room, size: Callable[[Entry], int]) -> None:
        self._room = room
        self._size = size
        #: client -> its requests that wait because it has enough itself; no empty ones
        self._parked: dict[str, dict[RequestId, Entry]] = {}
        #: requests that wait because all clients together have enough
        self._crowded: dict[RequestId, Entry] = {}

    def __contains__(self, entry: Entry) -> bool:
        return entry.id in self._crowded or entry.id in self._parked.get(entry.client, {})

    def must_wait(self, entry: Entry) -> bool:
        """Whether there is no room for it; then it is here now."""
        nbytes = self._size(entry)
        if not self._room.fits_client(entry.client, nbytes):
            self._parked.setdefault(entry.client, {})[entry.id] = entry
        elif not self._room.fits_total(entry.client, nbytes):
            self._crowded[entry.id] = entry
        else:
            return False
        return True

    def discard(self, entry: Entry) -> None:
        """It waits no longer."""
        self._crowded.pop(entry.id, None)
        if parked := self._parked.get(entry.client):
            parked.pop(entry.id, None)
            if not parked:
                del self._parked[entry.client]

    def take_ready(self) -> Iterator[Entry]:
        """Those for which there is room now; what the caller does with one counts for the next."""
        for client in self._room.take_freed():
            yield from self._take(self._parked.get(client, {}), self._room.fits_client)
            yield from self._take(self._crowded, self._room.fits_total)

    def _take(
        self, waiting: dict[RequestId, Entry], fits: Callable[[str, int], bool]
    ) -> Iterator[Entry]:
        while waiting:
            entry = next(iter(waiting.values()))
            if not fits(entry.client, self._size(entry)):
                return
            self.discard(entry)
            yield entry

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        assert all(self._parked.values())
