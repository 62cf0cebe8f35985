"""What the programs of this directory share: the device, the card, waiting for a GPU, JSON out."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

#: Without a GPU a program runs tiny shapes on the CPU, to see that it runs.
GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")


def card() -> dict[str, str]:
    """What the figures were measured on."""
    if not GPU:
        return {"card": "no GPU", "driver": "none", "torch": torch.__version__}
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    return {
        "card": torch.cuda.get_device_name(0),
        "driver": driver.split()[0],
        "torch": torch.__version__,
    }


def settle() -> None:
    """Wait for all that the GPU was given."""
    if GPU:
        torch.cuda.synchronize()


def timed_ms(call: Callable[[], Any], times: int, *, warm: int = 2) -> list[float]:
    """Milliseconds of each of ``times`` calls, the GPU's work included."""
    found = []
    for number in range(warm + times):
        settle()
        began = time.perf_counter()
        call()
        settle()
        if number >= warm:
            found.append(1000 * (time.perf_counter() - began))
    return found


def keep_busy(seconds: float) -> torch.Tensor | None:
    """Give the current stream about so long of work; returns at once."""
    if not GPU:
        return None
    product = torch.randn(8192, 8192, device=DEVICE, dtype=torch.bfloat16)
    for _ in range(int(seconds / 0.0016)):  # an H100 takes about 1.6 ms for one
        product = product @ product
    return product


def say(found: dict[str, Any], path: str) -> None:
    """Write the figures to ``path`` and print them."""
    Path(path).write_text(json.dumps(found, indent=1), encoding="utf-8")
    json.dump(found, sys.stdout)
    print(flush=True)
