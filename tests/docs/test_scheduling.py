"""The page about scheduling shows the places as they are."""

from __future__ import annotations

import re
from itertools import pairwise

from broker.core.places import COUNTED, TRANSITIONS, Place
from docs.places_diagram import PATH, render


def test_the_diagram_is_the_table() -> None:
    document = PATH.read_text(encoding="utf-8")
    assert render(document) == document, "run python -m docs.places_diagram"


def test_every_place_is_explained() -> None:
    document = PATH.read_text(encoding="utf-8")
    for place in COUNTED:
        assert f"| `{place.name.lower()}` |" in document


def test_the_short_diagram_in_the_architecture_has_moves_of_the_table() -> None:
    page = PATH.with_name("architecture.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^accepted .*$", page, re.M)
    names = re.findall(r"\w+", line)
    assert names == ["accepted", "queued", "running", "passing", "acknowledged"]
    path = [Place.NEW, Place.QUEUED, Place.RUNNING, Place.PASSING, Place.ENDED]
    again = [(Place.RUNNING, Place.QUEUED), (Place.PASSING, Place.QUEUED)]
    for before, after in [*pairwise(path), *again]:
        assert after in TRANSITIONS[before]
