"""Draws the diagram in ``scheduling.md``: ``python -m docs.places_diagram``."""

from __future__ import annotations

import re
from pathlib import Path

from broker.core.places import TRANSITIONS, Place

PATH = Path(__file__).with_name("scheduling.md")
_BEGIN, _END = "<!-- diagram: begin -->\n", "<!-- diagram: end -->\n"


def render(document: str) -> str:
    """The document with its diagram made anew, without the arrows to the end: all have one."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {_name(Place.NEW)}"]
    lines += [
        f"    {_name(source)}: {source.value}"
        for source in TRANSITIONS
        if source is not Place.ENDED
    ]
    lines += [
        f"    {_name(source)} --> {_name(target)}"
        for source, targets in TRANSITIONS.items()
        for target in Place
        if target in targets and target is not Place.ENDED
    ]
    lines += [
        f"    {_name(Place.RUNNING)} --> [*]: answered",
        f"    {_name(Place.PASSING)} --> [*]: acknowledged",
        "```",
    ]
    wanted = _BEGIN + "\n".join(lines) + "\n" + _END
    return re.sub(f"{_BEGIN}.*?{_END}", lambda _: wanted, document, flags=re.DOTALL)


def _name(place: Place) -> str:
    return place.name.lower()


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
