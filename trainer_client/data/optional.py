"""Libraries that only some formats need."""

from __future__ import annotations

import importlib
from typing import Any

from trainer_client.errors import DataError


def needed(module: str, what: str) -> Any:
    """A module. Raises :class:`DataError` that says how to install it, where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise DataError(
            f"{what} need {module.partition('.')[0]}, which is not installed; pip install "
            "'draftmq[data]'"
        ) from None
