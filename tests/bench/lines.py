"""What a benchmark says: one line for each figure, beside what it is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

#: Told what is being done, for a person who waits.
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Line:
    """One figure. ``wants`` is the bound in words, ``holds`` whether the figure keeps it.

    ``peer`` names who else was measured in the same run, and ``peer_value`` is its figure in the
    same unit; None where the peer could not run here, which the table says.
    """

    name: str
    value: float
    unit: str
    wants: str
    holds: bool
    peer: str | None = None
    peer_value: float | None = None
