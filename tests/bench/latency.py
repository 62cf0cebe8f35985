"""Small requests: how many a second, what the broker adds to each, and what CPU it takes for it.

*Added* is the time of a round trip through the broker less that of the same one between the same
two processes, connected to each other with nothing in between: 1 KiB there, 1 KiB back, one request
at a time, the two ways in turns. See :mod:`tests.bench.load`.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
from collections.abc import Iterator

from tests.bench.lines import Line, Progress
from tests.bench.processes import Broker, broker
from tests.ports import free_port

CLIENTS = (1, 10, 100, 1000)
_MAX_ADDED_MS = 0.5
_MAX_GROWTH = 1.2
_SECONDS = 4.0
#: How the CPU time grows is the median of so many pairs of runs, in turns, of so many seconds.
_PAIRS, _PAIR_SECONDS = 5, 1.5
_PATIENCE_S = 120.0


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """Five lines for each number of clients, and how the CPU time grows from 10 to 1,000."""
    counts, seconds = ((1, 10), 0.2) if quick else (CLIENTS, _SECONDS)
    seen = {}
    for count in counts:
        progress(f"small requests, {count} clients")
        with light_pool() as pool:
            seen[count] = pool.load(count, seconds)
    lines = [line for count, figures in seen.items() for line in _lines(count, figures)]
    return [*lines, growth(max(counts), progress, quick=quick)]


def growth(most: int, progress: Progress, *, quick: bool) -> Line:
    """What a request costs the broker with so many clients, to what it costs with ten."""
    ratios = []
    for number in range(1 if quick else _PAIRS):
        progress(f"small requests, {most} clients to 10, pair {number + 1}")
        cost_s = []
        for count in (10, most):
            with light_pool() as pool:
                cost_s.append(pool.load(count, 0.2 if quick else _PAIR_SECONDS))
        few, many = (figures["cpu_s_per_request"] for figures in cost_s)
        ratios.append(many / few)
    median = statistics.median(ratios)
    name = f"broker CPU a request, {most} clients to 10"
    return Line(name, median, "x", f"<= {_MAX_GROWTH}", median <= _MAX_GROWTH)


class LightPool:
    """A broker with one worker that answers at once."""

    def __init__(self, started: Broker, direct: str) -> None:
        self.broker = started
        self._direct = direct

    def load(self, clients: int, seconds: float) -> dict[str, float]:
        """What :mod:`tests.bench.load` measures."""
        arguments = [self.broker.clients, self._direct, self.broker.pid, clients, seconds]
        command = [sys.executable, "-m", "tests.bench.load", *map(str, arguments)]
        done = subprocess.run(
            command, check=True, stdout=subprocess.PIPE, text=True, timeout=_PATIENCE_S
        )
        figures: dict[str, float] = json.loads(done.stdout)
        return figures


@contextlib.contextmanager
def light_pool() -> Iterator[LightPool]:
    direct = f"tcp://127.0.0.1:{free_port()}"
    with broker() as started:
        worker = ["tests.bench.light_worker", started.workers, direct]
        started.processes.start("worker", worker)
        yield LightPool(started, direct)


def _lines(clients: int, seen: dict[str, float]) -> list[Line]:
    peer = "without a broker"
    added = {
        percent: 1000 * (seen[f"through_{percent}_s"] - seen[f"direct_{percent}_s"])
        for percent in ("p50", "p99")
    }
    return [
        Line(
            f"latency added, p50, {clients} clients",
            added["p50"],
            "ms",
            f"<= {_MAX_ADDED_MS}",
            added["p50"] <= _MAX_ADDED_MS,
            f"{peer}: the whole",
            1000 * seen["direct_p50_s"],
        ),
        Line(
            f"latency added, p99, {clients} clients",
            added["p99"],
            "ms",
            "",
            True,
            f"{peer}: the whole",
            1000 * seen["direct_p99_s"],
        ),
        Line(f"small requests, {clients} clients", seen["requests_per_s"], "/s", "", True),
        Line(
            f"broker CPU a request, {clients} clients",
            1e6 * seen["cpu_s_per_request"],
            "us",
            "",
            True,
        ),
        Line(
            f"broker CPU for heartbeats alone, {clients} clients",
            1e6 * seen["cpu_s_per_s_at_rest"],
            "us/s",
            "",
            True,
        ),
    ]
