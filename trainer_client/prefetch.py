"""Keeping requests ahead of the trainer: k under way, results strictly in order."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable, Iterator
from typing import Any, Generic, Protocol, TypeVar

from trainer_client.batch import BatchHandle, Eagle3TargetBatch, TargetBackend


class Sample(Protocol):
    """One micro-batch of token ids, before the target has seen it; all [B, T]."""

    @property
    def input_ids(self) -> Any: ...

    @property
    def attention_mask(self) -> Any: ...

    @property
    def loss_mask(self) -> Any: ...


S = TypeVar("S", bound=Sample)


class Prefetcher(Generic[S]):
    """Iterates over ``(sample, batch)`` with ``depth`` requests under way at the target.

    Results come in the order of the samples, whatever the order of the replies. ``waited_s`` adds
    up what the consumer has waited for the target. A backend without ``supports_async`` is asked
    when the consumer comes. Leaving the iteration early cancels what is under way.
    """

    def __init__(self, backend: TargetBackend, samples: Iterable[S], depth: int = 4) -> None:
        if depth < 1:
            raise ValueError(f"the prefetch depth must be at least 1, got {depth}")
        self.backend = backend
        self.depth = depth
        self.waited_s = 0.0
        self._samples = iter(samples)

    def __iter__(self) -> Iterator[tuple[S, Eagle3TargetBatch]]:
        ahead = self.depth if self.backend.supports_async else 0
        pending: collections.deque[tuple[S, BatchHandle]] = collections.deque()
        try:
            for sample in self._samples:
                pending.append((sample, self._ask(sample)))
                if len(pending) > ahead:
                    yield self._next(pending)
            while pending:
                yield self._next(pending)
        finally:
            for _, handle in pending:
                handle.cancel()

    def _ask(self, sample: S) -> BatchHandle:
        tensors = (sample.input_ids, sample.attention_mask, sample.loss_mask)
        if self.backend.supports_async:
            return self.backend.generate_batch_async(*tensors)
        return _Later(self.backend, tensors)

    def _next(
        self, pending: collections.deque[tuple[S, BatchHandle]]
    ) -> tuple[S, Eagle3TargetBatch]:
        sample, handle = pending.popleft()
        began = time.perf_counter()
        batch = handle.result()
        self.waited_s += time.perf_counter() - began
        return sample, batch


class _Later:
    """The handle of a synchronous backend: asks when it is waited for."""

    def __init__(self, backend: TargetBackend, tensors: tuple[Any, Any, Any]) -> None:
        self._backend = backend
        self._tensors = tensors

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        return self._backend.generate_batch(*self._tensors)

    def cancel(self) -> bool:
        return True
