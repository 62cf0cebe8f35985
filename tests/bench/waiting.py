"""Line d: the share of its time that a trainer waits, with and without prefetch.

The pool and ranks of :mod:`tests.bench.share`, but here a step computes for so long that the
workers could do 1.2 times what the trainer takes. Waiting is all that is not this computing: for
replies, and for the rank that got its reply last. ``python -m tests.bench.waiting`` runs it alone.
"""

from __future__ import annotations

import statistics

from tests.bench.lines import Line, Progress
from tests.bench.ranks import train
from tests.bench.share import RANKS, WARM_S, ideal_per_s, ranks, unequal_pool

#: What the workers can do, in what the trainer takes.
_SPARE = 1.2
_LIMIT = 0.02


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """Shares of the time, with prefetch, and without it as what it is compared to."""
    seconds, rounds = (4.0, 1) if quick else (7.0, 2)
    compute_s = _SPARE * RANKS / ideal_per_s()
    shares: dict[bool, list[float]] = {True: [], False: []}
    with unequal_pool() as started, ranks(started) as backends:
        for number in range(1, rounds + 1):
            for prefetch, seen in shares.items():
                progress(f"prefetch {'on' if prefetch else 'off'}, round {number} of {rounds}")
                trained = train(
                    backends,
                    seconds=seconds if prefetch else seconds / 2,
                    warm_s=WARM_S,
                    compute_s=compute_s,
                    prefetch=prefetch,
                )
                seen.append(trained.waiting)
    with_it, without = (100 * statistics.median(shares[prefetch]) for prefetch in (True, False))
    wants = f"<= {100 * _LIMIT:g} with prefetch"
    return [
        Line(
            "d: trainer waits",
            with_it,
            "% of the time",
            wants,
            with_it <= 100 * _LIMIT,
            "without prefetch",
            without,
        )
    ]


if __name__ == "__main__":
    from tests.bench.alone import run_alone

    run_alone(measure)
