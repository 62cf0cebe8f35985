"""Line c: the share of what unequal workers could do together that a training gets of them.

Four workers, one of them four times slower, and four ranks that step together and compute nothing
themselves, so that the workers are the limit. Beside it NeMo AutoModel's own servers and clients,
which take turns, with targets of the same speeds. ``python -m tests.bench.share`` runs it alone.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from tests.bench.lines import Line, Progress
from tests.bench.paced import SECONDS
from tests.bench.peers.nemo import NAME as NEMO
from tests.bench.peers.nemo import nemo
from tests.bench.pool import Pool, pool
from tests.bench.ranks import train

if TYPE_CHECKING:
    from trainer_client.remote import RemoteEagle3TargetModel

WORKERS = ("fast", "fast", "fast", "slow")
RANKS = 4
#: In which the broker learns how fast each worker is, and each rank its depth.
WARM_S = 2.5


def measure(progress: Progress, *, quick: bool) -> list[Line]:
    """The share, and that of NeMo's client."""
    seconds, rounds = (4.0, 1) if quick else (6.0, 2)
    ours: list[float] = []
    theirs: list[float] = []
    with nemo(progress) as peer, unequal_pool() as started, ranks(started) as backends:
        for number in range(1, rounds + 1):
            progress(f"unequal workers, round {number} of {rounds}")
            if peer is not None:
                server_s = [SECONDS[speed] for speed in WORKERS]
                theirs.append(peer.steps_per_s(server_s, RANKS, seconds, WARM_S))
            ours.append(train(backends, seconds=seconds, warm_s=WARM_S).steps_per_s)
    share = RANKS * statistics.median(ours) / ideal_per_s()
    nemos = RANKS * statistics.median(theirs) / ideal_per_s() if theirs else None
    wants = f">= 0.95, and twice {NEMO}'s"
    holds = share >= 0.95 and (nemos is None or share >= 2 * nemos)
    return [Line("c: four unequal workers", share, "of ideal", wants, holds, NEMO, nemos)]


def ideal_per_s() -> float:
    """Requests a second of all workers together, if none ever waits."""
    return sum(1 / SECONDS[speed] for speed in WORKERS)


@contextlib.contextmanager
def unequal_pool() -> Iterator[Pool]:
    with pool([f"tests.bench.paced:{speed}" for speed in WORKERS]) as started:
        yield started


@contextlib.contextmanager
def ranks(started: Pool, count: int = RANKS) -> Iterator[list[RemoteEagle3TargetModel]]:
    """A client for each rank, of one job."""
    import torch

    with contextlib.ExitStack() as stack:
        backends = [
            stack.enter_context(started.client(job="bench", rank=rank)) for rank in range(count)
        ]
        for backend in backends:
            size = backend.model_info()["vocab_size"]
            backend.set_vocab_mapping(torch.arange(size), torch.ones(size, dtype=torch.bool))
        yield backends


if __name__ == "__main__":
    from tests.bench.alone import run_alone

    run_alone(measure)
