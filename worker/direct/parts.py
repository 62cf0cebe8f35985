"""How tensors are cut for a transfer: both ends work it out from the manifest alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from broker.peer.tensors import NAMES
from broker.protocol import messages as m
from broker.protocol.limits import MIB

#: A part is what is waited for at once, with the channel's limit: 16 MiB in 5 s is a slow network.
TRANSFER_PART_BYTES = 16 * MIB


@dataclass(frozen=True)
class Piece:
    """The bytes ``start`` to ``stop`` of one tensor of the manifest."""

    tensor: int
    start: int
    stop: int


def parts(sizes: Sequence[int], part_bytes: int = TRANSFER_PART_BYTES) -> list[list[Piece]]:
    """Cut tensors of these sizes into parts of at most ``part_bytes``, in order, none empty."""
    cut: list[list[Piece]] = []
    room = 0
    for number, size in enumerate(sizes):
        start = 0
        while start < size:
            if not room:
                cut.append([])
                room = part_bytes
            stop = min(size, start + room)
            cut[-1].append(Piece(number, start, stop))
            room -= stop - start
            start = stop
    return cut


def octets(tensor: Tensor) -> Tensor:
    """The tensor's bytes, uint8 [nbytes]: what every backend can send, whatever the dtype."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def on_host(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """CPU tensors; those of a GPU worker by pinned memory and a stream of its own."""
    if not any(tensor.is_cuda for tensor in tensors):
        return tensors
    stream = torch.cuda.Stream(next(tensor.device for tensor in tensors if tensor.is_cuda))
    with torch.cuda.stream(stream):
        staged = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors
        ]
        for host, tensor in zip(staged, tensors, strict=True):
            host.copy_(tensor, non_blocking=True)
        copied = torch.cuda.Event(blocking=True)
        copied.record(stream)
    copied.synchronize()
    return staged


def specs(tensors: Mapping[str, Tensor]) -> tuple[m.TensorSpec, ...]:
    """The manifest of a direct transfer. Raises ``KeyError`` for a dtype that does not travel."""
    return tuple(
        m.TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape), 0)
        for name, tensor in tensors.items()
    )
