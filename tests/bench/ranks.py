"""Ranks of a training that step together: each step begins when the last rank has ended its own."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

from tests.bench.paced import TOKENS
from trainer_client.batch import TargetBackend
from trainer_client.prefetch import Prefetcher

#: A step takes less, even of a pool that is four times slower than it should be.
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class Trained:
    """What was seen of the steps after the first ones."""

    steps: int
    seconds: float
    #: of one rank, on the average
    computing_s: float

    @property
    def steps_per_s(self) -> float:
        return self.steps / self.seconds

    @property
    def waiting(self) -> float:
        """Share of the time that was not the trainer's own computing."""
        return 1 - self.computing_s / self.seconds


def train(
    backends: Sequence[TargetBackend],
    *,
    seconds: float,
    warm_s: float,
    compute_s: float = 0.0,
    prefetch: bool = True,
) -> Trained:
    """Train with one rank, and one thread, for each backend; a step computes for ``compute_s``.

    What happens in the first ``warm_s`` is left out.
    """
    training = _Training(len(backends), warm_s, seconds, compute_s)
    threads = [
        threading.Thread(target=training.rank, args=(backend, prefetch), daemon=True)
        for backend in backends
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return training.result()


class _Training:
    def __init__(self, ranks: int, warm_s: float, seconds: float, compute_s: float) -> None:
        self._ranks = ranks
        self._compute_s = compute_s
        self._begins_at = time.perf_counter() + warm_s
        self._ends_at = self._begins_at + seconds
        #: ends of the steps that count; the first is where the counting began
        self._stepped_at: list[float] = []
        self._ended = False
        self._computed_s = 0.0
        self._lock = threading.Lock()
        self._barrier = threading.Barrier(ranks, self._step, _PATIENCE_S)

    def rank(self, backend: TargetBackend, prefetch: bool) -> None:
        try:
            for _ in batches(backend, prefetch=prefetch):
                self._compute()
                self._barrier.wait()
                if self._ended:
                    return
        except BaseException:
            self._barrier.abort()  # the others must not wait for this one
            raise

    def _compute(self) -> None:
        began = time.perf_counter()
        time.sleep(self._compute_s)
        with self._lock:
            if self._stepped_at:
                self._computed_s += time.perf_counter() - began

    def _step(self) -> None:
        """Every rank has made its step."""
        now = time.perf_counter()
        if now >= self._begins_at:
            self._stepped_at.append(now)
        self._ended = now >= self._ends_at

    def result(self) -> Trained:
        assert self._ended, "a rank ended early; its error is above"
        seconds = self._stepped_at[-1] - self._stepped_at[0]
        return Trained(len(self._stepped_at) - 1, seconds, self._computed_s / self._ranks)


def batches(backend: TargetBackend, *, prefetch: bool) -> Iterator[object]:
    """Without an end."""
    if prefetch:
        asked = SimpleNamespace(**sample())
        yield from Prefetcher(backend, itertools.repeat(asked))
    while not prefetch:
        yield backend.generate_batch(**sample())


def sample() -> dict[str, Tensor]:
    """What a rank asks about: input_ids, attention_mask and loss_mask, each [1, TOKENS]."""
    ones = torch.ones(1, TOKENS, dtype=torch.int64)
    return {"input_ids": torch.zeros_like(ones), "attention_mask": ones, "loss_mask": ones}
