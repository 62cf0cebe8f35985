"""The processes of one training run, and what they tell each other beside gradients."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


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
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait for the others, before leaving in good order.

        Gloo's threads take the GIL to let go of a tensor, and the end of a group, which holds it,
        waits for them: right behind an all-reduce it would wait for ever. In a barrier they get it.
        """
        if self.world_size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the process group, also in the middle of things."""
        if dist.is_initialized():
            dist.destroy_process_group()
