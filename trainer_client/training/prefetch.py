"""Keeping requests ahead of the trainer, results strictly in order."""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Literal, Protocol, TypeVar

from trainer_client.errors import TargetFailedError
from trainer_client.targets.batch import BatchHandle, Eagle3TargetBatch, TargetBackend
from trainer_client.training.data import ask
from trainer_client.training.depth import AutoDepth, Taken
from trainer_client.training.refused import PartialBatch

#: 32 replies of 2,048 tokens in the encoding ``hidden`` of a target with H=4096 in bfloat16.
MEMORY_BYTES = 2 << 30
Depth = int | Literal["auto"]


class Sample(Protocol):
    """One micro-batch of token ids, before the target has seen it; all [B, T]. With ``lengths`` its
    one row is of packed documents.
    """

    @property
    def input_ids(self) -> Any: ...

    @property
    def attention_mask(self) -> Any: ...

    @property
    def loss_mask(self) -> Any: ...


S = TypeVar("S", bound=Sample)


@dataclass(eq=False)
class _Asked(Generic[S]):
    """A request under way, or its result, until the trainer takes it."""

    sample: S
    handle: BatchHandle
    n_tokens: int
    #: how many results had been taken when it was first seen ready
    ready_at: int | None = None


class Prefetcher(Generic[S]):
    """Iterates over ``(sample, batch)`` with requests under way at the target.

    Results come in the order of the samples, whatever the order of the replies and the depth.
    ``depth`` is how many requests are kept beyond the one that is waited for. With ``auto`` that is
    found (:class:`trainer_client.training.depth.AutoDepth`), results and requests together then
    take at most ``memory_bytes`` (one is always asked for, and only one until its size is known),
    and no more are unanswered than the backend's ``window``, if it has one. A number is kept as it
    is. ``waited_s`` adds up what the consumer has waited for the target, on ``clock``. A backend
    without ``supports_async`` is asked when the consumer comes. Leaving the iteration early cancels
    what is under way. ``failed`` gives what to yield where the target failed on a sample; without
    it that ends the iteration.
    """

    def __init__(
        self,
        backend: TargetBackend,
        samples: Iterable[S],
        depth: Depth = "auto",
        *,
        memory_bytes: int = MEMORY_BYTES,
        clock: Callable[[], float] = time.perf_counter,
        failed: Callable[[S, TargetFailedError], PartialBatch] | None = None,
    ) -> None:
        if depth != "auto" and depth < 1:
            raise ValueError(f"the prefetch depth must be 'auto' or at least 1, got {depth}")
        if memory_bytes < 1:
            raise ValueError(f"memory_bytes must be at least 1, got {memory_bytes}")
        self.backend = backend
        self.memory_bytes = memory_bytes
        self.waited_s = 0.0
        self._samples = iter(samples)
        self._clock = clock
        self._failed = failed
        self._auto = AutoDepth() if depth == "auto" else None
        self._depth = 0 if not backend.supports_async else 1 if depth == "auto" else depth
        self._pending: collections.deque[_Asked[S]] = collections.deque()
        self._taken = 0
        #: of a reply; 0 while none has come
        self._bytes_per_token = 0.0

    @property
    def depth(self) -> int:
        """Requests that may be under way beyond the one that is waited for; 0 without prefetch."""
        return self._depth

    def __iter__(self) -> Iterator[tuple[S, Eagle3TargetBatch | PartialBatch]]:
        try:
            following = next(self._samples, None)
            while following is not None or self._pending:
                while following is not None and self._has_room(following):
                    self._pending.append(self._ask(following))
                    following = next(self._samples, None)
                yield self._take(more=following is not None)
        finally:
            for asked in self._pending:
                asked.handle.cancel()
            self._pending.clear()

    def _has_room(self, sample: S) -> bool:
        if not self._pending:
            return True
        if len(self._pending) > self._depth:
            return False
        if self._auto is None:
            return True
        if not self._bytes_per_token:
            return False
        window = getattr(self.backend, "window", 0)
        if window and sum(not asked.handle.done() for asked in self._pending) >= window:
            return False
        n_tokens = sample.input_ids.numel() + sum(asked.n_tokens for asked in self._pending)
        return n_tokens * self._bytes_per_token <= self.memory_bytes

    def _ask(self, sample: S) -> _Asked[S]:
        handle: BatchHandle
        if self.backend.supports_async:
            handle = ask(self.backend.generate_batch_async, sample)
        else:
            handle = _Later(self.backend, sample)
        return _Asked(sample, handle, sample.input_ids.numel())

    def _take(self, *, more: bool) -> tuple[S, Eagle3TargetBatch | PartialBatch]:
        """Wait for the oldest; ``more`` says that there are samples to ask for."""
        full = more and len(self._pending) > self._depth
        for other in self._pending:
            if other.ready_at is None and other.handle.done():
                other.ready_at = self._taken
        asked = self._pending.popleft()
        began = self._clock()
        batch = self._result(asked)
        self.waited_s += self._clock() - began
        self._bytes_per_token = max(self._bytes_per_token, batch.nbytes / asked.n_tokens)
        if self._auto is not None and self.backend.supports_async:
            waited = asked.ready_at is None
            lead = 0 if asked.ready_at is None else self._taken - asked.ready_at
            self._depth = self._auto.handle(Taken(waited, lead, full))
        self._taken += 1
        return asked.sample, batch

    def _result(self, asked: _Asked[S]) -> Eagle3TargetBatch | PartialBatch:
        try:
            return asked.handle.result()
        except TargetFailedError as error:
            if self._failed is None:
                raise
            return self._failed(asked.sample, error)


class _Later:
    """The handle of a synchronous backend: asks when it is waited for."""

    def __init__(self, backend: TargetBackend, sample: Sample) -> None:
        self._backend = backend
        self._sample = sample

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        return ask(self._backend.generate_batch, self._sample)

    def cancel(self) -> bool:
        return True

    def done(self) -> bool:
        return False
