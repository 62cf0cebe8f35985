"""Which worker gets a request: the one expected to finish it first, learned from its answers.

A busy worker gets more in advance, so that it need not wait for the network. But nobody gets what
another, that has no credit just now, would finish much sooner: a slow worker must not hold what the
training waits for. While it is idle it gets one that is not wanted soon.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterator

from broker.core.state import WorkerSession

#: Weight of the newest answer in a worker's learned speed: a handful of answers decide.
_NEWEST = 0.3
#: Workers whose speeds differ by less than this factor count as equally fast.
_SAME_SPEED = 2**0.25
#: A request goes to a worker that takes no longer for it, by this factor, than one without credit.
_PATIENCE = 1.5
#: What takes no longer takes no time: rates have bounds.
_NO_TIME_S = 1e-9
#: A worker that was too slow gets the next request after so many times what one takes it: it may
#: have become faster.
_FORGIVEN_AFTER = 8


class Candidates:
    """Those workers of a pool that have something in common, to be chosen from without a look at
    each.

    Among equally fast workers the one that is free first finishes first, whatever the request. So
    there is a heap by that time for each class of speed, of which there are few, and a choice
    compares their tops. It costs the logarithm of the number of workers, and differs from looking
    at every worker by less than :data:`_SAME_SPEED` in the time that the request computes.

    A worker is put in again after each change; what was put in before is dropped when it comes up.
    """

    def __init__(self, belongs: Callable[[WorkerSession], bool]) -> None:
        self._belongs = belongs
        self._classes: dict[int | None, list[tuple[float, int, WorkerSession]]] = {}
        self._numbers = itertools.count()
        #: worker -> number of its newest item; older items are nothing any more
        self._newest: dict[WorkerSession, int] = {}
        #: items since the last sweep, at least as many as there are in the heaps
        self._n_items = 0

    def __len__(self) -> int:
        return len(self._newest)

    def put(self, worker: WorkerSession) -> None:
        """Take note of a worker that came, or has changed."""
        self._newest.pop(worker, None)
        if not self._belongs(worker):
            return
        number = self._newest[worker] = next(self._numbers)
        heap = self._classes.setdefault(_speed_class(worker), [])
        heapq.heappush(heap, (worker.busy_until, number, worker))
        self._n_items += 1
        if self._n_items > 4 * len(self._newest) + 64:
            self._sweep()

    def discard(self, worker: WorkerSession) -> None:
        """A worker has left."""
        self._newest.pop(worker, None)

    def choose(
        self, n_tokens: int, now: float, avoid: Collection[str] = ()
    ) -> WorkerSession | None:
        """The one that would finish so many tokens first, without those of ``avoid``."""
        return min(
            filter(None, [self._first(heap, avoid) for heap in self._classes.values()]),
            key=lambda worker: expected_finish(worker, n_tokens, now),
            default=None,
        )

    def __iter__(self) -> Iterator[WorkerSession]:
        return iter(self._newest)

    def forget_overdue(self, now: float) -> None:
        """Leave out, until they change, those that should have finished all that they have."""
        for heap in self._classes.values():
            while heap and heap[0][0] <= now:
                _, number, worker = heapq.heappop(heap)
                if self._newest.get(worker) == number:
                    del self._newest[worker]

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
        self._n_items = len(self._newest)
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
            assert self._belongs(worker)
            assert busy_until == worker.busy_until
            assert items[number] in self._classes[_speed_class(worker)]


class Choice:
    """All workers of a pool, by what may be asked of them.

    What has changed is looked at when somebody is to be chosen: a worker changes several times in
    the life of a request.
    """

    def __init__(self) -> None:
        self._changed: dict[WorkerSession, None] = {}
        self._free = Candidates(lambda worker: worker.free > 0)
        self._idle = Candidates(lambda worker: worker.free > 0 and not worker.running)
        self._full = Candidates(lambda worker: not worker.free and not worker.draining)
        #: worker -> its tokens per second, and how many requests it has; and their sums
        self._counted: dict[WorkerSession, tuple[float, int]] = {}
        self._tokens_per_s = 0.0
        self._n_running = 0

    def put(self, worker: WorkerSession) -> None:
        """Take note of a worker that came, or has changed."""
        self._changed[worker] = None

    def discard(self, worker: WorkerSession) -> None:
        """A worker has left."""
        self._changed.pop(worker, None)
        self._count(worker, (0.0, 0))
        del self._counted[worker]
        for candidates in (self._free, self._idle, self._full):
            candidates.discard(worker)

    def free(self) -> Candidates:
        """Those that have a credit."""
        for worker in self._changed:
            self._count(worker, (_tokens_per_s(worker), len(worker.running)))
            for candidates in (self._free, self._idle, self._full):
                candidates.put(worker)
        self._changed.clear()
        return self._free

    def choose(
        self, n_tokens: int, now: float, avoid: Collection[str] = ()
    ) -> WorkerSession | None:
        """Who gets so many tokens now; one of ``avoid`` if need be. None: wait for a better one."""
        free = self.free()
        worker = free.choose(n_tokens, now, avoid)
        if worker is None and avoid:
            worker = free.choose(n_tokens, now)
        self._full.forget_overdue(now)
        better = self._full.choose(n_tokens, now, avoid)
        if worker is None or better is None:
            return worker
        wait_s = expected_finish(better, n_tokens, now) - now
        takes_s = expected_finish(worker, n_tokens, now) - now
        return worker if takes_s <= _PATIENCE * wait_s else None

    def choose_for_later(self, n_tokens: int, now: float) -> tuple[WorkerSession, int] | None:
        """An idle worker that is too slow for the next request; and how many requests the others
        will have taken before it would be done with one.
        """
        worker = self._idle.choose(n_tokens, now)
        if worker is None:
            return None
        takes_s = (worker.seconds_per_token or 0.0) * n_tokens
        if now > worker.busy_until + _FORGIVEN_AFTER * takes_s:
            return worker, 0
        others_per_s = self._tokens_per_s - _tokens_per_s(worker)
        return worker, max(
            0, math.ceil(takes_s * others_per_s / max(1, n_tokens)) - self._n_running
        )

    def _count(self, worker: WorkerSession, counted: tuple[float, int]) -> None:
        per_s, running = self._counted.get(worker, (0.0, 0))
        self._tokens_per_s += counted[0] - per_s
        self._n_running += counted[1] - running
        self._counted[worker] = counted

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        for candidates in (self.free(), self._idle, self._full):
            candidates.validate()
        assert self._n_running == sum(len(worker.running) for worker in self._counted)
        total = sum(map(_tokens_per_s, self._counted))
        assert math.isclose(self._tokens_per_s, total, rel_tol=1e-6, abs_tol=1e-6 * (1 + total))


def _tokens_per_s(worker: WorkerSession) -> float:
    return 1 / worker.seconds_per_token if worker.seconds_per_token else 0.0


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
    measured = (compute_s if compute_s > _NO_TIME_S else 0.0) / n_tokens
    known = worker.seconds_per_token
    worker.seconds_per_token = measured if known is None else known + _NEWEST * (measured - known)
