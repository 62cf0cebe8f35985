"""Targets that never answer: ``--target-factory tests.integration.hanging:...``."""

from __future__ import annotations

import ctypes
import time
from typing import Any

from worker.targets.stub import StubTarget

_FOR_EVER_S = 3600


class Sleeping(StubTarget):
    """Hangs in Python."""

    def forward(self, *tokens: Any) -> Any:
        time.sleep(_FOR_EVER_S)


class Holding(StubTarget):
    """Hangs in C code, with the interpreter's lock held."""

    def forward(self, *tokens: Any) -> Any:
        ctypes.PyDLL(None).sleep(_FOR_EVER_S)
