"""What is to be done later. A timer that is cancelled lets go of what it would have called."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

#: Cancelled timers that may lie about beside those that are set.
_SLACK = 64


class Timer:
    """One call that is due once."""

    __slots__ = ("call", "when")

    def __init__(self, when: float, call: Callable[[float], None]) -> None:
        self.when = when
        #: None when it was called or cancelled
        self.call: Callable[[float], None] | None = call


class Timers:
    """Keeps calls in the order in which they are due, and drops most of the cancelled ones."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._n_set = 0

    def __len__(self) -> int:
        """How many are set."""
        return self._n_set

    @property
    def next(self) -> float | None:
        """When the first is due."""
        return self._heap[0][0] if self._heap else None

    def at(self, when: float, call: Callable[[float], None]) -> Timer:
        """Have ``call(now)`` called then."""
        timer = Timer(when, call)
        heapq.heappush(self._heap, (when, next(self._numbers), timer))
        self._n_set += 1
        return timer

    def cancel(self, timer: Timer | None) -> None:
        """Have it not called; nothing where there is none, or it was called."""
        if timer is None or timer.call is None:
            return
        timer.call = None
        self._n_set -= 1
        self._drop_cancelled()

    def run(self, now: float) -> None:
        """Call what is due."""
        while self._heap and self._heap[0][0] <= now:
            timer = heapq.heappop(self._heap)[2]
            call, timer.call = timer.call, None
            if call is not None:
                self._n_set -= 1
                call(now)
        self._drop_cancelled()

    def _drop_cancelled(self) -> None:
        if len(self._heap) > 2 * self._n_set + _SLACK:
            self._heap = [item for item in self._heap if item[2].call is not None]
            heapq.heapify(self._heap)
        while self._heap and self._heap[0][2].call is None:
            heapq.heappop(self._heap)

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        assert self._n_set == sum(item[2].call is not None for item in self._heap)
        assert len(self._heap) <= 2 * self._n_set + _SLACK
        assert not self._heap or self._heap[0][2].call is not None
