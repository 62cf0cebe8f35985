"""What HTTP ports serve: the broker a page for people, all of them what probes and tools read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from broker.watch import exposition
from broker.watch.exposition import Metric
from broker.watch.http import Page, Pages, as_json, text
from broker.watch.metrics import metrics

Values = dict[str, Any]
_UNAVAILABLE = "503 Service Unavailable"


def pages(
    snapshot: Callable[[], Values], trace: Callable[[], Values], alive: Callable[[], bool]
) -> Pages:
    """The pages of one broker; the functions may be called from any thread."""

    def healthy(environ: Mapping[str, Any]) -> Page:
        """Healthy while the loop goes round: what stands still should be started anew."""
        if alive():
            return text("ok")
        return text("the loop stands still", _UNAVAILABLE)

    def ready(environ: Mapping[str, Any]) -> Page:
        """Ready once a worker is there: requests sent now will be served."""
        if snapshot()["workers"]:
            return text("ready")
        return text("no worker is attached", _UNAVAILABLE)

    def exposed(environ: Mapping[str, Any]) -> Page:
        seen = snapshot()
        return exposition.page(metrics(tuple(seen["counters"])), seen, environ)

    live = (Path(__file__).parent / "page.html").read_bytes()
    return {
        "/": lambda environ: ("200 OK", "text/html; charset=utf-8", live),
        "/healthz": healthy,
        "/readyz": ready,
        "/status": lambda environ: as_json(snapshot()),
        "/metrics": exposed,
        "/trace": lambda environ: as_json(trace()),
    }


def peer_pages(
    metrics: Sequence[Metric],
    snapshot: Callable[[], Values],
    trouble: Callable[[], str] = str,
) -> Pages:
    """The pages of a worker or a trainer; it is ready where it has no ``trouble``."""

    def ready(environ: Mapping[str, Any]) -> Page:
        why = trouble()
        return text(why, _UNAVAILABLE) if why else text("ready")

    return {
        "/readyz": ready,
        "/healthz": lambda environ: text("ok"),
        "/status": lambda environ: as_json(snapshot()),
        "/metrics": lambda environ: exposition.page(metrics, snapshot(), environ),
    }
