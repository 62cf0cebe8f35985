"""How many bytes of replies the broker may have for each client, and for all together.

A reply lies here from its arrival until its client says that it has it. So a request is given to a
worker only when there is room for its reply; until then it waits, and so does its caller. How large
a reply will be is learned from those before: a client's requests are much alike.
"""

from __future__ import annotations

from collections import defaultdict

from broker.protocol.messages import RequestId


class Room:
    """Bytes expected from workers, or sent to clients and not acknowledged.

    Whoever has nothing outstanding may always have one reply, however large.
    """

    def __init__(self, client_bytes: int, total_bytes: int) -> None:
        self.client_bytes = client_bytes
        self.total_bytes = total_bytes
        self.taken_bytes = 0
        self._freed: dict[str, None] = {}
        #: client -> request -> bytes; no empty ones
        self._taken: defaultdict[str, dict[RequestId, int]] = defaultdict(dict)
        #: client -> bytes of its last reply, for one token
        self._bytes_per_token: dict[str, float] = {}
        self._last_bytes_per_token: float | None = None

    def fits_client(self, client: str, n_tokens: int) -> bool:
        """Whether this client may have a reply to so many tokens."""
        taken = self._taken.get(client)
        if not taken:
            return True
        return sum(taken.values()) + self._expected(client, n_tokens) <= self.client_bytes

    def fits_total(self, client: str, n_tokens: int) -> bool:
        """Whether there is room for it beside everybody else's."""
        more = self._expected(client, n_tokens)
        return not self._taken or self.taken_bytes + more <= self.total_bytes

    def expect(self, request_id: RequestId, n_tokens: int) -> None:
        """A worker computes this reply."""
        self._put(request_id, self._expected(request_id.client, n_tokens))

    def owe(self, request_id: RequestId, n_tokens: int, nbytes: int) -> None:
        """The reply came, and is on its way to the client."""
        known = self._last_bytes_per_token = nbytes / max(1, n_tokens)
        self._bytes_per_token[request_id.client] = known
        self._put(request_id, nbytes)

    def free(self, request_id: RequestId) -> None:
        """The client has it, or nobody wants it any more."""
        taken = self._taken.get(request_id.client)
        if taken is None or request_id not in taken:
            return
        self.taken_bytes -= taken.pop(request_id)
        self._freed[request_id.client] = None
        if not taken:
            del self._taken[request_id.client]

    def forget(self, client: str) -> None:
        """The client has left."""
        self.taken_bytes -= sum(self._taken.pop(client, {}).values())
        self._freed[client] = None
        self._bytes_per_token.pop(client, None)

    def free_sent(self, client: str, unfinished: set[RequestId]) -> None:
        """The client's connection is gone, with all that was on it; not what is still computed."""
        for request_id in [id_ for id_ in self._taken.get(client, {}) if id_ not in unfinished]:
            self.free(request_id)

    def take_freed(self) -> list[str]:
        """Clients for whom anything was freed since the last call."""
        freed, self._freed = list(self._freed), {}
        return freed

    def _expected(self, client: str, n_tokens: int) -> int:
        """As its last reply, or anybody's; before any, a quarter of what a client may have."""
        known = self._bytes_per_token.get(client, self._last_bytes_per_token)
        return self.client_bytes // 4 if known is None else int(known * max(1, n_tokens))

    def _put(self, request_id: RequestId, nbytes: int) -> None:
        self.free(request_id)
        self._taken[request_id.client][request_id] = nbytes
        self.taken_bytes += nbytes

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        assert all(self._taken.values())
        assert self.taken_bytes == sum(sum(taken.values()) for taken in self._taken.values())
