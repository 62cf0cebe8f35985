"""``python -m tests.sim``: many schedules, one schedule, or the cluster at scale."""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import sys
import time

from tests.sim import replay, scale
from tests.sim.schedule import FIRST_RUDE, make

#: Schedules that a process plays before it says how they went.
_PART = 100


def main() -> int:
    """0 when every invariant held."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (%(default)s)")
    parser.add_argument("--seed", type=int, help="play this one only, and tell its story")
    parser.add_argument("--jobs", type=int, help="processes (as many as there are cores)")
    parser.add_argument("--scale", action="store_true", help="time up to 10,000 ranks instead")
    options = parser.parse_args()
    if options.scale:
        print(scale.table([(100, 10), (1_000, 100), (10_000, 1_000)]))
        return 0
    if options.seed is not None:
        print(replay.explain(options.seed))
        return 0 if replay.play(make(options.seed)) else 1
    for kind, first in (("faults", 0), ("bad manners", FIRST_RUDE)):
        print(f"{kind}:")
        first += options.first
        if failed := _play_many(range(first, first + options.schedules), options.jobs):
            return failed
    return 0


def _play_many(seeds: range, jobs: int) -> int:
    began = time.monotonic()
    totals = collections.Counter[str]()
    parts = [seeds[at : at + _PART] for at in range(0, len(seeds), _PART)]
    with concurrent.futures.ProcessPoolExecutor(jobs) as pool:
        for failed, counts in pool.map(_play_part, parts):
            totals.update(counts)
            if failed is not None:
                pool.shutdown(cancel_futures=True)
                print(replay.explain(failed))
                return 1
    counted = ", ".join(f"{count} {what}" for what, count in totals.items())
    print(f"{counted}, {time.monotonic() - began:.0f} s: every invariant held")
    return 0


def _play_part(seeds: range) -> tuple[int | None, dict[str, int]]:
    """The first seed that fails, if one does, and what was played."""
    totals = collections.Counter[str]()
    for seed in seeds:
        outcome = replay.play(make(seed))
        if not outcome:
            return seed, totals
        totals["schedules"] += 1
        totals["requests"] += outcome.requests
        totals["results"] += outcome.results
        totals["events"] += outcome.events
    return None, totals


if __name__ == "__main__":
    sys.exit(main())
