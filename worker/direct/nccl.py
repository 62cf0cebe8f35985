"""CUDA tensors between GPUs, by an NCCL communicator of two that stands beside any other.

NCCL's own answer to a dead peer is a watchdog that ends the process. With blocking wait there is
no watchdog; the setting is read in the constructor, so that it is in force for this group alone
and the trainer's own groups keep their policy. Completion is polled against the channel's limit,
as torchft does, and a communicator that stalls is aborted in a thread of its own, because an abort
may hang as well.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from broker.protocol.limits import MIB
from worker.direct.backend import CLIENT, WORKER, TransferError, out_of_step, plain
from worker.direct.pair import OnPair, PairStore
from worker.direct.parts import parts

#: One coalesced operation: large, since each costs a kernel; its time limit is the channel's.
_OPERATION_BYTES = 256 * MIB
_POLL_S = 0.0002
#: How long the end of a channel waits for NCCL to be rid of its communicator.
_ABORT_S = 2.0
_constructing = threading.Lock()


class NcclBackend(OnPair):
    """See :class:`worker.direct.backend.Backend`."""

    def __init__(self, store: PairStore, rank: int, device: torch.device, limit_s: float) -> None:
        from torch.distributed import ProcessGroupNCCL

        super().__init__(store)
        self._peer = CLIENT if rank == WORKER else WORKER
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._interrupted = threading.Event()
        self._aborting: threading.Thread | None = None
        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=limit_s)
        try:
            with _constructing, _blocking_wait():
                self._group: Any = ProcessGroupNCCL(store, rank, 2, options)
            self._group.eager_connect_single_device(device)
        except RuntimeError as error:
            raise TransferError(plain(error)) from error

    def send(self, seq: int, tensors: Sequence[Tensor], limit_s: float) -> None:
        on_device = [tensor.to(self._device) for tensor in tensors]
        for number, part in enumerate(parts([t.numel() for t in on_device], _OPERATION_BYTES)):
            pieces = [on_device[piece.tensor][piece.start : piece.stop] for piece in part]
            with torch.cuda.stream(self._stream):
                note = torch.tensor([seq, number], device=self._device)
            self._move(self._group.send, [*pieces, note], limit_s)

    def receive(self, seq: int, sizes: Sequence[int], limit_s: float) -> list[Tensor]:
        with torch.cuda.stream(self._stream):
            tensors = [torch.empty(size, dtype=torch.uint8, device=self._device) for size in sizes]
            # nothing that a part says: what never came must not look like part (0, 0)
            note = torch.full((2,), -1, dtype=torch.int64, device=self._device)
        for number, part in enumerate(parts(sizes, _OPERATION_BYTES)):
            pieces = [tensors[piece.tensor][piece.start : piece.stop] for piece in part]
            self._move(self._group.recv, [*pieces, note], limit_s)
            with torch.cuda.stream(self._stream):  # another one has others' kernels before it
                came = tuple(note.tolist())
            if came != (seq, number):
                self.interrupt()
                raise out_of_step((seq, number), came)
        for tensor in tensors:  # their memory is of our stream, and they are used on others
            tensor.record_stream(torch.cuda.default_stream(self._device))
        return tensors

    def interrupt(self) -> None:
        if not self._interrupted.is_set():
            self._interrupted.set()
            self._aborting = threading.Thread(
                target=self._group.abort, name="draftmq-abort", daemon=True
            )
            self._aborting.start()

    def close(self) -> None:
        self.interrupt()
        if self._aborting is not None:
            self._aborting.join(_ABORT_S)  # it may hang, and then it is left behind
        super().close()

    def _move(self, move: Callable[..., Any], tensors: Sequence[Tensor], limit_s: float) -> None:
        """One coalesced operation on this channel's own stream, waited for by polling."""
        try:
            with torch.cuda.stream(self._stream):
                self._group._start_coalescing()
                for tensor in tensors:
                    move([tensor], self._peer, 0)
                work = self._group._end_coalescing()
            deadline = time.monotonic() + limit_s
            while not work.is_completed():
                if self._interrupted.wait(_POLL_S):
                    raise TransferError("the channel was dropped")
                if time.monotonic() >= deadline:
                    raise TransferError(f"timed out: nothing moved for {limit_s:g} s")
            work.wait()  # it has completed, perhaps by an error, which is raised here
        except (RuntimeError, TransferError) as error:
            self.interrupt()
            raise TransferError(plain(error)) from error


@contextmanager
def _blocking_wait() -> Iterator[None]:
    name = "TORCH_NCCL_BLOCKING_WAIT"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
