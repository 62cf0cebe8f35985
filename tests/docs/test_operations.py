"""The sizes in operations.md come from the code, and from what other pages say was measured."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from docs import sizing_table
from tests.integration.memory import BASE_BYTES, CONNECTION_BYTES

DOCS = Path(__file__).parents[2] / "docs"
TEXT = sizing_table.PATH.read_text(encoding="utf-8")


def test_the_tables_are_those_of_the_code() -> None:
    assert sizing_table.render(TEXT) == TEXT, "run python -m docs.sizing_table"
    assert "| workers + trainer ranks |" in TEXT


def test_what_was_measured_is_what_its_page_says() -> None:
    gpu = (DOCS / "gpu.md").read_text(encoding="utf-8")
    bench = (DOCS / "benchmarks.md").read_text(encoding="utf-8")
    supply = re.search(r"by CUDA IPC, 1x2048 / 4x2048 \| 25,560 /", gpu)
    assert supply, "the H100's rate has changed: see docs/sizing_table.py"
    assert sizing_table.SUPPLY == 25_560
    assert f"/ {sizing_table.STEP_MS} ms" in gpu
    assert f", {sizing_table.WIRE} GiB/s" in bench
    assert f", {sizing_table.REQUESTS:,} |" in bench
    assert (sizing_table.BASE_BYTES, sizing_table.CONNECTION_BYTES) == (
        BASE_BYTES,
        CONNECTION_BYTES,
    )


def test_half_of_the_gpus_or_a_little_more_serve() -> None:
    for gpus in (8, 64):
        workers = sizing_table.workers_of(gpus)
        best = sizing_table.tokens_per_second(workers, gpus - workers)
        for others in range(1, gpus):
            assert sizing_table.tokens_per_second(others, gpus - others) <= best


def test_every_alert_has_its_row() -> None:
    rules = yaml.safe_load((DOCS.parent / "deploy/prometheus/alerts.yml").read_text())
    alerts = {rule["alert"] for group in rules["groups"] for rule in group["rules"]}
    assert set(re.findall(r"^\| `(Draftmq\w+)` \|", TEXT, re.M)) == alerts
