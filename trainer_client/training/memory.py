"""How much memory a training process has taken at most."""

from __future__ import annotations

import resource
import sys

import torch

#: ``ru_maxrss`` counts kilobytes, except on macOS.
_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024


def peak_bytes(device: torch.device) -> int:
    """The most that was taken so far: of a GPU's memory by tensors, else of RAM by the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES
