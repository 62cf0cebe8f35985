"""Metrics as Prometheus reads them, from plain snapshots: all three parts expose theirs so."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder

from broker.watch.http import Page

#: Label values, and a number or what :meth:`broker.histogram.Histogram.plain` gives.
Sample = tuple[tuple[str, ...], Any]
Snapshot = Mapping[str, Any]


@dataclass(frozen=True)
class Metric:
    """One metric: its full name, and how its samples are read from a snapshot."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    read: Callable[[Snapshot], Iterable[Sample]]
    labels: tuple[str, ...] = ()

    def family(self, snapshot: Snapshot) -> Family:
        """The metric with its samples, as prometheus_client writes it."""
        if self.kind == "histogram":
            histogram = HistogramMetricFamily(self.name, self.help, labels=self.labels)
            for labels, value in self.read(snapshot):
                bounds = [(str(float(bound)), count) for bound, count in value["buckets"]]
                histogram.add_metric(labels, [*bounds, ("+Inf", value["count"])], value["sum"])
            return histogram
        kind = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = kind(self.name, self.help, labels=self.labels)
        for labels, value in self.read(snapshot):
            family.add_metric(labels, value)
        return family


def one(value: Any) -> list[Sample]:
    """The only sample of a metric without labels."""
    return [((), value)]


def page(metrics: Sequence[Metric], snapshot: Snapshot, environ: Mapping[str, Any]) -> Page:
    """``/metrics``, in the format that the request wants.

    The process's own memory, CPU and file descriptors come with them, where there is a ``/proc``.
    """
    encode, content_type = choose_encoder(environ.get("HTTP_ACCEPT", ""))
    return "200 OK", content_type, encode(_Collected(metrics, snapshot))


class _Collected:
    """What prometheus_client takes for a registry: something to collect from, once."""

    def __init__(self, metrics: Sequence[Metric], snapshot: Snapshot) -> None:
        self._metrics = metrics
        self._snapshot = snapshot

    def collect(self) -> Iterator[Family]:
        for metric in self._metrics:
            yield metric.family(self._snapshot)
        yield from ProcessCollector(registry=None).collect()
