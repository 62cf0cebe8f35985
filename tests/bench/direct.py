"""Direct transfers beside the wire path through the broker and beside raw TCP, one hop.

``python tests/bench/direct.py [--json]``: all take turns, so that what else this machine does falls
on all of them alike; medians. *direct* is the default here, shared memory where there is such, and
*gloo* what peers of two hosts would have. Each is the whole of it: request, reply through the
broker, tensors past it into memory of their own. Two requests are under way at once, as with a
trainer that prefetches.
"""

from __future__ import annotations

import contextlib
import functools
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parents[2]))  # where it is run by its path

MIB = 1 << 20
SIZES = (1, 16, 64, 256)


@click.command()
@click.option(
    "--rounds", default=9, help="Turns of each; the first, which builds channels, is out."
)
@click.option("--sizes", default=",".join(map(str, SIZES)), help="MiB of a reply, by commas.")
@click.option("--json", "as_json", is_flag=True, help="Print an object.")
def main(rounds: int, sizes: str, as_json: bool) -> None:
    """Measure and print."""
    seconds = measure([int(size) for size in sizes.split(",")], rounds)
    result = summarize(seconds)
    click.echo(json.dumps(result, indent=2) if as_json else table(result))


def measure(sizes: list[int], rounds: int) -> dict[int, dict[str, list[float]]]:
    """Seconds of every turn, by MiB and way."""
    from tests.bench.raw_tcp import raw_tcp
    from tests.bench.ways import direct_and_wire

    seconds: dict[int, dict[str, list[float]]] = {}
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(raw_tcp(1))
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        ours = stack.enter_context(direct_and_wire([mib * MIB for mib in sizes], logs))
        for mib in sizes:
            replies = max(4, 64 // mib)
            ways: dict[str, Callable[[], float]] = {
                "raw": lambda mib=mib, n=replies: raw(n * mib * MIB) / n,
            }
            for name, take in ours.items():
                ways[name] = functools.partial(take, mib * MIB, replies)
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(rounds):
                for name, way in ways.items():
                    taken[name].append(way())
            seconds[mib] = {name: times[1:] for name, times in taken.items()}
    return seconds


def summarize(seconds: dict[int, dict[str, list[float]]]) -> dict[str, object]:
    """Medians as rates, and the ratios of the direct way to the others."""
    rates = {
        f"{mib}MiB": {way: mib / 1024 / statistics.median(times) for way, times in ways.items()}
        for mib, ways in seconds.items()
    }
    return {
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "gib_per_s": rates,
        "ratio_to_wire": {size: rate["direct"] / rate["wire"] for size, rate in rates.items()},
        "ratio_to_raw": {size: rate["direct"] / rate["raw"] for size, rate in rates.items()},
    }


def table(result: dict) -> str:
    lines = [
        "   reply   raw TCP      wire      gloo    direct   of wire    of raw   (GiB/s, medians)"
    ]
    for size, rate in result["gib_per_s"].items():
        ratios = f"{result['ratio_to_wire'][size]:9.2f} {result['ratio_to_raw'][size]:9.2f}"
        lines.append(
            f"{size:>8} {rate['raw']:9.2f} {rate['wire']:9.2f} {rate['gloo']:9.2f} "
            f"{rate['direct']:9.2f} {ratios}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
