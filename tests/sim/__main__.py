"""``python -m tests.sim``: many schedules, one schedule, or the cluster at scale."""

from __future__ import annotations

import argparse
import sys
import time

from tests.sim import replay, scale
from tests.sim.schedule import make


def main() -> int:
    """0 when every invariant held."""
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--schedules", type=int, default=10_000, help="how many (%(default)s)")
    parser.add_argument("--first", type=int, default=0, help="the first seed (%(default)s)")
    parser.add_argument("--seed", type=int, help="play this one only, and tell its story")
    parser.add_argument("--scale", action="store_true", help="time up to 10,000 ranks instead")
    options = parser.parse_args()
    if options.scale:
        print(scale.table([(100, 10), (1_000, 100), (10_000, 1_000)]))
        return 0
    if options.seed is not None:
        print(replay.explain(options.seed))
        return 0 if replay.play(make(options.seed)) else 1
    return _play_many(range(options.first, options.first + options.schedules))


def _play_many(seeds: range) -> int:
    began, events, requests, results = time.monotonic(), 0, 0, 0
    for seed in seeds:
        outcome = replay.play(make(seed))
        if not outcome:
            print(replay.explain(seed))
            return 1
        events += outcome.events
        requests += outcome.requests
        results += outcome.results
    print(
        f"{len(seeds)} schedules, {requests} requests, {results} results, {events} events, "
        f"{time.monotonic() - began:.0f} s: every invariant held"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
