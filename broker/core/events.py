"""What the core is told, and what it answers."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Union

from broker.log_line import Log
from broker.protocol.wire import Buffer, Packet


class Side(enum.Enum):
    """Which ROUTER socket a connection belongs to."""

    CLIENT = "client"
    WORKER = "worker"


@dataclass(frozen=True)
class Received:
    """A well-formed message came. ``connection`` is the ROUTER's name for it, never the peer's;
    ``user`` is the fingerprint of the key that it authenticated with, "" without keys.
    """

    side: Side
    connection: bytes
    packet: Packet
    user: str = ""


@dataclass(frozen=True)
class Moving:
    """A message is on its way on this connection, and its end has not come."""

    side: Side
    connection: bytes


@dataclass(frozen=True)
class BadBytes:
    """Something came that is not a message; ``error`` says why."""

    side: Side
    connection: bytes
    error: str
    other_version: bool = False


@dataclass(frozen=True)
class ConnectionLost:
    """The transport says that the connection is gone."""

    side: Side
    connection: bytes


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


Event = Union[Received, Moving, BadBytes, ConnectionLost, Tick]  # noqa: UP007


@dataclass(frozen=True)
class Send:
    """Put these frames on this connection."""

    side: Side
    connection: bytes
    frames: tuple[Buffer, ...]


Action = Union[Send, Log]  # noqa: UP007
