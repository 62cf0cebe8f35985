"""From the target's device to the CPU, beside the target's next forward.

Two threads share the work: one runs the target and marks where on the device's time line an
answer is finished, the other waits for that mark and copies. On the CPU a mark is the time, and
there is nothing to copy.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

#: A place on the device's time line.
Mark = Any


class Staging(Protocol):
    """What the pipeline needs of a device."""

    def mark(self, tensors: Iterable[Tensor] = ()) -> Mark:
        """Here the work asked for so far ends; ``tensors`` are its results. Does not wait."""

    def seconds(self, begin: Mark, end: Mark) -> float:
        """What the device took between two marks. Waits for the second."""

    def after(
        self, mark: Mark, tensors: Iterable[Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        """A scope in which ``tensors``, which are there at ``mark``, may be used."""

    def to_cpu(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors, ready to be read; within :meth:`after` their mark."""


class CpuStaging:
    """Copies nothing: what a target on the CPU makes can be read at once."""

    def mark(self, tensors: Iterable[Tensor] = ()) -> Mark:
        return time.perf_counter()

    def seconds(self, begin: Mark, end: Mark) -> float:
        return float(end - begin)

    def after(
        self, mark: Mark, tensors: Iterable[Tensor]
    ) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def to_cpu(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(tensors)


class CudaStaging:
    """Copies into pinned memory on a stream of its own, so that they run beside kernels.

    The pinned memory is torch's: freed with the answer's last frame, and used again.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self, tensors: Iterable[Tensor] = ()) -> Mark:
        for tensor in tensors:
            if tensor.is_cuda and tensor.device != self._device:  # a target over several devices
                torch.cuda.synchronize(tensor.device)
        event = torch.cuda.Event(enable_timing=True, blocking=True)  # others spin in their waits
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Mark, end: Mark) -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000

    @contextlib.contextmanager
    def after(self, mark: Mark, tensors: Iterable[Tensor]) -> Iterator[None]:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(mark)
            for tensor in tensors:
                if tensor.device == self._device:
                    tensor.record_stream(self._stream)  # its memory is not given away before
            yield

    def to_cpu(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        copies = {name: self._copy(tensor) for name, tensor in tensors.items()}
        copied = torch.cuda.Event(blocking=True)
        copied.record(self._stream)
        copied.synchronize()  # of these copies, and not of the target's kernels
        return copies

    def _copy(self, tensor: Tensor) -> Tensor:
        if tensor.device != self._device:
            return tensor.cpu()
        pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return pinned.copy_(tensor, non_blocking=True)


def staging_for(device: torch.device) -> Staging:
    """The way from this device to the CPU."""
    return CudaStaging(device) if device.type == "cuda" else CpuStaging()
