"""A log line that a state machine wants written; :func:`broker.logs.log` writes it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Log:
    """Something an operator may want to know. ``event`` is a name of ``broker.catalog``."""

    level: str
    event: str
    fields: Mapping[str, Any] = field(default_factory=dict)
