"""Ranks of a training, a process each, that step together: a step ends with its last rank's."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.bench.paced import TOKENS
from tests.vocab import shuffled
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.training.prefetch import Prefetcher

#: No step takes so long, nor does a rank to come up.
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Asked:
    """All three [1, TOKENS]."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor


@dataclass(frozen=True)
class Run:
    """What the ranks are to do: so many steps that count after others that do not."""

    steps: int
    warm_steps: int
    #: of one step, without waiting for its batch
    compute_s: float = 0.0
    prefetch: bool = True


@dataclass(frozen=True)
class Step:
    """What one rank saw of one step; monotonic seconds."""

    began_at: float
    #: its batch was there
    ready_at: float
    #: all ranks had done theirs
    ended_at: float


class Ranks:
    """The processes, each with a client of one job."""

    def __init__(self, endpoint: str, count: int) -> None:
        context = multiprocessing.get_context("spawn")
        barrier: Any = context.Barrier(count)
        self._pipes = []
        self._processes = []
        for rank in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(endpoint, rank, barrier, theirs))
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        for pipe in self._pipes:
            pipe.recv()

    def train(self, run: Run) -> Trained:
        for pipe in self._pipes:
            pipe.send(run)
        return Trained([pipe.recv()[run.warm_steps :] for pipe in self._pipes])

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()  # which ends its rank
        for process in self._processes:
            process.join()


class Trained:
    """The steps that count, of each rank."""

    def __init__(self, ranks: list[list[Step]]) -> None:
        self.n_steps = len(ranks[0])
        self.seconds = ranks[0][-1].ended_at - ranks[0][0].began_at
        #: a step waits as long as the rank that waits longest
        self.waited_s = sum(
            max(step.ready_at - step.began_at for step in steps)
            for steps in zip(*ranks, strict=True)
        )

    @property
    def steps_per_s(self) -> float:
        return self.n_steps / self.seconds

    @property
    def waiting(self) -> float:
        """Share of the time in which a rank had no batch to compute with."""
        return self.waited_s / self.seconds


@contextlib.contextmanager
def ranks(endpoint: str, count: int) -> Iterator[Ranks]:
    """So many ranks, connected to a broker; their first run may follow at once."""
    started = Ranks(endpoint, count)
    try:
        yield started
    finally:
        started.close()


def client(endpoint: str, rank: int = 0) -> RemoteEagle3TargetModel:
    """A client that has chosen a draft vocab: all of the target's."""
    backend = RemoteEagle3TargetModel([endpoint], direct="off", job="bench", rank=rank)
    size = backend.model_info()["vocab_size"]
    backend.set_vocab_mapping(shuffled(torch.arange(size)), torch.ones(size, dtype=torch.bool))
    return backend


def batches(backend: RemoteEagle3TargetModel, *, prefetch: bool) -> Generator[object, None, None]:
    """Without an end."""
    if prefetch:
        yield from Prefetcher(backend, itertools.repeat(sample()))
    while not prefetch:
        asked = sample()
        yield backend.generate_batch(asked.input_ids, asked.attention_mask, asked.loss_mask)


def sample() -> Asked:
    """What a rank asks about."""
    ones = torch.ones(1, TOKENS, dtype=torch.int64)
    return Asked(torch.zeros_like(ones), ones, ones)


def _rank(endpoint: str, rank: int, barrier: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    with client(endpoint, rank) as backend, contextlib.suppress(EOFError):
        pipe.send("ready")
        while True:
            pipe.send(_steps(backend, pipe.recv(), barrier))


def _steps(backend: RemoteEagle3TargetModel, run: Run, barrier: Any) -> list[Step]:
    taken = batches(backend, prefetch=run.prefetch)
    steps = []
    for _ in range(run.warm_steps + run.steps):
        began_at = time.monotonic()
        next(taken)
        ready_at = time.monotonic()
        time.sleep(run.compute_s)
        barrier.wait(_PATIENCE_S)
        steps.append(Step(began_at, ready_at, time.monotonic()))
    taken.close()
    return steps
