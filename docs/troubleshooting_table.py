"""Writes the tables in ``troubleshooting.md``: ``python -m docs.troubleshooting_table``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from broker.catalog import CODES, EVENTS, Known

PATH = Path(__file__).with_name("troubleshooting.md")
_BEGIN, _END = "<!-- catalog: begin -->\n", "<!-- catalog: end -->\n"


def render(document: str) -> str:
    """The document with its tables made anew."""
    parts = [_table("Error codes", "code", CODES)]
    parts += [_table(f"Log events of {part}", "event", events) for part, events in EVENTS.items()]
    wanted = _BEGIN + "\n" + "\n".join(parts) + "\n" + _END
    return re.sub(f"{_BEGIN}.*?{_END}", lambda _: wanted, document, flags=re.DOTALL)


def _table(title: str, kind: str, of: Mapping[str, Known]) -> str:
    lines = [f"## {title}\n", f"| {kind} | why | what to do |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {known.cause} | {known.remedy or 'nothing'} |"
        for name, known in sorted(of.items())
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
