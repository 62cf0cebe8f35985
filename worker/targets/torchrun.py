"""Meeting the other processes that torchrun started."""

from __future__ import annotations

import os
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous


def join_process_group(backend: str, timeout: timedelta | None = None) -> None:
    """Form the default process group of torchrun's ranks; ``backend`` as torch has it.

    torchrun keeps one store over all its restarts, in which torch 2.13 leaves the addresses of the
    processes before: a rank that is quicker than the one it looks for would wait at a port where
    nobody listens (Gloo), or for an identifier that nobody shares (NCCL). Each start therefore has
    keys of its own.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout or dist.default_pg_timeout))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    store = dist.PrefixStore(f"start_{start}", store)
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
