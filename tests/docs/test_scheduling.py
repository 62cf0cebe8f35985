"""The page about scheduling shows the places as they are."""

from __future__ import annotations

from broker.core.places import COUNTED
from docs.places_diagram import PATH, render


def test_the_diagram_is_the_table() -> None:
    document = PATH.read_text(encoding="utf-8")
    assert render(document) == document, "run python -m docs.places_diagram"


def test_every_place_is_explained() -> None:
    document = PATH.read_text(encoding="utf-8")
    for place in COUNTED:
        assert f"| `{place.name.lower()}` |" in document
