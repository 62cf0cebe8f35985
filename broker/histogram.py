"""Counting without a dependency: histograms with fixed buckets, for all three parts."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable

#: Upper bounds in seconds, about three for each factor of ten: from a small request's pass through
#: the broker (0.1 ms) to a long sequence through a large target (100 s).
SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0),
)


class Histogram:
    """How often values fell into each bucket; a value equal to a bound is within it.

    One thread observes; others may look. What they see can lack the newest value.
    """

    def __init__(self, bounds: Iterable[float] = SECONDS) -> None:
        self.bounds = tuple(bounds)
        #: one for each bound, and a last one for what is above them all
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += 1
        self.sum += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def plain(self) -> dict[str, object]:
        """``count``, ``sum`` and ``buckets``: cumulative ``[upper bound, values up to it]``.

        The last bucket has no bound and is left out: it would be the count.
        """
        cumulative = list(itertools.accumulate(self.counts))
        buckets = [list(pair) for pair in zip(self.bounds, cumulative, strict=False)]
        return {"count": cumulative[-1], "sum": self.sum, "buckets": buckets}
