"""The other rank of a trainer's default group: it reduces with rank 0 until that sends a 0."""

from __future__ import annotations

import sys
from datetime import timedelta

import torch
import torch.distributed as dist

if __name__ == "__main__":
    dist.init_process_group(
        "gloo", init_method=sys.argv[1], rank=1, world_size=2, timeout=timedelta(seconds=120)
    )
    going = True
    while going:
        both = torch.ones(2)
        dist.all_reduce(both)
        going = both[0].item() > 1
    dist.destroy_process_group()
