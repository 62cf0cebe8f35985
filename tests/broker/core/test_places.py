"""A request is in one place, and goes where the table says."""

from __future__ import annotations

import pytest

from broker.core.events import Side
from broker.core.inspect import snapshot
from broker.core.places import COUNTED, TRANSITIONS, IllegalMoveError, Place
from broker.protocol import messages as m
from tests.broker.core.rig import Rig


def test_every_place_can_be_reached_and_left() -> None:
    assert set(TRANSITIONS) == set(Place)
    reached = set().union(*TRANSITIONS.values())
    assert reached == set(Place) - {Place.NEW}
    assert all(Place.ENDED in TRANSITIONS[place] for place in Place if place is not Place.ENDED)
    assert not TRANSITIONS[Place.ENDED]


def test_an_illegal_move_names_the_request_its_places_and_its_story() -> None:
    rig = Rig()
    rig.client("c")
    asked = rig.ask("c", 1)
    rig.now += 2
    entry = rig.core.entries[asked]
    entry.story.append("something happened")
    with pytest.raises(IllegalMoveError) as error:
        rig.core.places.move(entry, Place.PASSING, "", rig.now)
    text = str(error.value)
    assert "c#1 cannot go from POOL to PASSING" in text
    assert "something happened" in text
    assert "2.0 s waiting for a pool" in text
    assert entry.place is Place.POOL


def test_each_place_is_counted_while_requests_are_in_it() -> None:
    rig = Rig(max_client_request_bytes=2000)
    rig.client("c")
    asked = [rig.ask("c", number) for number in (1, 2)]

    def there() -> dict[str, int]:
        return {k: n for k, n in snapshot(rig.core, rig.now)["places"].items() if n}

    assert set(snapshot(rig.core, rig.now)["places"]) == {p.name.lower() for p in COUNTED}
    assert there() == {"pool": 2}
    rig.worker("w")
    assert there() == {"running": 1, "queued": 1}
    rig.reply("w", asked[0])
    assert there() == {"running": 1}
    rig.cut(Side.WORKER, "w")
    assert there() == {"queued": 1}
    rig.from_client("c", m.Cancel(asked[1]))
    assert there() == {}


def test_an_error_says_how_long_the_request_was_where() -> None:
    rig = Rig()
    rig.client("c")
    rig.worker("w")
    rig.ask("c", 1, ttl_s=100.0)
    rig.ask("c", 2, ttl_s=20.0)
    rig.pass_time(30.0, (Side.CLIENT, "c"), (Side.WORKER, "w"))
    (failure,) = rig.got("c", m.Failure)
    assert failure.code == "expired"  # type: ignore[union-attr]
    assert "s queued for a worker" in failure.text  # type: ignore[union-attr]
