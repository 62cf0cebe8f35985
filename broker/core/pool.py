"""The workers of one model, and the requests for it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from broker.core.queue import FairQueue
from broker.core.schedule import Choice
from broker.core.state import WorkerSession
from broker.core.timers import Timer
from broker.protocol.messages import ModelDescription


@dataclass(eq=False)
class Pool:
    """Workers that serve the same, and what waits for one of them."""

    description: ModelDescription
    workers: dict[str, WorkerSession] = field(default_factory=dict)
    #: the same workers, to choose one from
    choice: Choice = field(default_factory=Choice)
    queue: FairQueue = field(default_factory=FairQueue)
    #: has the queue looked at
    look: Timer | None = None
    #: has it looked at whether anybody still waits for a worker, while there is none
    closing: Timer | None = None

    @property
    def looks_at(self) -> float:
        """When a timer will have the queue looked at."""
        return math.inf if self.look is None or self.look.call is None else self.look.when
