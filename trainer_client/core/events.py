"""What a client's core is told, and what it says in return."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import numpy as np
from numpy.typing import NDArray

from broker.log_line import Log
from broker.peer.link import Arrived, Connected, Disconnected, Reopen, SendTo, Tick
from broker.protocol import Packet
from broker.protocol import messages as m


@dataclass(frozen=True)
class Submit:
    """A new request. ``deadline`` is on the core's clock."""

    packet: Packet
    deadline: float


@dataclass(frozen=True)
class CancelRequest:
    """Nobody wants this request any more."""

    id: m.RequestId


@dataclass(frozen=True)
class Received:
    """A direct transfer ended: ``tensors`` are its own, or None, and ``error`` says why."""

    id: m.RequestId
    tensors: Any
    error: str = ""


@dataclass(frozen=True)
class KeepMapping:
    """A vocab mapping to offer to whichever broker asks for it."""

    packet: Packet


Event = Union[  # noqa: UP007
    Connected, Disconnected, Arrived, Submit, CancelRequest, Received, KeepMapping, Tick
]


@dataclass(frozen=True)
class Deliver:
    """The answer, verified: hand it to the caller. The times are on the core's clock."""

    id: m.RequestId
    packet: Packet
    request: m.Request
    submitted_at: float
    #: when it was first sent
    sent_at: float
    arrived_at: float
    #: those that came by wire, one after the other as the manifest says, each uint8 [nbytes]
    octets: Sequence[NDArray[np.uint8]] = ()
    #: those that came directly
    tensors: Any = None


@dataclass(frozen=True)
class ReceiveDirectly:
    """Receive the tensors of this reply; an end of it is told by :class:`Received`.

    Also for replies that nobody waits for any more, so that the two ends stay in step.
    """

    reply: m.Reply


@dataclass(frozen=True)
class JoinChannel:
    """A worker invites this client to a direct channel."""

    worker: str
    invitation: m.Invitation


@dataclass(frozen=True)
class Fail:
    """The request ended without a result. ``code`` is a failure code, or one of the client's own:
    ``deadline``, ``refused``, ``identity``.
    """

    id: m.RequestId
    code: str
    text: str


Action = Union[  # noqa: UP007
    SendTo, Reopen, Deliver, ReceiveDirectly, JoinChannel, Fail, Log
]
