"""Writes the table of metrics in ``observability.md``: ``python -m docs.metrics_table``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from broker.core import BrokerCore
from broker.watch.exposition import Metric
from broker.watch.metrics import metrics
from trainer_client.watch.metrics import METRICS as TRAINER
from worker.metrics import METRICS as WORKER

PATH = Path(__file__).with_name("observability.md")
_BEGIN, _END = "<!-- metrics: begin -->\n", "<!-- metrics: end -->\n"


def render(document: str) -> str:
    """The document with its table made anew."""
    counters = tuple(BrokerCore("any").counters)
    parts = (
        _table("The broker's", metrics(counters)),
        _table("A worker's", WORKER),
        _table("A trainer's", TRAINER),
    )
    wanted = _BEGIN + "\n" + "\n".join(parts) + "\n" + _END
    return re.sub(f"{_BEGIN}.*?{_END}", lambda _: wanted, document, flags=re.DOTALL)


def _table(title: str, of: Sequence[Metric]) -> str:
    lines = [f"### {title}\n", "| metric | kind | labels | is |", "|---|---|---|---|"]
    for metric in of:
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        lines.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.help} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
