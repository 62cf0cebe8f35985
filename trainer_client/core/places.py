"""Where a ticket is: in exactly one place, and moved by :meth:`Ledger.move` along this table."""

from __future__ import annotations

import enum


class Place(enum.Enum):
    """Each value reads on after "the request is"."""

    NEW = "submitted, or to be asked anew"
    WAITING = "waiting for a broker with room in its window"
    IN_FLIGHT = "at a broker"
    ARRIVING = "at a broker, and parts of its reply are here"
    RECEIVING = "answered, and its tensors come directly"
    ENDED = "ended"


_P = Place
TRANSITIONS: dict[Place, frozenset[Place]] = {
    _P.NEW: frozenset({_P.WAITING}),
    _P.WAITING: frozenset({_P.IN_FLIGHT, _P.RECEIVING, _P.ENDED}),
    _P.IN_FLIGHT: frozenset({_P.ARRIVING, _P.RECEIVING, _P.WAITING, _P.ENDED}),
    _P.ARRIVING: frozenset({_P.IN_FLIGHT, _P.ARRIVING, _P.RECEIVING, _P.WAITING, _P.ENDED}),
    _P.RECEIVING: frozenset({_P.NEW, _P.RECEIVING, _P.ENDED}),
    _P.ENDED: frozenset(),
}


class IllegalMoveError(AssertionError):
    """A mistake of the client's own: a ticket was moved where it cannot go from where it is."""
