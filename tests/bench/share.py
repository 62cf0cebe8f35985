"""Line c: the share of what unequal workers could do together that a training gets of them.

Four workers, one of them four times slower, and four ranks that step together and compute nothing
themselves, so that the workers are the limit. Beside it NeMo AutoModel's own servers and clients,
which take turns, with targets of the same speeds. ``python -m tests.bench.share`` runs it alone.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator

from tests.bench.lines import Line, Progress
from tests.bench.paced import SECONDS
from tests.bench.peers.nemo import NAME as NEMO
from tests.bench.peers.nemo import nemo
from tests.bench.pool import pool
from tests.bench.ranks import Ranks, Run, ranks

WORKERS = ("fast", "fast", "fast", "slow")
RANKS = 4
_SHARE = 0.95
#: In which the broker learns how fast each worker is, and each rank its depth.
_WARM_S = 2.5


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """The share, and that of NeMo's client."""
    seconds, rounds = (4.0, 1) if quick else (6.0, 2)
    run = run_of(seconds, RANKS / ideal_per_s())
    ours: list[float] = []
    theirs: list[float] = []
    with nemo(progress, quick=quick) as peer, unequal_pool() as trainer:
        for number in range(1, rounds + 1):
            progress(f"unequal workers, round {number} of {rounds}")
            if peer is not None:
                server_s = [SECONDS[speed] for speed in WORKERS]
                theirs.append(peer.steps_per_s(server_s, RANKS, seconds, _WARM_S))
            ours.append(trainer.train(run).steps_per_s)
    share = RANKS * statistics.median(ours) / ideal_per_s()
    nemos = RANKS * statistics.median(theirs) / ideal_per_s() if theirs else None
    wants = f">= {_SHARE}, and twice the peer's"
    holds = share >= _SHARE and nemos is not None and share >= 2 * nemos
    return [Line("four unequal workers", share, "of ideal", wants, holds, NEMO, nemos)]


def ideal_per_s() -> float:
    """Requests a second of all workers together, if none ever waits."""
    return sum(1 / SECONDS[speed] for speed in WORKERS)


def run_of(seconds: float, step_s: float, compute_s: float = 0.0) -> Run:
    """About so many seconds, if a step takes ``step_s``, and a while before them."""
    return Run(
        steps=math.ceil(seconds / step_s),
        warm_steps=math.ceil(_WARM_S / step_s),
        compute_s=compute_s,
    )


@contextlib.contextmanager
def unequal_pool() -> Iterator[Ranks]:
    """The ranks, with a broker and the workers."""
    factories = [f"tests.bench.paced:{speed}" for speed in WORKERS]
    with pool(factories) as started, ranks(started.clients, RANKS) as trainer:
        yield trainer


if __name__ == "__main__":
    from tests.bench.alone import run_alone

    run_alone(measure)
