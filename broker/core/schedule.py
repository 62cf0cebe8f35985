"""Which worker gets a request: the one expected to finish it first, learned from its answers."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Collection, Iterator

from broker.core.state import WorkerSession

#: Weight of the newest answer in a worker's learned speed: a handful of answers decide.
_NEWEST = 0.3
#: Workers whose speeds differ by less than this factor count as equally fast.
_SAME_SPEED = 2**0.25


class FreeWorkers:
    """The workers of a pool that have a free credit, to be chosen from without looking at all.

    Among equally fast workers the one that is free first finishes first, whatever the request. So
    there is a heap by that time for each class of speed, of which there are few, and a choice
    compares their tops. It costs the logarithm of the number of workers, and differs from looking
    at every worker by less than :data:`_SAME_SPEED` in the time that the request computes.

    A worker is put in again after each change; what was put in before is dropped when it comes up.
    """

    def __init__(self) -> None:
        self._classes: dict[int | None, list[tuple[float, int, WorkerSession]]] = {}
        self._numbers = itertools.count()
        #: worker -> number of its newest item; older items are nothing any more
        self._newest: dict[WorkerSession, int] = {}

    def __len__(self) -> int:
        return len(self._newest)

    def put(self, worker: WorkerSession) -> None:
        """Take note of a worker that came, or whose credits or speed have changed."""
        self._newest.pop(worker, None)
        if not worker.free:
            return
        number = self._newest[worker] = next(self._numbers)
        heap = self._classes.setdefault(_speed_class(worker), [])
        heapq.heappush(heap, (worker.busy_until, number, worker))
        if sum(map(len, self._classes.values())) > 4 * len(self._newest) + 64:
            self._sweep()

    def discard(self, worker: WorkerSession) -> None:
        """A worker has left."""
        self._newest.pop(worker, None)

    def choose(
        self, n_tokens: int, now: float, avoid: Collection[str] = ()
    ) -> WorkerSession | None:
        """The free worker that would finish so many tokens first; one of ``avoid`` if need be."""
        best = min(
            filter(None, [self._first(heap, avoid) for heap in self._classes.values()]),
            key=lambda worker: expected_finish(worker, n_tokens, now),
            default=None,
        )
        return self.choose(n_tokens, now) if best is None and avoid else best

    def __iter__(self) -> Iterator[WorkerSession]:
        return iter(self._newest)

    def _first(
        self, heap: list[tuple[float, int, WorkerSession]], avoid: Collection[str]
    ) -> WorkerSession | None:
        """The top of a heap that is still true and not to be avoided."""
        aside = []
        found = None
        while heap:
            _, number, worker = heap[0]
            if self._newest.get(worker) != number:
                heapq.heappop(heap)
            elif worker.id in avoid:
                aside.append(heapq.heappop(heap))
            else:
                found = worker
                break
        for item in aside:
            heapq.heappush(heap, item)
        return found

    def _sweep(self) -> None:
        for name, heap in list(self._classes.items()):
            true = [item for item in heap if self._newest.get(item[2]) == item[1]]
            heapq.heapify(true)
            self._classes[name] = true
            if not true:
                del self._classes[name]

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        items = {item[1]: item for heap in self._classes.values() for item in heap}
        for worker, number in self._newest.items():
            busy_until, _, there = items[number]
            assert there is worker
            assert worker.free
            assert busy_until == worker.busy_until
            assert items[number] in self._classes[_speed_class(worker)]


def _speed_class(worker: WorkerSession) -> int | None:
    """A worker of unknown speed, and one that takes no time, are classes of their own."""
    if not worker.seconds_per_token:
        return None
    return round(math.log(worker.seconds_per_token, _SAME_SPEED))


def expected_finish(worker: WorkerSession, n_tokens: int, now: float) -> float:
    """When this worker would be done with so many tokens; an unknown worker is tried at once."""
    return max(now, worker.busy_until) + (worker.seconds_per_token or 0.0) * n_tokens


def learn_speed(worker: WorkerSession, n_tokens: int, compute_s: float) -> None:
    """Take one answer into the worker's learned seconds per token."""
    if n_tokens <= 0:
        return
    measured = max(0.0, compute_s) / n_tokens
    known = worker.seconds_per_token
    worker.seconds_per_token = measured if known is None else known + _NEWEST * (measured - known)
