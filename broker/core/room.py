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
        self._freed = False
        #: client -> request -> bytes; no empty ones
        self._taken: defaultdict[str, dict[RequestId, int]] = defaultdict(dict)
        #: client -> bytes of its last reply, for one token
        self._bytes_per_token: dict[str, float] = {}

    def has(self, client: str, n_tokens: int) -> bool:
        """Whether a reply to so many tokens may come for this client."""
        more = self._expected(client, n_tokens)
        taken = sum(self._taken[client].values()) if client in self._taken else 0
        fits_client = not taken or taken + more <= self.client_bytes
        return fits_client and (not self._taken or self.taken_bytes + more <= self.total_bytes)

    def expect(self, request_id: RequestId, n_tokens: int) -> None:
        """A worker computes this reply."""
        self._put(request_id, self._expected(request_id.client, n_tokens))

    def owe(self, request_id: RequestId, n_tokens: int, nbytes: int) -> None:
        """The reply came, and is on its way to the client."""
        self._bytes_per_token[request_id.client] = nbytes / max(1, n_tokens)
        self._put(request_id, nbytes)

    def free(self, request_id: RequestId) -> None:
        """The client has it, or nobody wants it any more."""
        taken = self._taken.get(request_id.client)
        if taken is None or request_id not in taken:
            return
        self.taken_bytes -= taken.pop(request_id)
        self._freed = True
        if not taken:
            del self._taken[request_id.client]

    def forget(self, client: str) -> None:
        """The client has left."""
        self.taken_bytes -= sum(self._taken.pop(client, {}).values())
        self._freed = True
        self._bytes_per_token.pop(client, None)

    def free_sent(self, client: str, unfinished: set[RequestId]) -> None:
        """The client's connection is gone, with all that was on it; not what is still computed."""
        for request_id in [id_ for id_ in self._taken.get(client, {}) if id_ not in unfinished]:
            self.free(request_id)

    def was_freed(self) -> bool:
        """Whether anything was freed since the last call."""
        freed, self._freed = self._freed, False
        return freed

    def _expected(self, client: str, n_tokens: int) -> int:
        """Before the first reply, a quarter of what the client may have: four may be under way."""
        known = self._bytes_per_token.get(client)
        return self.client_bytes // 4 if known is None else int(known * max(1, n_tokens))

    def _put(self, request_id: RequestId, nbytes: int) -> None:
        self.free(request_id)
        self._taken[request_id.client][request_id] = nbytes
        self.taken_bytes += nbytes

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        assert all(self._taken.values())
        assert self.taken_bytes == sum(sum(taken.values()) for taken in self._taken.values())
