"""What happens to a plan, and what it asks for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Union

from broker.chaos.faults import Direction, Fault, How


@dataclass(frozen=True)
class Opened:
    """Someone connected to the proxy. Numbers are given in order, and never again."""

    connection: int
    pair: int


@dataclass(frozen=True)
class Closed:
    """The connection is gone, whoever ended it."""

    connection: int


@dataclass(frozen=True)
class Passing:
    """These bytes are about to go out, ``direction`` being up or down."""

    connection: int
    direction: Direction
    n_bytes: int


@dataclass(frozen=True)
class Inject:
    """Do this now, to the connections that the fault names, or to this one."""

    fault: Fault
    connection: int | None = None


@dataclass(frozen=True)
class Heal:
    """End all faults, and let no more come but by :class:`Inject`."""


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Union[Opened, Closed, Passing, Inject, Heal, Tick]  # noqa: UP007


@dataclass(frozen=True)
class Refuse:
    """Close this new connection at once."""

    connection: int


@dataclass(frozen=True)
class Cut:
    """End this connection."""

    connection: int
    how: How


@dataclass(frozen=True)
class HalfClose:
    """Tell the receiving end that no more comes; what comes for it is thrown away."""

    connection: int
    direction: Direction


@dataclass(frozen=True)
class Swallow:
    """Do not forward the bytes that were about to pass."""


@dataclass(frozen=True)
class Flip:
    """Flip this bit of the bytes that are about to pass."""

    offset_bytes: int
    bit: int


@dataclass(frozen=True)
class Truncate:
    """Forward only so many of the bytes that are about to pass, then end the connection."""

    keep_bytes: int
    how: How


@dataclass(frozen=True)
class Injected:
    """A fault began: to be logged. ``connection`` is None for all of them, the future ones too."""

    fault: Fault
    connection: int | None


@dataclass(frozen=True)
class Ended:
    """A lasting fault is over."""

    fault: Fault


Action = Union[  # noqa: UP007
    Refuse, Cut, HalfClose, Swallow, Flip, Truncate, Injected, Ended
]
