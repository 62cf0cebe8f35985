"""What a training process measures of its steps, and how Prometheus reads that and its client."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from broker.errors import BrokerError
from broker.histogram import Histogram
from broker.keys.operators import door
from broker.watch.exposition import Metric, Sample, Snapshot, one
from broker.watch.http import HttpServer
from broker.watch.pages import peer_pages
from trainer_client.core import COUNTERS
from trainer_client.errors import TrainerClientError

if TYPE_CHECKING:
    from trainer_client.training.trainer import StepMetrics


class TrainerMeasures:
    """Told of each step by the training loop; others may look."""

    def __init__(self) -> None:
        self.step_s = Histogram()
        self.waited_s = 0.0
        self.tokens = 0.0
        self.last: StepMetrics | None = None

    def step(self, step: StepMetrics) -> None:
        """An optimizer step is done."""
        self.step_s.observe(step.seconds)
        self.waited_s += step.waiting_share * step.seconds
        self.tokens += step.tokens_per_s * step.seconds
        self.last = step

    def plain(self) -> dict[str, Any]:
        """All of it as plain values."""
        last = self.last
        return {
            "step_s": self.step_s.plain(),
            "waited_s": self.waited_s,
            "tokens": self.tokens,
            "step": last.step if last else 0,
            "loss": last.loss if last else None,
            "accept_length": last.accept_length if last else None,
            "learning_rate": last.learning_rate if last else None,
            "peak_memory_bytes": last.peak_memory_bytes if last else None,
            "prefetch": last.prefetch if last else None,
        }


@contextlib.contextmanager
def served(
    address: str | None,
    rank: int,
    snapshot: Callable[[], dict[str, Any]],
    *,
    http_token: str | os.PathLike[str] | None = None,
) -> Iterator[str | None]:
    """Serve ``/metrics``, ``/status`` and ``/healthz`` on ``HOST:PORT``; gives where.

    Each rank has a port of its own: the first rank's, plus its rank. Raises
    :class:`TrainerClientError` when that one is not to be had, or other machines reach it and
    ``http_token`` is neither the file of the operators' token nor ``none``.
    """
    if not address:
        yield None
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise TrainerClientError(f"{address!r} is no address; give --http HOST:PORT")
    number = int(port) + rank if int(port) else 0
    try:
        admits = door(f"{host}:{number}", http_token)
        server = HttpServer(f"{host}:{number}", peer_pages(METRICS, snapshot), admits)
    except BrokerError as error:
        raise TrainerClientError(str(error)) from error
    server.start()
    try:
        yield server.address
    finally:
        server.stop()


def _of(part: str, key: str) -> Callable[[Snapshot], list[Sample]]:
    """A value that may not be there yet."""

    def read(snapshot: Snapshot) -> list[Sample]:
        value = snapshot[part][key]
        return [] if value is None else one(value)

    return read


def _counter(name: str, text: str) -> Metric:
    return Metric(f"draftmq_trainer_{name}_total", "counter", text, _of("counters", name))


METRICS = (
    *(_counter(name, text) for name, text in COUNTERS.items()),
    Metric(
        "draftmq_trainer_reply_seconds",
        "histogram",
        "From a request's submission to its reply's arrival.",
        lambda s: one(s["reply_s"]),
    ),
    Metric(
        "draftmq_trainer_unfinished",
        "gauge",
        "Requests without an answer, sent or not.",
        lambda s: one(s["unfinished"]),
    ),
    Metric(
        "draftmq_trainer_unsent",
        "gauge",
        "Those of them that no broker has, for want of a window.",
        lambda s: one(s["unsent"]),
    ),
    Metric(
        "draftmq_trainer_broker_attached",
        "gauge",
        "1 while this broker is attached.",
        lambda s: [((e,), state == "ready") for e, state in s["brokers"].items()],
        ("endpoint",),
    ),
    Metric(
        "draftmq_trainer_step_seconds",
        "histogram",
        "One optimizer step.",
        _of("training", "step_s"),
    ),
    Metric(
        "draftmq_trainer_waited_seconds_total",
        "counter",
        "Time spent waiting for supervision; its rate is the waiting share.",
        _of("training", "waited_s"),
    ),
    Metric(
        "draftmq_trainer_tokens_total",
        "counter",
        "Tokens trained, of all ranks.",
        _of("training", "tokens"),
    ),
    Metric("draftmq_trainer_step", "gauge", "Steps done.", _of("training", "step")),
    Metric("draftmq_trainer_loss", "gauge", "Loss of the last step.", _of("training", "loss")),
    Metric(
        "draftmq_trainer_accept_length",
        "gauge",
        "Simulated accept length of the last step.",
        _of("training", "accept_length"),
    ),
    Metric(
        "draftmq_trainer_learning_rate",
        "gauge",
        "Learning rate of the last step.",
        _of("training", "learning_rate"),
    ),
    Metric(
        "draftmq_trainer_prefetch",
        "gauge",
        "Requests kept ahead of the trainer.",
        _of("training", "prefetch"),
    ),
    Metric(
        "draftmq_trainer_peak_memory_bytes",
        "gauge",
        "The most memory taken so far: of a GPU's, else of RAM.",
        _of("training", "peak_memory_bytes"),
    ),
)
