from __future__ import annotations

from pathlib import Path

from docs import metrics_table

TEXT = metrics_table.PATH.read_text(encoding="utf-8")


def test_the_table_of_metrics_is_current() -> None:
    assert metrics_table.render(TEXT) == TEXT, "run python -m docs.metrics_table"
    assert TEXT.count("| `draftmq_") > 30


def test_the_picture_is_small() -> None:
    assert (Path(metrics_table.PATH.parent) / "images" / "status-page.png").stat().st_size < 150_000
