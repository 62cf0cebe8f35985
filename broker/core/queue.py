"""Who is served next: fair between jobs, earliest step first within a job, then fair between ranks.

Synchronous training is as slow as its slowest rank, so within a job the earliest step comes first,
and of equal steps the first request of every rank before the second of any. Step numbers of
different jobs mean nothing to each other; jobs share by tokens served (start-time fair queueing,
Goyal et al., SIGCOMM 1996). Who has been passed over for too long is next in its job, whatever its
step: two runs that share the name of a job have steps that mean nothing to each other, too.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol


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


#: (requeued, minus step, minus turn, minus arrival, entry): a total order, as arrivals are unique
_Item = tuple[bool, int, int, int, Queueable]


#: Jobs without requests whose share is remembered: a run that asks for one thing after the other
#: has none here in between.
_MAX_EMPTY = 256
#: Turns that are remembered beside those of requests that wait.
_TURNS = 1024


@dataclass
class _Job:
    #: tokens served to this job, or what an idle job is credited on return
    virtual_tokens: float = 0.0
    #: in order; the next one is the last
    items: list[_Item] = field(default_factory=list)
    #: step, client -> how many requests it has brought for that step; those of steps that are
    #: over are left out from time to time
    turns: dict[tuple[int, str], int] = field(default_factory=dict)
    #: by the id() of the entry, in order of arrival: the entry, and since when it is here
    arrived: dict[int, tuple[float, Queueable]] = field(default_factory=dict)

    def forget_turns(self) -> None:
        """Where there are far more than requests, keep those of who waits, and the last few."""
        if not self.items:
            self.turns.clear()
        elif len(self.turns) > 4 * len(self.items) + _TURNS:
            waiting = {(item[-1].step, item[-1].client) for item in self.items}
            last = list(self.turns)[-_TURNS // 2 :]
            self.turns = {
                key: turn for key in (*waiting, *last) if (turn := self.turns.get(key)) is not None
            }


class FairQueue:
    """A priority queue of requests.

    A job's entries are kept in order. Moving the rest aside for one more costs less than anything
    else that is done for a request, up to many thousands that wait.
    """

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}
        self._order: list[tuple[float, int, str]] = []  # one item for each job
        self._there: dict[int, _Item] = {}  # by the id() of the entry
        self._arrivals = itertools.count()
        self._now_tokens = 0.0
        #: at least as many jobs as have nothing here
        self._n_empty = 0

    def __len__(self) -> int:
        return len(self._there)

    def __contains__(self, entry: Queueable) -> bool:
        return id(entry) in self._there

    def __iter__(self) -> Iterator[Queueable]:
        for job in self._jobs.values():
            yield from (item[-1] for item in reversed(job.items))

    def push(self, entry: Queueable, *, again: bool = False, now: float = 0.0) -> None:
        """Add an entry; ``again`` puts one that was lost on its way before all new ones."""
        job = self._jobs.get(entry.job)
        if job is None:
            job = self._jobs[entry.job] = _Job(virtual_tokens=self._now_tokens)
            heapq.heappush(self._order, (job.virtual_tokens, next(self._arrivals), entry.job))
        key = (entry.step, entry.client)
        turn = job.turns[key] = job.turns.get(key, -1) + 1
        item = (again, -entry.step, -turn, -next(self._arrivals), entry)
        bisect.insort(job.items, item)
        self._there[id(entry)] = item
        job.arrived[id(entry)] = (now, entry)
        job.forget_turns()

    def at(self, place: int) -> Queueable | None:
        """The entry that will be served about so many places after the next one, if there is one.

        It is one of the job that is next.
        """
        while self._order:
            name = self._order[0][-1]
            if items := self._jobs[name].items:
                place //= len(self._order)
                return items[-1 - place][-1] if place < len(items) else None
            heapq.heappop(self._order)
            del self._jobs[name]
        return None

    def passed_over(self, since: float) -> Queueable | None:
        """The first entry of the job that is next, if it is here since then or longer."""
        if self.at(0) is None:
            return None
        arrived_at, entry = next(iter(self._jobs[self._order[0][-1]].arrived.values()))
        return entry if arrived_at <= since else None

    def last(self) -> Queueable | None:
        """The entry of the job that is next which will be served last."""
        entry = self.at(0)
        return None if entry is None else self._jobs[self._order[0][-1]].items[0][-1]

    def take(self, entry: Queueable) -> None:
        """Serve an entry of the job that is next, which is charged for it."""
        virtual_tokens, _, name = self._order[0]
        assert name == entry.job
        job = self._jobs[name]
        self._now_tokens = max(self._now_tokens, virtual_tokens)
        job.virtual_tokens += max(1, entry.n_tokens)
        heapq.heapreplace(self._order, (job.virtual_tokens, next(self._arrivals), name))
        self.remove(entry)

    def remove(self, entry: Queueable) -> None:
        """Forget an entry, if it is queued."""
        item = self._there.pop(id(entry), None)
        if item is None:
            return
        job = self._jobs[entry.job]
        del job.arrived[id(entry)]
        del job.items[bisect.bisect_left(job.items, item)]
        if not self._there:  # who had how much does not matter any more
            self._jobs.clear()
            self._order.clear()
            self._n_empty = 0
            return
        job.forget_turns()
        if not job.items:
            self._n_empty += 1
            if self._n_empty > _MAX_EMPTY:
                self._forget_empty()

    def _forget_empty(self) -> None:
        """Of the jobs that have nothing here, keep those that have had the most."""
        empty = sorted(
            (job.virtual_tokens, name) for name, job in self._jobs.items() if not job.items
        )
        for _, name in empty[: -_MAX_EMPTY // 2]:
            del self._jobs[name]
        self._order = [item for item in self._order if item[-1] in self._jobs]
        heapq.heapify(self._order)
        self._n_empty = min(len(empty), _MAX_EMPTY // 2)

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        items = [item for job in self._jobs.values() for item in job.items]
        assert {id(item[-1]): item for item in items} == self._there
        assert len(items) == len(self._there)
        assert all(job.items == sorted(job.items) for job in self._jobs.values())
        assert sorted(item[-1] for item in self._order) == sorted(self._jobs)
        assert sum(not job.items for job in self._jobs.values()) <= _MAX_EMPTY
        for job in self._jobs.values():
            assert len(job.turns) <= 4 * len(job.items) + _TURNS
            assert {id(item[-1]) for item in job.items} == set(job.arrived)
