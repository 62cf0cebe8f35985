"""The broker's metrics, read from what ``/status`` shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from broker.watch.exposition import Metric, Sample, Snapshot, one

_STATES = ("idle", "busy", "draining")
#: What the core's counters count. One that is not told of here is exposed with its name alone.
_COUNTED = {
    "requests": "Requests accepted.",
    "assignments": "Requests given to workers, again and again if need be.",
    "replies": "Replies passed on to trainers.",
    "direct_replies": "Of these, replies whose tensors went past the broker.",
    "reply_bytes": "Bytes that these replies had here.",
    "failures": "Requests that ended without a result.",
    "resends": "Requests that trainers sent again while they were here.",
    "answered_again": "Requests answered from the held answers, without another forward.",
    "recalls": "Requests asked for again, because there had been no room for their payload.",
    "requeues": "Requests queued again after their worker was lost or failed.",
    "hedges": "Requests run a second time elsewhere, because their worker was slow.",
    "hedges_won": "Of these, requests that the second worker answered first.",
    "late_answers": "Answers to requests that were already answered, cancelled or forgotten.",
    "unasked_answers": "Answers to what a worker had not been asked.",
    "expired": "Requests that nobody answered in time.",
    "bad_messages": "Messages that were not to be understood.",
    "failed_messages": "Messages whose handling failed here; each cost its connection.",
}


def metrics(counters: tuple[str, ...]) -> list[Metric]:
    """All metrics of a broker whose core counts ``counters``."""
    return [*_METRICS, *(_counter(name) for name in counters)]


def _counter(name: str) -> Metric:
    text = _COUNTED.get(name, f"The core's counter {name!r}.")
    full = f"draftmq_broker_{name}_total"
    return Metric(full, "counter", text, lambda snapshot: one(snapshot["counters"][name]))


def _of_models(key: str) -> Callable[[Snapshot], Iterator[Sample]]:
    def read(snapshot: Snapshot) -> Iterator[Sample]:
        for name, model in snapshot["models"].items():
            yield (name,), model[key]

    return read


def _measured(key: str) -> Callable[[Snapshot], Iterator[Sample]]:
    def read(snapshot: Snapshot) -> Iterator[Sample]:
        for name, measured in snapshot["measures"].items():
            yield (name,), measured[key]

    return read


def _of_workers(key: str) -> Callable[[Snapshot], Iterator[Sample]]:
    def read(snapshot: Snapshot) -> Iterator[Sample]:
        for worker in snapshot["workers"]:
            if worker[key] is not None:
                yield (worker["model"], worker["worker"]), worker[key]

    return read


def _workers_by_state(snapshot: Snapshot) -> Iterator[Sample]:
    counts = Counter((worker["model"], worker["state"]) for worker in snapshot["workers"])
    for model in snapshot["models"]:
        for state in _STATES:
            yield (model, state), counts[model, state]


def _clients(snapshot: Snapshot) -> Iterator[Sample]:
    connected = sum(client["connected"] for client in snapshot["clients"])
    yield ("connected",), connected
    yield ("disconnected",), len(snapshot["clients"]) - connected


def _waiting(snapshot: Snapshot) -> Iterator[Sample]:
    for what in ("without_worker", "without_mapping"):
        yield (what,), snapshot["requests"][what]


def _places(snapshot: Snapshot) -> Iterator[Sample]:
    for place, count in snapshot["places"].items():
        yield (place,), count


def _bytes(direction: str) -> Callable[[Snapshot], Iterator[Sample]]:
    def read(snapshot: Snapshot) -> Iterator[Sample]:
        for side, counts in snapshot["bytes"].items():
            yield (side,), counts[direction]

    return read


_METRICS = (
    Metric(
        "draftmq_broker_uptime_seconds",
        "gauge",
        "Since this broker began.",
        lambda s: one(s["uptime_s"]),
    ),
    Metric(
        "draftmq_broker_queue_depth",
        "gauge",
        "Requests that wait for a worker.",
        _of_models("queued"),
        ("model",),
    ),
    Metric(
        "draftmq_broker_in_flight",
        "gauge",
        "Requests that workers have.",
        _of_models("running"),
        ("model",),
    ),
    Metric(
        "draftmq_broker_requests_by_place",
        "gauge",
        "Requests by where they are; each is in exactly one place (docs/scheduling.md).",
        _places,
        ("place",),
    ),
    Metric(
        "draftmq_broker_stuck_requests",
        "gauge",
        "Requests that no worker could be given: none serves their model, or nobody has offered "
        "their vocab mapping.",
        _waiting,
        ("why",),
    ),
    Metric(
        "draftmq_broker_queue_wait_seconds",
        "histogram",
        "From a request's acceptance to its first worker.",
        _measured("queue_wait_s"),
        ("model",),
    ),
    Metric(
        "draftmq_broker_service_seconds",
        "histogram",
        "From a request's assignment to its reply: transfers, waiting at the worker, computing.",
        _measured("service_s"),
        ("model",),
    ),
    Metric(
        "draftmq_broker_compute_seconds",
        "histogram",
        "Computing one request, as the workers say.",
        _measured("compute_s"),
        ("model",),
    ),
    Metric(
        "draftmq_broker_tokens_total",
        "counter",
        "Tokens of the requests replied to.",
        _measured("tokens"),
        ("model",),
    ),
    Metric(
        "draftmq_broker_workers",
        "gauge",
        "Workers attached.",
        _workers_by_state,
        ("model", "state"),
    ),
    Metric(
        "draftmq_broker_worker_answers_total",
        "counter",
        "Answers of one worker since it connected.",
        _of_workers("answered"),
        ("model", "worker"),
    ),
    Metric(
        "draftmq_broker_worker_in_flight",
        "gauge",
        "Requests that one worker has.",
        _of_workers("running"),
        ("model", "worker"),
    ),
    Metric(
        "draftmq_broker_worker_tokens_per_second",
        "gauge",
        "Speed of one worker while it computes, learned from its answers.",
        _of_workers("tokens_per_s"),
        ("model", "worker"),
    ),
    Metric(
        "draftmq_broker_worker_silent_seconds",
        "gauge",
        "Since one worker last said anything.",
        _of_workers("silent_s"),
        ("model", "worker"),
    ),
    Metric("draftmq_broker_clients", "gauge", "Trainer ranks known.", _clients, ("state",)),
    Metric(
        "draftmq_broker_held_answers",
        "gauge",
        "Answers kept until acknowledged.",
        lambda s: one(s["held_answers"]),
    ),
    Metric(
        "draftmq_broker_held_answer_bytes",
        "gauge",
        "Bytes of held answers.",
        lambda s: one(s["held_answer_bytes"]),
    ),
    Metric(
        "draftmq_broker_held_mapping_bytes",
        "gauge",
        "Bytes of held vocab mappings.",
        lambda s: one(s["held_mapping_bytes"]),
    ),
    Metric(
        "draftmq_broker_received_bytes_total",
        "counter",
        "Bytes of all messages that came, by the side they came from.",
        _bytes("received"),
        ("side",),
    ),
    Metric(
        "draftmq_broker_sent_bytes_total",
        "counter",
        "Bytes of all messages that went, by the side they went to.",
        _bytes("sent"),
        ("side",),
    ),
    Metric(
        "draftmq_broker_warnings",
        "gauge",
        "Warnings that /status shows.",
        lambda s: one(len(s["warnings"])),
    ),
)
