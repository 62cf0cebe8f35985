"""The broker's memory: under many small requests, and while it passes on the largest replies.

What counts is the peak that the kernel kept of its resident memory. In flight is what has been
asked for and is not yet in the client's hands.
"""

from __future__ import annotations

from tests.bench.latency import light_pool
from tests.bench.lines import Line, Progress
from tests.bench.processes import broker, peak_bytes, reset_peak
from tests.bench.throughput import MIB, size, taker

_MB = 10**6
#: What a broker may take: so much, and so many times the bytes in flight.
_BASE_BYTES, _TIMES = 150 * _MB, 2
_DEPTHS = (1, 2, 4)
_CLIENTS = 1000
_REPLIES = 6
_SECONDS = 3.0


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """A line for small requests, and one for large replies with each number under way."""
    clients, seconds, nbytes = (10, 0.2, MIB) if quick else (_CLIENTS, _SECONDS, 256 * MIB)
    progress(f"the broker's memory, {clients} clients")
    with light_pool() as pool:
        pool.load(clients, seconds)
        lines = [_line(f"small requests, {clients} clients", pool.broker.pid, 0)]
    with broker() as started, taker(started, [nbytes]) as take:
        for depth in _DEPTHS:
            progress(f"the broker's memory, {depth} replies of {size(nbytes)} under way")
            take(nbytes, depth, depth)
            reset_peak(started.pid)
            take(nbytes, max(_REPLIES, depth), depth)
            name = f"{depth} replies of {size(nbytes)} under way"
            lines.append(_line(name, started.pid, depth * nbytes))
    return lines


def _line(name: str, pid: int, in_flight_bytes: int) -> Line:
    peak, most = peak_bytes(pid), _BASE_BYTES + _TIMES * in_flight_bytes
    return Line(f"broker memory, {name}", peak / _MB, "MB", f"<= {most / _MB:.0f}", peak <= most)
