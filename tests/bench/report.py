"""What a run of the benchmarks leaves behind: a table, a JSON file and a picture."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from tests.bench.lines import Line


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "processor": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def write_json(path: Path, lines: Sequence[Line]) -> None:
    """``{"machine": {...}, "lines": {NAME: {"value", "unit", "wants", "holds", "peer", ...}}}``."""
    said = {
        line.name: {
            "value": line.value,
            "unit": line.unit,
            "wants": line.wants,
            "holds": line.holds,
            "peer": line.peer,
            "peer_value": line.peer_value,
        }
        for line in lines
    }
    assert len(said) == len(lines), "two figures of the same name"
    path.write_text(json.dumps({"machine": machine(), "lines": said}, indent=2) + "\n")


def table(parts: Mapping[str, Sequence[Line]]) -> Table:
    """All lines, part by part; a line without a bound is there to be seen."""
    shown = Table("", "figure", "value", "wants", "", "beside", title="draftmq's benchmarks")
    for part, lines in parts.items():
        for line in lines:
            verdict = ("[green]holds" if line.holds else "[red]falls short") if line.wants else ""
            beside = "" if line.peer is None else f"{line.peer}: {_figure(line.peer_value)}"
            value = f"{_figure(line.value)} {line.unit}"
            shown.add_row(part, line.name, value, line.wants, verdict, beside)
        shown.add_section()
    return shown


def draw(path: Path, parts: Mapping[str, Sequence[Line]]) -> None:
    """One panel for each part and unit: our figures as bars, each peer's as a mark on them."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (part, unit, [line for line in lines if line.unit == unit])
        for part, lines in parts.items()
        for unit in dict.fromkeys(line.unit for line in lines)
    ]
    heights = [1.5 + len(lines) for _, _, lines in panels]
    figure, axes = plt.subplots(
        len(panels),
        figsize=(11, 0.24 * sum(heights) + 1),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    for axis, (part, unit, lines) in zip(axes[:, 0], panels, strict=True):
        names = [line.name for line in lines]
        colors = ["tab:blue" if line.holds else "tab:red" for line in lines]
        axis.barh(names, [line.value for line in lines], color=colors)
        beside = [line for line in lines if line.peer_value is not None]
        axis.plot([line.peer_value for line in beside], [line.name for line in beside], "kd", ms=5)
        axis.set_xlabel(f"{part}: {unit}")
        axis.invert_yaxis()
        if max(line.value for line in lines) > 100 * max(min(line.value for line in lines), 1e-9):
            axis.set_xscale("log")
    figure.suptitle("bars: draftmq, red where it falls short; diamonds: what is beside it")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _figure(value: float | None) -> str:
    return "not here" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
