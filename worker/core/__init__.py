"""The worker as a state machine, without sockets, threads or a clock of its own."""

from __future__ import annotations

from broker.log_line import Log
from worker.core.events import (
    Action,
    Compute,
    Computed,
    ComputeTogether,
    Drain,
    Event,
    Exit,
    Forget,
    Learn,
    TargetFree,
)
from worker.core.machine import WorkerCore

__all__ = [
    "Action",
    "Compute",
    "ComputeTogether",
    "Computed",
    "Drain",
    "Event",
    "Exit",
    "Forget",
    "Learn",
    "Log",
    "TargetFree",
    "WorkerCore",
]
