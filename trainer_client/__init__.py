"""What a training process imports: futures over DEALER sockets, and on top of them a target.

Names are loaded when they are first used, so that importing this package loads neither torch nor
transformers.
"""

from __future__ import annotations

import importlib
from typing import Any

_HOMES = {
    "Client": "trainer_client.service",
    "Eagle3TargetBatch": "trainer_client.targets.batch",
    "Prefetcher": "trainer_client.training.prefetch",
    "RemoteEagle3TargetModel": "trainer_client.targets.remote",
    "TrainerClientError": "trainer_client.errors",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
