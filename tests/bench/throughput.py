"""Replies of 1 KiB to 256 MiB, from a worker through the broker to a client: rate and latency.

Three processes, over TCP, over ipc, and as peers of one machine do by default (ipc, and direct
transfers of all that is large enough), in turns with raw TCP through a relay and with libzmq alone
(three processes each), with the Mooncake store (one process puts, another gets) and with NeMo's
remote target. For the rate two requests are under way, as with a trainer that prefetches; for the
latency one. A reply ends as tensors in memory of their own.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from tests.bench.bare_zmq import bare_zmq
from tests.bench.lines import Line, Progress
from tests.bench.peers.mooncake import NAME as MOONCAKE
from tests.bench.peers.mooncake import mooncake
from tests.bench.peers.nemo import NAME as NEMO
from tests.bench.peers.nemo import nemo
from tests.bench.processes import Broker, broker
from tests.bench.raw_tcp import raw_tcp
from tests.bench.ways import DEPTH, Taker, direct_from
from trainer_client.service import Client
from worker.direct.config import DirectConfig
from worker.direct.receiver import Receiver

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
SIZES = (1 * KIB, 64 * KIB, 1 * MIB, 16 * MIB, 64 * MIB, 256 * MIB)
ONE_MACHINE = "one machine"
TRANSPORTS = ("tcp", "ipc", ONE_MACHINE)
RELAY = "raw TCP through a relay"
BARE = "libzmq alone"
_OF_RELAY, _OF_NEMO = 0.9, 8.0
#: From here on the machine is the limit, not the work on a message.
_LARGE_BYTES = 64 * MIB
_ROUNDS = 5
#: One turn of the rate: so much in all, and so many replies at most.
_TURN_BYTES, _TURN_REPLIES = 256 * MIB, 100
#: And one turn of the latency.
_ALONE_BYTES, _ALONE_REPLIES = 64 * MIB, 20
_NEMO_ROUNDS, _NEMO_REPLIES = 3, 3
#: A reply of 262 MiB.
_NEMO_SHAPE = {"tokens": 2048, "hidden_size": 1024, "draft_vocab": 32000}

#: ``(bytes of a reply, replies, requests under way)`` to the seconds that each took
Way = Callable[[int, int, int], float]
#: Seconds of every turn, by ``(way, bytes, requests under way)``.
Turns = dict[tuple[str, int, int], list[float]]
#: And the medians of them.
Medians = dict[tuple[str, int, int], float]


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """Rate and latency of each size and transport beside the relay, and beside other systems."""
    sizes, rounds = (SIZES[:2], 1) if quick else (SIZES, _ROUNDS)
    turns: Turns = defaultdict(list)
    with contextlib.ExitStack() as stack:
        raw = stack.enter_context(raw_tcp(2))
        ours = {name: stack.enter_context(wire(name, sizes)) for name in TRANSPORTS}
        limits: dict[str, Way] = {"relay": functools.partial(_relayed, raw)}
        limits["bare"] = stack.enter_context(bare_zmq(sizes[-1]))
        store = stack.enter_context(mooncake(sizes[-1], progress, quick=quick))
        others: dict[str, Way] = {} if store is None else {"store": store.take}
        for nbytes in sizes:
            progress(f"replies of {size(nbytes)}")
            _measure_size(limits | ours | others, nbytes, rounds, turns)
        medians = {key: statistics.median(seconds) for key, seconds in turns.items()}
        lines = [line for nbytes in sizes for line in _lines(medians, nbytes)]
        if not quick:
            for peer, way in ((BARE, "bare"), (MOONCAKE, "store")):
                for nbytes in sizes:
                    lines += _beside(peer, way, medians, nbytes)
            lines += _beside_nemo(progress, ours, sizes[-1])
        return lines


@contextlib.contextmanager
def wire(transport: str, sizes: Sequence[int]) -> Iterator[Way]:
    """A broker and a worker on this transport, and a client here."""
    endpoints, mode = ("ipc", "auto") if transport == ONE_MACHINE else (transport, "off")
    with broker(endpoints) as started, taker(started, sizes, mode) as take:
        yield take


@contextlib.contextmanager
def taker(started: Broker, sizes: Sequence[int], mode: str = "off") -> Iterator[Way]:
    """A worker for this broker, and a client of it here, which go past it as ``mode`` says."""
    started.processes.start("worker", ["tests.bench.serve", started.workers, mode, *sizes])
    config = DirectConfig(mode=mode)
    receiver = Receiver(config, "cpu", [started.clients])
    with Client([started.clients], name="client", direct=receiver) as client:
        yield Taker(client, direct_from(config)).take


def _relayed(raw: Callable[[int], float], nbytes: int, replies: int, depth: int) -> float:
    if depth == 1:
        return statistics.fmean(raw(nbytes) for _ in range(replies))
    return raw(nbytes * replies) / replies


def _measure_size(ways: dict[str, Way], nbytes: int, rounds: int, turns: Turns) -> None:
    replies = {
        DEPTH: min(_TURN_REPLIES, max(DEPTH, _TURN_BYTES // nbytes)),
        1: min(_ALONE_REPLIES, max(1, _ALONE_BYTES // nbytes)),
    }
    for turn in range(1 + rounds):  # in the first, all make memory and find their way
        for depth, count in replies.items():
            for name, way in ways.items():
                seconds = way(nbytes, count, depth)
                if turn:
                    turns[name, nbytes, depth].append(seconds)


def _lines(medians: Medians, nbytes: int) -> Iterator[Line]:
    limit = nbytes / GIB / medians["relay", nbytes, DEPTH]
    large = nbytes >= _LARGE_BYTES
    for transport in TRANSPORTS:
        rate = nbytes / GIB / medians[transport, nbytes, DEPTH]
        wants = f">= {_OF_RELAY} of {RELAY}" if large else ""
        holds = rate >= _OF_RELAY * limit or not large
        name = f"{size(nbytes)} replies, {transport}"
        yield Line(f"{name}: rate", rate, "GiB/s", wants, holds, RELAY, limit)
        alone, relayed = (1000 * medians[way, nbytes, 1] for way in (transport, "relay"))
        yield Line(f"{name}: latency", alone, "ms", "", True, RELAY, relayed)


def _beside(peer: str, way: str, medians: Medians, nbytes: int) -> Iterator[Line]:
    """Our figures by TCP again, beside a peer's of the same turns."""
    name = f"{size(nbytes)} replies, tcp"
    rate, alone = nbytes / GIB / medians["tcp", nbytes, DEPTH], 1000 * medians["tcp", nbytes, 1]
    two, one = (medians.get((way, nbytes, depth)) for depth in (DEPTH, 1))
    theirs = None if two is None else nbytes / GIB / two
    yield Line(f"{name}: rate beside {peer}", rate, "GiB/s", "", True, peer, theirs)
    theirs = None if one is None else 1000 * one
    yield Line(f"{name}: latency beside {peer}", alone, "ms", "", True, peer, theirs)


def _beside_nemo(progress: Progress, ours: dict[str, Way], nbytes: int) -> list[Line]:
    """Our rates, in turns with NeMo's, whose reply has 262 MiB."""
    theirs: list[float] = []
    rates: dict[str, list[float]] = {name: [] for name in ours}
    with nemo(progress, quick=False) as peer:
        for _ in range(_NEMO_ROUNDS):
            progress("replies beside NeMo's")
            if peer is not None:
                seconds, sent = peer.supervision(**_NEMO_SHAPE)
                theirs.append(sent / GIB / seconds)
            for name, way in ours.items():
                way(nbytes, DEPTH, DEPTH)  # NeMo's clock does not run for its first reply either
                rates[name].append(nbytes / GIB / way(nbytes, _NEMO_REPLIES, DEPTH))
    peer_rate = statistics.median(theirs) if theirs else None
    lines = []
    for name, seen in rates.items():
        rate = statistics.median(seen)
        holds = peer_rate is not None and rate >= _OF_NEMO * peer_rate
        wants = f">= {_OF_NEMO:.0f} x {NEMO}"
        described = f"{size(nbytes)} replies, {name}: rate beside NeMo"
        lines.append(Line(described, rate, "GiB/s", wants, holds, NEMO, peer_rate))
    return lines


def size(nbytes: int) -> str:
    unit = int(math.log2(nbytes)) // 10
    return f"{nbytes >> (10 * unit)} {('B', 'KiB', 'MiB', 'GiB')[unit]}"
