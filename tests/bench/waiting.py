"""Line d: the share of its time that a trainer waits, with and without prefetch.

The pool and ranks of :mod:`tests.bench.share`, but here a step computes for so long that the
workers could do 1.2 times what the trainer takes. A step waits as long as the rank that waits
longest for its batch; what a rank spends on asking for others meanwhile counts as waiting.
``python -m tests.bench.waiting`` runs it alone.
"""

from __future__ import annotations

import statistics

from tests.bench.lines import Line, Progress
from tests.bench.ranks import Run
from tests.bench.share import RANKS, ideal_per_s, run_of, unequal_pool

#: What the workers can do, in what the trainer takes.
_SPARE = 1.2
_LIMIT = 0.02
#: A wait in each of them is far more than any step's noise.
_STEPS_WITHOUT = 10


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """Shares of the time, with prefetch, and without it as what it is compared to."""
    seconds, rounds = (4.0, 1) if quick else (6.0, 2)
    compute_s = _SPARE * RANKS / ideal_per_s()
    with unequal_pool() as trainer:
        progress("prefetch off")
        off = Run(_STEPS_WITHOUT, warm_steps=2, compute_s=compute_s, prefetch=False)
        without = 100 * trainer.train(off).waiting
        shares = []
        for number in range(1, rounds + 1):
            progress(f"prefetch on, round {number} of {rounds}")
            shares.append(trainer.train(run_of(seconds, compute_s, compute_s)).waiting)
    with_it = 100 * statistics.median(shares)
    wants = f"<= {100 * _LIMIT:g} with prefetch"
    return [
        Line(
            "trainer waits",
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
