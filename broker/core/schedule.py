"""Which worker gets a request: the one expected to finish it first, learned from its answers."""

from __future__ import annotations

from collections.abc import Iterable

from broker.core.state import Entry, WorkerSession

#: Weight of the newest answer in a worker's learned speed: a handful of answers decide.
_NEWEST = 0.3


def choose_worker(
    workers: Iterable[WorkerSession], entry: Entry, now: float
) -> WorkerSession | None:
    """A worker with a free credit for the entry; one that it has not failed on, if there is one."""
    free = [worker for worker in workers if worker.free]
    tried = {*entry.failed_on, entry.request.avoid}
    untried = [worker for worker in free if worker.id not in tried]
    return min(untried or free, key=lambda w: expected_finish(w, entry, now), default=None)


def expected_finish(worker: WorkerSession, entry: Entry, now: float) -> float:
    """When this worker would be done with the entry; an unknown worker is tried at once."""
    return max(now, worker.busy_until) + (worker.seconds_per_token or 0.0) * entry.n_tokens


def learn_speed(worker: WorkerSession, n_tokens: int, compute_s: float) -> None:
    """Take one answer into the worker's learned seconds per token."""
    if n_tokens <= 0:
        return
    measured = max(0.0, compute_s) / n_tokens
    known = worker.seconds_per_token
    worker.seconds_per_token = measured if known is None else known + _NEWEST * (measured - known)
