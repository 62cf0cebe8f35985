"""A ticket is in one place, and goes where the table says."""

from __future__ import annotations

import pytest

from tests.trainer_client.core.test_machine import A, Rig
from trainer_client.core.places import TRANSITIONS, IllegalMoveError, Place


def test_every_place_can_be_reached_and_ends() -> None:
    assert set(TRANSITIONS) == set(Place)
    assert set().union(*TRANSITIONS.values()) == set(Place)
    assert not TRANSITIONS[Place.ENDED]
    waits = set(Place) - {Place.NEW, Place.ENDED}
    assert all(Place.ENDED in TRANSITIONS[place] for place in waits)


def test_a_ticket_says_where_it_is_and_an_illegal_move_is_an_error() -> None:
    rig = Rig()
    rig.submit(1)
    (ticket,) = rig.core.tickets.values()
    assert ticket.place is Place.WAITING
    with pytest.raises(IllegalMoveError, match="from WAITING to ARRIVING"):
        rig.core.move(ticket, Place.ARRIVING)
    rig.welcome(A)
    assert ticket.place is Place.IN_FLIGHT
