"""Line d: the share of its time that a trainer waits, with and without prefetch.

The pool and ranks of :mod:`tests.bench.share`, but here a step computes for so long that the
workers could do 1.2 times what the trainer takes. A step waits as long as the rank that waits
longest for its batch; what a rank spends on asking for others meanwhile counts as waiting.
``python -m tests.bench.waiting`` runs it alone.
"""

from __future__ import annotations

import statistics

from tests.bench.lines import Line, Progress
from tests.bench.share import RANKS, ideal_per_s, run_of, unequal_pool

#: What the workers can do, in what the trainer takes.
_SPARE = 1.2
_LIMIT = 0.02


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """Shares of the time, with prefetch, and without it as what it is compared to."""
    seconds, rounds = (4.0, 1) if quick else (6.0, 2)
    compute_s = _SPARE * RANKS / ideal_per_s()
    runs = {
        True: run_of(seconds, compute_s, compute_s),
        False: run_of(seconds / 4, compute_s, compute_s, prefetch=False),
    }
    shares: dict[bool, list[float]] = {prefetch: [] for prefetch in runs}
    with unequal_pool() as trainer:
        for number in range(1, rounds + 1):
            for prefetch, run in runs.items():
                progress(f"prefetch {'on' if prefetch else 'off'}, round {number} of {rounds}")
                shares[prefetch].append(trainer.train(run).waiting)
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
