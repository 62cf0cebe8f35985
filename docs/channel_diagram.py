"""Draws the diagram in ``direct.md``: ``python -m docs.channel_diagram``."""

from __future__ import annotations

import re
from pathlib import Path

from worker.direct.channel import TRANSITIONS, ChannelState

PATH = Path(__file__).with_name("direct.md")
_BEGIN, _END = "<!-- diagram: begin -->\n", "<!-- diagram: end -->\n"


def render(document: str) -> str:
    """The document with its diagram made anew."""
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {ChannelState.IDLE.value}"]
    lines += [
        f"    {source.value} --> {target.value}: {event.__name__}"
        for (source, event), target in TRANSITIONS.items()
    ]
    lines += [f"    {ChannelState.CLOSED.value} --> [*]", "```"]
    wanted = _BEGIN + "\n".join(lines) + "\n" + _END
    return re.sub(f"{_BEGIN}.*?{_END}", lambda _: wanted, document, flags=re.DOTALL)


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
