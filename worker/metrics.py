"""What a worker measures of its requests, and how Prometheus reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from broker.histogram import Histogram
from broker.protocol import Packet
from broker.protocol import messages as m
from broker.watch.exposition import Metric, one


class WorkerMeasures:
    """Told of each forward by the target's thread, of each answer by the encoding one; others
    may look.
    """

    def __init__(self) -> None:
        self.replies = 0
        #: failure code -> how many
        self.failures: Counter[str] = Counter()
        #: from arrival until the target is free for it
        self.wait_s = Histogram()
        #: the target's forward and the supervision made from it, on its device
        self.compute_s = Histogram()
        #: the target's time, also for what failed; its rate is the share that it works
        self.busy_s = 0.0
        #: requests that the target is done with
        self.computed = 0
        self.tokens = 0
        self.request_bytes = 0
        self.answer_bytes = 0
        #: tensor ("states", "last") -> the relative error of fp8 in the first batch of a wish
        self.fp8_errors: dict[str, float] = {}

    @property
    def staged(self) -> int:
        """Requests that the target is done with and whose answers are still being made."""
        return max(0, self.computed - self.replies - sum(self.failures.values()))

    def answered(
        self, packet: Packet, answer: Sequence[Packet], waited_s: float, compute_s: float
    ) -> None:
        """A request's answer is made: the reply with its parts, or the failure."""
        assert isinstance(packet.message, m.Request)
        first = answer[0].message
        self.wait_s.observe(waited_s)
        self.busy_s += compute_s
        self.request_bytes += packet.nbytes
        self.answer_bytes += sum(each.nbytes for each in answer)
        if isinstance(first, m.Reply):
            self.replies += 1
            self.tokens += packet.message.n_tokens
            self.compute_s.observe(compute_s)
        elif isinstance(first, m.Failure):
            self.failures[first.code] += 1

    def plain(self) -> dict[str, Any]:
        """All of it as plain values."""
        return {
            "replies": self.replies,
            "failures": dict(self.failures),
            "busy_s": self.busy_s,
            "staged": self.staged,
            "tokens": self.tokens,
            "request_bytes": self.request_bytes,
            "answer_bytes": self.answer_bytes,
            "fp8_errors": dict(self.fp8_errors),
            "wait_s": self.wait_s.plain(),
            "compute_s": self.compute_s.plain(),
        }


METRICS = (
    Metric(
        "draftmq_worker_replies_total", "counter", "Requests computed.", lambda s: one(s["replies"])
    ),
    Metric(
        "draftmq_worker_failures_total",
        "counter",
        "Requests that ended without a result, by the reason.",
        lambda s: [((code,), count) for code, count in sorted(s["failures"].items())],
        ("code",),
    ),
    Metric(
        "draftmq_worker_wait_seconds",
        "histogram",
        "From a request's arrival until the target is free for it.",
        lambda s: one(s["wait_s"]),
    ),
    Metric(
        "draftmq_worker_compute_seconds",
        "histogram",
        "Computing one request; of a forward for several, its part by tokens.",
        lambda s: one(s["compute_s"]),
    ),
    Metric(
        "draftmq_worker_busy_seconds_total",
        "counter",
        "The target at work; its rate is the share of time that it works, the rest it is idle.",
        lambda s: one(s["busy_s"]),
    ),
    Metric(
        "draftmq_worker_tokens_total",
        "counter",
        "Tokens (B*T) computed.",
        lambda s: one(s["tokens"]),
    ),
    Metric(
        "draftmq_worker_request_bytes_total",
        "counter",
        "Bytes of the requests.",
        lambda s: one(s["request_bytes"]),
    ),
    Metric(
        "draftmq_worker_answer_bytes_total",
        "counter",
        "Bytes of the answers.",
        lambda s: one(s["answer_bytes"]),
    ),
    Metric(
        "draftmq_worker_fp8_relative_error",
        "gauge",
        "Norm of what fp8 lost over that of the states, in the first batch of the newest wish.",
        lambda s: [((name,), error) for name, error in s["fp8_errors"].items()],
        ("tensor",),
    ),
    Metric(
        "draftmq_worker_held",
        "gauge",
        "Requests here: computing, waiting, or answered while no broker can be reached.",
        lambda s: one(s["held"]),
    ),
    Metric(
        "draftmq_worker_computing",
        "gauge",
        "1 while the target works.",
        lambda s: one(s["computing"]),
    ),
    Metric(
        "draftmq_worker_staged",
        "gauge",
        "Requests that the target is done with and whose answers are still being made.",
        lambda s: one(s["staged"]),
    ),
    Metric(
        "draftmq_worker_draining",
        "gauge",
        "1 once the worker leaves.",
        lambda s: one(s["draining"]),
    ),
    Metric(
        "draftmq_worker_broker_attached",
        "gauge",
        "1 while this broker is attached.",
        lambda s: [((e,), state == "ready") for e, state in s["brokers"].items()],
        ("endpoint",),
    ),
)
