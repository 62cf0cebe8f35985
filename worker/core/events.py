"""What the worker's core is told, and what it wants done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from broker.log_line import Log
from broker.peer.link import Arrived, Connected, Disconnected, Reopen, SendTo, Tick
from broker.protocol import Packet
from broker.protocol import messages as m


@dataclass(frozen=True)
class TargetFree:
    """The target is done with all that it was given; their answers are still being made."""


@dataclass(frozen=True)
class Computed:
    """A request's answer is made: the reply with its parts, or the failure. The target is done with
    it, too.
    """

    id: m.RequestId
    answer: tuple[Packet, ...]


@dataclass(frozen=True)
class Drain:
    """Finish what is held, take nothing new, then leave."""

    reason: str


Event = Union[Connected, Disconnected, Arrived, TargetFree, Computed, Drain, Tick]  # noqa: UP007


@dataclass(frozen=True)
class Compute:
    """Give this request, which came at ``received_at``, to the target."""

    packet: Packet
    received_at: float


@dataclass(frozen=True)
class ComputeTogether:
    """Give these requests to the target in one forward; each gets an answer of its own."""

    parts: tuple[Compute, ...]


@dataclass(frozen=True)
class Learn:
    """Keep the vocab mapping that this offer carries."""

    packet: Packet


@dataclass(frozen=True)
class Forget:
    """Drop a vocab mapping; it is told again when it is needed."""

    mapping_id: str


@dataclass(frozen=True)
class Exit:
    """Leave: drained, or refused by every broker (``error`` says why)."""

    error: str = ""


Action = Union[SendTo, Reopen, Compute, ComputeTogether, Learn, Forget, Exit, Log]  # noqa: UP007
