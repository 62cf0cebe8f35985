"""Who is served next: fair between jobs, earliest step first within a job, then fair between ranks.

Synchronous training is as slow as its slowest rank, so within a job the earliest step comes first,
and of equal steps the first request of every rank before the second of any. Step numbers of
different jobs mean nothing to each other; jobs share by tokens served (start-time fair queueing,
Goyal et al., SIGCOMM 1996).
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

#: Removed entries that a heap may hold beyond as many as are still queued.
_REMOVED = 16


class Queueable(Protocol):
    """What the queue must know of an entry."""

    @property
    def job(self) -> str: ...

    @property
    def client(self) -> str: ...

    @property
    def step(self) -> int: ...

    @property
    def n_tokens(self) -> int: ...


@dataclass
class _Job:
    #: tokens served to this job, or what an idle job is credited on return
    virtual_tokens: float = 0.0
    #: (not requeued, step, turn, arrival, entry): a total order, since arrivals are unique
    heap: list[tuple[bool, int, int, int, Queueable]] = field(default_factory=list)
    #: step -> client -> how many requests it has brought for that step; only steps in the heap
    turns: dict[int, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))


class FairQueue:
    """A priority queue of requests; push and pop cost the logarithm of its length.

    Removal is lazy: a removed entry leaves the heap when it comes to the top, or with many others
    once they are more than those that are left.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._order: list[tuple[float, int, str]] = []  # one item for each job with entries
        self._there: set[int] = set()  # id() of the entries that are queued
        self._arrivals = itertools.count()
        self._now_tokens = 0.0
        self._removed = 0  # items that are still in a heap, at most

    def __len__(self) -> int:
        return len(self._there)

    def __contains__(self, entry: Queueable) -> bool:
        return id(entry) in self._there

    def __iter__(self) -> Iterator[Queueable]:
        for job in self._jobs.values():
            yield from (item[-1] for item in job.heap if id(item[-1]) in self._there)

    def push(self, entry: Queueable, *, again: bool = False) -> None:
        """Add an entry; ``again`` puts one that was lost on its way before all new ones."""
        job = self._jobs.get(entry.job)
        if job is None:
            job = self._jobs[entry.job] = _Job(virtual_tokens=self._now_tokens)
            heapq.heappush(self._order, (job.virtual_tokens, next(self._arrivals), entry.job))
        turns = job.turns[entry.step]
        turn = turns[entry.client] = turns.get(entry.client, -1) + 1
        item = (not again, entry.step, turn, next(self._arrivals), entry)
        heapq.heappush(job.heap, item)
        self._there.add(id(entry))

    def first(self) -> Queueable:
        """The entry to serve next, which stays. Raises ``IndexError`` when the queue is empty."""
        while self._order:
            entry = self._first_of(self._jobs[self._order[0][-1]])
            if entry is not None:
                return entry
            del self._jobs[heapq.heappop(self._order)[-1]]
        raise IndexError("the queue is empty")

    def pop(self) -> Queueable:
        """Take the entry to serve next. Raises ``IndexError`` when the queue is empty."""
        entry = self.first()
        _, _, name = heapq.heappop(self._order)
        job = self._jobs[name]
        heapq.heappop(job.heap)
        self._there.remove(id(entry))
        self._now_tokens = max(self._now_tokens, job.virtual_tokens)
        job.virtual_tokens += max(1, entry.n_tokens)
        heapq.heappush(self._order, (job.virtual_tokens, next(self._arrivals), name))
        return entry

    def remove(self, entry: Queueable) -> None:
        """Forget an entry, if it is queued."""
        if id(entry) not in self._there:
            return
        self._there.remove(id(entry))
        self._removed += 1
        if self._removed > len(self._there) + _REMOVED:
            self._sweep()

    def _sweep(self) -> None:
        """Take what was removed out of the heaps."""
        self._removed = 0
        for job in self._jobs.values():
            job.heap = [item for item in job.heap if id(item[-1]) in self._there]
            heapq.heapify(job.heap)
            steps = {item[1] for item in job.heap}
            job.turns = defaultdict(dict, {s: t for s, t in job.turns.items() if s in steps})
        self._jobs = {name: job for name, job in self._jobs.items() if job.heap}
        self._order = [item for item in self._order if item[2] in self._jobs]
        heapq.heapify(self._order)

    def _first_of(self, job: _Job) -> Queueable | None:
        while job.heap:
            _, step, _, _, entry = job.heap[0]
            for old in [other for other in job.turns if other < step]:
                del job.turns[old]
            if id(entry) in self._there:
                return entry
            heapq.heappop(job.heap)
        return None
