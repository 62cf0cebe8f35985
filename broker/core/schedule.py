"""Which worker gets a request: the one expected to finish it first, learned from its answers.

A busy worker gets more in advance, so that it need not wait for the network. But nobody gets what
another, that has no credit just now, would finish much sooner: a slow worker must not hold what the
training waits for. While it is idle it gets one that is not wanted soon, and after some seconds one
in any case: what looked slow may have been a pause, or a forward that compiled.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterator

from broker.core.state import WorkerSession

#: Answers of which the median is a worker's speed: one or two that paused do not matter, and five
#: answers after a change it is known.
_LAST_ANSWERS = 5
#: Workers whose speeds differ by less than this factor count as equally fast.
_SAME_SPEED = 2**0.25
#: A request goes to a worker that takes no longer for it, by this factor, than one without credit.
_PATIENCE = 1.5
#: A token that takes no longer takes no time, so that no worker has an infinite speed.
_NO_TIME_S = 1e-9
#: A worker that looks too slow is tried with one request after so many times what one takes it, and
#: after so many seconds at the latest: it may have become faster.
_TRIED_AFTER, _TRIED_AFTER_S = 10, 5.0


class Candidates:
    """Workers of one pool, of which the best is found without a look at each of them.

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

    def first_until(self) -> float:
        """When the first of them should have finished all that it has; infinity without one."""
        tops = [self._first(heap, ()) for heap in self._classes.values()]
        return min((worker.busy_until for worker in tops if worker is not None), default=math.inf)

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
        self._full = Candidates(
            lambda worker: not (worker.free or worker.draining or worker.overdue)
        )
        #: worker -> its tokens in 1,000 s, and how many requests it has; and their sums. Whole
        #: numbers: a sum that workers of any speeds join and leave for days stays exact
        self._counted: dict[WorkerSession, tuple[int, int]] = {}
        self._tokens_per_ks = 0
        self._n_running = 0

    def put(self, worker: WorkerSession) -> None:
        """Take note of a worker that came, or has changed."""
        self._changed[worker] = None

    def discard(self, worker: WorkerSession) -> None:
        """A worker has left."""
        self._changed.pop(worker, None)
        self._count(worker, (0, 0))
        del self._counted[worker]
        for candidates in (self._free, self._idle, self._full):
            candidates.discard(worker)

    def free(self) -> Candidates:
        """Those that have a credit."""
        for worker in self._changed:
            self._count(worker, (_tokens_per_ks(worker), len(worker.running)))
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

    def choose_for_trial(
        self, n_tokens: int, now: float, avoid: Collection[str] = ()
    ) -> tuple[WorkerSession | None, float]:
        """An idle worker that is too slow for the request by what is known of it, when it has been
        idle for long enough to be tried in any case. With it, or without one, the time at which
        this, or the wait for a better worker, must be looked at again; infinity without a reason.
        """
        due = self._full.first_until()
        for worker in self._idle:
            if worker.id in avoid:
                continue
            takes_s = (worker.seconds_per_token or 0.0) * n_tokens
            tried_at = worker.idle_since + min(_TRIED_AFTER_S, _TRIED_AFTER * takes_s)
            if tried_at <= now:
                return worker, now
            due = min(due, tried_at)
        return None, due

    def choose_for_later(
        self, n_tokens: int, now: float, avoid: Collection[str] = ()
    ) -> tuple[WorkerSession, int] | None:
        """An idle worker that is too slow for the next request; and how many requests the others
        will have taken before it would be done with one.
        """
        worker = self._idle.choose(n_tokens, now, avoid)
        if worker is None:
            return None
        takes_s = (worker.seconds_per_token or 0.0) * n_tokens
        others_per_s = (self._tokens_per_ks - _tokens_per_ks(worker)) / 1000
        return worker, max(
            0, math.ceil(takes_s * others_per_s / max(1, n_tokens)) - self._n_running
        )

    def typical_seconds_per_token(self) -> float | None:
        """The median of the workers that have answered."""
        speeds = sorted(
            worker.seconds_per_token
            for worker in self._counted
            if worker.seconds_per_token is not None
        )
        return speeds[(len(speeds) - 1) // 2] if speeds else None

    def _count(self, worker: WorkerSession, counted: tuple[int, int]) -> None:
        per_ks, running = self._counted.get(worker, (0, 0))
        self._tokens_per_ks += counted[0] - per_ks
        self._n_running += counted[1] - running
        self._counted[worker] = counted

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        for candidates in (self.free(), self._idle, self._full):
            candidates.validate()
        assert self._n_running == sum(len(worker.running) for worker in self._counted)
        assert self._tokens_per_ks == sum(map(_tokens_per_ks, self._counted))


def _tokens_per_ks(worker: WorkerSession) -> int:
    return round(1000 / worker.seconds_per_token) if worker.seconds_per_token else 0


def _speed_class(worker: WorkerSession) -> int | None:
    """A worker of unknown speed, and one that takes no time, are classes of their own."""
    if not worker.seconds_per_token:
        return None
    return round(math.log(worker.seconds_per_token, _SAME_SPEED))


def expected_finish(worker: WorkerSession, n_tokens: int, now: float) -> float:
    """When this worker would be done with so many tokens; an unknown worker is tried at once."""
    return max(now, worker.busy_until) + (worker.seconds_per_token or 0.0) * n_tokens


def learn_speed(
    worker: WorkerSession, n_tokens: int, compute_s: float, typical: float | None = None
) -> None:
    """Take one answer into the worker's learned seconds per token: the median of the last few.

    The first answer of a life is not one of them, since its forward may have compiled, tuned or
    loaded: until the second it stands for the worker's speed, but makes no worker look slower than
    is ``typical`` of its pool.
    """
    if n_tokens <= 0:
        return
    measured = compute_s / n_tokens
    measured = measured if measured >= _NO_TIME_S else 0.0
    if worker.seconds_per_token is None:
        worker.seconds_per_token = measured if typical is None else min(measured, typical)
        return
    last = (*worker.last_seconds_per_token, measured)[-_LAST_ANSWERS:]
    worker.last_seconds_per_token = last
    worker.seconds_per_token = sorted(last)[(len(last) - 1) // 2]
