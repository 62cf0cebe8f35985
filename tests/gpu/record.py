"""Adds the figures of ``tests/gpu/run.sh OUT`` to the docs: ``python -m tests.gpu.record OUT``.

A run is added to ``docs/gpu.json``, and the tables of ``docs/gpu.md`` are made from that.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs import gpu_table

#: What it is, what was measured, what was seen.
Row = tuple[str, str, str]


def of_tests(path: Path) -> Iterator[Row]:
    (suite,) = ElementTree.parse(path).getroot().iter("testsuite")
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    yield "tests", "tests/gpu", f"{passed} passed, {failed} failed, {counts['skipped']} skipped"


def of_ends(found: dict[str, Any]) -> Iterator[Row]:
    for name, same in found["same_losses"].items():
        said = "the same, bit for bit" if same else "differ"
        yield "ends", f"losses of {name} and by wire, through a killed worker", said
    rates = [f"{name} {run['tokens_per_s']:,.0f}" for name, run in found.items() if "-" in name]
    yield "ends", "tokens/s of the trainers, all at once", ", ".join(rates)


def of_compiled(found: dict[str, Any]) -> Iterator[Row]:
    late = f"{len(found['late'])} of many shapes made code later"
    yield (
        "compiled",
        "embedded target, 8 rows: eager / compiled",
        (f"{found['eager_ms']:.1f} / {found['compiled_ms']:.1f} ms; {late}"),
    )


def of_channel(found: dict[str, Any]) -> Iterator[Row]:
    rates = ", ".join(f"{size}: {rate:.0f}" for size, rate in found["gib_per_s"].items())
    yield "channel", "GiB/s, idle", rates
    trainer = found["trainer"]
    for way, ms in trainer["receive_ms"].items():
        gap = trainer["longest_ms_between_launches"][way]
        yield "channel", f"64 MiB, {way}", f"{ms:.2f} ms; launches stood still {gap:.1f} ms at most"
    dead = found["dead_trainers"]
    said = f"{dead['left_mib']:.0f} MiB"
    yield "channel", f"left allocated by {len(dead['errors'])} trainers that died", said
    yield "channel", "a trainer with another /dev/shm", json.dumps(found["own_shm"])


def of_supply(found: dict[str, Any]) -> Iterator[Row]:
    alone = found["forward_tokens_per_s"]
    for shape, rate in alone.items():
        yield "supply", f"forward alone, {shape}", f"{rate:,.0f} tokens/s"
    for way in found["ways"]:
        if "error" in way:
            yield "supply", " ".join(map(str, way["way"])), "failed"
            continue
        share = [rate for shape, rate in alone.items() if shape.startswith(f"{way['rows']}x")]
        of = f" ({100 * way['tokens_per_s'] / share[0]:.0f} %)" if share else ""
        said = f"{way['tokens_per_s']:,.0f} tokens/s{of}"
        yield "supply", f"by {way['direct']} to {way['device']}, {way['rows']} rows", said


def of_step(found: dict[str, Any]) -> Iterator[Row]:
    for case in found["cases"]:
        shape = f"{case['model']}, T={case['tokens']}, D={case['draft_vocab']}"
        what = f"{shape}, {case['depths']} depths, attention {case['attention']}"
        share = f"{100 * case['share_of_product']:.0f} % of a product's rate"
        launches = f"launches {case['host_ms']:.0f} ms"
        rate = f"{case['tokens_per_s']:,.0f} tokens/s"
        yield "step", what, f"{case['ms']:.1f} ms, {rate}, {share}, {launches}"


_ROWS = {
    "ends": of_ends,
    "compiled": of_compiled,
    "channel": of_channel,
    "supply": of_supply,
    "step": of_step,
}


def run_of(out: Path) -> dict[str, Any]:
    """One entry of ``docs/gpu.json``."""
    rows: list[Row] = []
    card: dict[str, Any] = {}
    if (out / "tests.xml").exists():
        rows += of_tests(out / "tests.xml")
    for name, rows_of in _ROWS.items():
        path = out / f"{name}.json"
        if path.exists():
            found = json.loads(path.read_text(encoding="utf-8"))
            card = {key: found[key] for key in ("card", "driver", "torch")}
            rows += rows_of(found)
    if not card:
        raise SystemExit(f"{out} has no figures: run tests/gpu/run.sh {out} first")
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    version = importlib.metadata.version("draftmq")
    return card | {"date": today, "of": version, "rows": [list(row) for row in rows]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--json", type=Path, default=gpu_table.PATH.with_suffix(".json"))
    wanted = parser.parse_args()
    known = json.loads(wanted.json.read_text(encoding="utf-8"))
    known["runs"].append(run_of(wanted.out))
    wanted.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    if wanted.json == gpu_table.PATH.with_suffix(".json"):
        page = gpu_table.render(gpu_table.PATH.read_text(encoding="utf-8"))
        gpu_table.PATH.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
