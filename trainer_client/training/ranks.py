"""The processes of one training run, and what they tell each other beside gradients."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer_client.errors import TrainerClientError
from worker.targets.torchrun import join_process_group

T = TypeVar("T")
#: Longer than any data set takes to tokenize.
_SLOW = timedelta(days=2)


class RankLostError(TrainerClientError):
    """Another process of the run has gone, so that its sums cannot be made."""


@contextlib.contextmanager
def summing() -> Iterator[None]:
    """What ranks do together. Raises :class:`RankLostError` where one of them has gone."""
    try:
        yield
    except RuntimeError as error:  # what Gloo and NCCL raise
        reason = str(error).splitlines()[0]
        raise RankLostError(f"another rank of this run has gone ({reason})") from error


def added_up(tensor: Tensor) -> Tensor:
    """The sum of this tensor over all ranks, in its place. Raises :class:`RankLostError`."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        with summing():
            dist.all_reduce(tensor)
    return tensor


@dataclass(frozen=True)
class Ranks:
    """Which of the training processes this is."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, timeout_s: float = 600.0) -> Ranks:
        """Join the process group of ``torchrun``, if there is one.

        Tensors on the CPU go by Gloo and, where there is a GPU, those on GPUs by NCCL: a host with
        GPUs may train on its CPU.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        join_process_group(backend, timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def told_by_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank: only its disk is looked at.

        Raises there what ``make`` raises, and :class:`TrainerClientError` on the others.
        """
        if self.world_size == 1:
            return make()
        box: list[Any] = [None, ""]
        failed: Exception | None = None
        if self.first:
            try:
                box[0] = make()
            except Exception as error:
                failed, box[1] = error, str(error)
        with summing():
            dist.broadcast_object_list(box, src=0)
        if failed is not None:
            raise failed
        if box[1]:
            raise TrainerClientError(f"rank 0 cannot train: {box[1]}")
        made: T = box[0]
        return made

    def share(self, draft: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Give every rank the weights and the optimizer's state of rank 0, to the bit."""
        if self.world_size == 1:
            return
        shapes = self.told_by_first(lambda: _state_shapes(optimizer))
        with summing():
            for tensor in (*draft.parameters(), *draft.buffers()):
                dist.broadcast(tensor.data, src=0)
            for parameter, state in zip(_optimized(optimizer), shapes, strict=True):
                mine = optimizer.state[parameter]
                for name, (shape, dtype, on_device) in state.items():
                    device = parameter.device if on_device else "cpu"
                    if name not in mine:
                        mine[name] = torch.empty(shape, dtype=dtype, device=device)
                    dist.broadcast(mine[name], src=0)

    def meet(self) -> None:
        """Wait for the others, before leaving in good order.

        Gloo's threads take the GIL to let go of a tensor, and the end of a group, which holds it,
        waits for them: right behind an all-reduce it would wait for ever. In a barrier they get it.
        """
        if self.world_size > 1:
            with summing():
                dist.barrier()

    def wait_for_slow(self) -> None:
        """Wait for all others, however long they take: one node may find its data tokenized, and
        another tokenize it for hours, and the other waits of a run end after minutes.
        """
        if self.world_size > 1 and dist.is_initialized():
            with summing():
                dist.barrier(dist.new_group(backend="gloo", timeout=_SLOW))

    def leave(self) -> None:
        """Leave the process group, also in the middle of things."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _optimized(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _state_shapes(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """For each parameter the names of its state, with shape, dtype, and whether on its device."""
    return [
        {
            name: (tuple(tensor.shape), tensor.dtype, tensor.device.type == parameter.device.type)
            for name, tensor in optimizer.state.get(parameter, {}).items()
        }
        for parameter in _optimized(optimizer)
    ]
