"""Writes the tables in ``gpu.md`` from ``gpu.json``: ``python -m docs.gpu_table``."""

from __future__ import annotations

import json
from pathlib import Path

PATH = Path(__file__).with_name("gpu.md")
_BEGIN, _END = "<!-- gpu: begin -->\n", "<!-- gpu: end -->\n"


def render(text: str) -> str:
    """The page with the tables of the figures."""
    known = json.loads(PATH.with_suffix(".json").read_text(encoding="utf-8"))
    parts = []
    for run in known["runs"]:
        title = f"### {run['card']}: {run['of']}"
        made = (
            f"{run['date']}, torch {run['torch']}, driver {run['driver']}; one run, medians in it."
        )
        rows = "".join(f"| {kind} | {what} | {found} |\n" for kind, what, found in run["rows"])
        parts.append(f"{title}\n\n{made}\n\n| | what | seen |\n|---|---|---|\n{rows}\n")
    never = "".join(f"- {what}\n" for what in known["never"])
    parts.append(f"### What has never run\n\n{never}")
    before, _, rest = text.partition(_BEGIN)
    return before + _BEGIN + "".join(parts) + _END + rest.partition(_END)[2]


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
