"""Where a request is: in exactly one place at any time, and moved by one function.

:data:`TRANSITIONS` is the only statement of which place may follow which; the counts in
``/status``, the warnings, the story in an error, the invariants and the diagram in the docs come
from it.
"""

from __future__ import annotations

import enum
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from broker.core.ledger import Ledger
    from broker.core.state import Entry


class Place(enum.Enum):
    """Each value reads on after "the request is"."""

    NEW = "accepted"
    REQUEST_ROOM = "waiting for room for its payload"
    RECALLED = "asked for again"
    POOL = "waiting for a pool"
    MAPPING = "waiting for its mapping"
    QUEUED = "queued for a worker"
    REPLY_ROOM = "waiting for room for its reply"
    RUNNING = "running"
    PASSING = "passing, its reply comes in parts"
    SUSPECTED = "suspected of having taken workers down"
    ENDED = "ended"


_P = Place
#: What a request that is to be served, or served again, may wait for next.
_ROUTED = {_P.POOL, _P.MAPPING, _P.QUEUED}
#: place -> the places that may follow it. What a worker brings along after a reconnect is running
#: wherever it waited before, and every request may end.
TRANSITIONS: dict[Place, frozenset[Place]] = {
    place: frozenset(following)
    for place, following in {
        _P.NEW: {_P.REQUEST_ROOM, _P.RUNNING, _P.ENDED} | _ROUTED,
        _P.REQUEST_ROOM: {_P.RECALLED, _P.RUNNING, _P.ENDED} | _ROUTED,
        _P.RECALLED: {_P.RUNNING, _P.ENDED} | _ROUTED,
        _P.POOL: {_P.RUNNING, _P.ENDED} | _ROUTED - {_P.POOL},
        _P.MAPPING: {_P.POOL, _P.QUEUED, _P.RUNNING, _P.ENDED},
        _P.QUEUED: {_P.MAPPING, _P.REPLY_ROOM, _P.RUNNING, _P.ENDED},
        _P.REPLY_ROOM: {_P.MAPPING, _P.QUEUED, _P.RUNNING, _P.ENDED},
        _P.RUNNING: {_P.PASSING, _P.SUSPECTED, _P.REQUEST_ROOM, _P.ENDED} | _ROUTED,
        _P.PASSING: {_P.SUSPECTED, _P.RUNNING, _P.ENDED} | _ROUTED,
        _P.SUSPECTED: {_P.RUNNING, _P.ENDED} | _ROUTED,
        _P.ENDED: set(),
    }.items()
}
#: The places of which there are counts: where a request can be when it is looked at.
COUNTED = tuple(place for place in Place if place not in (Place.NEW, Place.ENDED))


class IllegalMoveError(AssertionError):
    """A mistake of the broker's own: a request was moved where it cannot go from where it is."""


class Places:
    """Moves requests; the containers of the ledger are its indexes, written nowhere else."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.counts = dict.fromkeys(Place, 0)

    def move(self, entry: Entry, to: Place, why: str, now: float, *, again: bool = False) -> None:
        """Take a request from its place to the next; ``why`` it is there, for operators.

        ``again`` puts it before all new ones of a queue. Raises :class:`IllegalMoveError` with the
        request's story where the table has no such transition.
        """
        if to not in TRANSITIONS[entry.place]:
            raise IllegalMoveError(
                f"{entry.id} cannot go from {entry.place.name} to {to.name} ({why}); "
                + "; ".join([*entry.story, spent(entry, now)])
            )
        self._leave(entry)
        self.counts[entry.place] -= 1
        self.counts[to] += 1
        entry.spent_s[entry.place] = entry.spent_s.get(entry.place, 0.0) + now - entry.place_since
        entry.place, entry.place_since, entry.why = to, now, why
        self._enter(entry, now, again)

    def _leave(self, entry: Entry) -> None:
        ledger, place = self._ledger, entry.place
        ledger.timers.cancel(entry.timer)
        entry.timer = None
        if place is Place.POOL:
            del ledger.waiting_for_pool[entry.id]
        elif place is Place.MAPPING:
            waiting = ledger.waiting_for_mapping[entry.request.mapping_id]
            del waiting[entry.id]
            if not waiting:
                del ledger.waiting_for_mapping[entry.request.mapping_id]
        elif place is Place.QUEUED:
            ledger.pools[entry.pool].queue.remove(entry)
        elif place is Place.REPLY_ROOM:
            ledger.waiting_for_reply_room.discard(entry)
        elif place is Place.REQUEST_ROOM:
            ledger.waiting_for_request_room.discard(entry)
        elif place is Place.RECALLED:
            del ledger.recalled[entry.id]
        elif place is Place.SUSPECTED:
            del ledger.suspected[entry.id]

    def _enter(self, entry: Entry, now: float, again: bool) -> None:
        ledger, place = self._ledger, entry.place
        if place is Place.POOL:
            ledger.waiting_for_pool[entry.id] = entry
        elif place is Place.MAPPING:
            mapping = entry.request.mapping_id
            ledger.waiting_for_mapping.setdefault(mapping, {})[entry.id] = entry
        elif place is Place.QUEUED:
            ledger.pools[entry.pool].queue.push(entry, again=again, now=now)
        elif place is Place.REPLY_ROOM:
            ledger.waiting_for_reply_room.add(entry, now)
        elif place is Place.REQUEST_ROOM:
            ledger.waiting_for_request_room.add(entry, now)
        elif place is Place.RECALLED:
            ledger.recalled[entry.id] = entry
        elif place is Place.SUSPECTED:
            ledger.suspected[entry.id] = entry

    def holds(self, entry: Entry) -> dict[Place, bool]:
        """For each place whether the request is in it, by the index or what it says itself."""
        ledger, mapping = self._ledger, entry.request.mapping_id
        return {
            Place.POOL: entry.id in ledger.waiting_for_pool,
            Place.MAPPING: entry.id in ledger.waiting_for_mapping.get(mapping, {}),
            Place.QUEUED: bool(entry.pool) and entry in ledger.pools[entry.pool].queue,
            Place.REPLY_ROOM: entry in ledger.waiting_for_reply_room,
            Place.REQUEST_ROOM: entry in ledger.waiting_for_request_room,
            Place.RECALLED: entry.id in ledger.recalled,
            Place.SUSPECTED: entry.id in ledger.suspected,
            Place.RUNNING: bool(entry.workers),
            Place.PASSING: entry.passing is not None,
        }

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        entries = self._ledger.entries.values()
        for entry in entries:
            there = [place for place, holds in self.holds(entry).items() if holds]
            assert there == [entry.place], f"{entry} is in {there}, it says {entry.place}"
        counts = Counter(entry.place for entry in entries)
        assert {p: self.counts[p] for p in COUNTED} == {p: counts[p] for p in COUNTED}


def spent(entry: Entry, now: float) -> str:
    """Where the request has been for how long: the end of the story in every error."""
    times = dict(entry.spent_s)
    times[entry.place] = times.get(entry.place, 0.0) + now - entry.place_since
    long = [f"{seconds:.1f} s {place.value}" for place, seconds in times.items() if seconds >= 0.05]
    why = f" ({entry.why})" if entry.why else ""
    return f"it was {', '.join(long)}{why}" if long else f"it was {entry.place.value}{why}"
