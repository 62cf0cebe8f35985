"""A peer's half of one connection to a broker, as a state machine: hello, heartbeats, patience.

Workers and clients hold one :class:`Link` for each broker endpoint. It has no socket: whoever owns
it tells it what happened and carries out what it asks for.

    down --connected--> greeting --Welcome--> ready
    greeting, ready --disconnected or silent--> down (the socket is opened anew)
    down --disconnected or no connection for long--> down (the socket is opened anew)
    any --Refused--> refused (nothing more is tried)
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Union

from broker.protocol import messages as m
from broker.protocol.limits import Limits
from broker.protocol.wire import Packet, encode

#: Until a welcome says otherwise; the broker's own defaults.
_HEARTBEAT_S, _LIVENESS_S = 1.0, 5.0
#: Wait before a socket is opened anew, doubled from the first to the last while nobody welcomes us.
_REOPEN_FIRST_S, _REOPEN_LAST_S = 0.05, 1.0
#: A socket without a connection for so long is opened anew: libzmq gives up for ever, and says
#: nothing, where the bytes of a handshake were damaged.
_CONNECT_S = 5.0


class LinkState(enum.Enum):
    """Where a link stands."""

    DOWN = "down"
    GREETING = "greeting"
    READY = "ready"
    REFUSED = "refused"


@dataclass(frozen=True)
class SendTo:
    """Send this packet to the broker at this endpoint."""

    endpoint: str
    packet: Packet


@dataclass(frozen=True)
class Reopen:
    """Close the socket to this endpoint, with all that it still holds, and open a new one."""

    endpoint: str


LinkAction = Union[SendTo, Reopen]  # noqa: UP007


def note_said(links: Mapping[str, Link], actions: Iterable[object], now: float) -> None:
    """Tell each link what its owner says there."""
    for action in actions:
        if isinstance(action, SendTo):
            links[action.endpoint].spoke(now)


@dataclass(frozen=True)
class Connected:
    """The transport has a connection to this endpoint."""

    endpoint: str


@dataclass(frozen=True)
class Disconnected:
    """The transport lost the connection to this endpoint, or could not make one: ``why``."""

    endpoint: str
    why: str = ""


@dataclass(frozen=True)
class Arrived:
    """A well-formed message came from the broker at this endpoint."""

    endpoint: str
    packet: Packet


@dataclass(frozen=True)
class Tick:
    """Time has passed."""


class Link:
    """The state of one connection.

    ``hello`` makes the message that begins it, ``note`` the line that heartbeats carry.
    """

    def __init__(
        self,
        endpoint: str,
        hello: Callable[[], m.Message],
        now: float,
        note: Callable[[], str] = str,
    ) -> None:
        self.endpoint = endpoint
        self.state = LinkState.DOWN
        self.broker = ""
        #: the number that a broker here gave this life of the peer when it first came
        self.admission: m.Admission | None = None
        self.window = 0
        self.limits = Limits()
        self.heartbeat_s = _HEARTBEAT_S
        self.liveness_s = _LIVENESS_S
        #: workers that serve what this peer waits for, as the broker last said; -1 before it has
        self.workers = -1
        #: what workers serve there, as the broker last said; none before it has
        self.offers: tuple[str, ...] = ()
        self.refusal: m.Refused | None = None
        #: why no connection can be made, as the transport last said; "" where it does not know
        self.trouble = ""
        #: when it was last up, or began: what "no broker for 12 s" is counted from
        self.down_since = now
        self._hello = hello
        self._note = note
        self._heard_at = now
        self._spoke_at = now
        self._beat_at = now
        self._reopen_at: float | None = now + _CONNECT_S
        self._reopen_wait_s = _REOPEN_FIRST_S

    @property
    def ready(self) -> bool:
        return self.state is LinkState.READY

    def may_serve(self, offer: str) -> bool:
        """Whether a request that names this offer (or none, "") belongs there; where no worker is
        attached, one may yet come.
        """
        offers = self.offers
        return not offer or not offers or offer in offers or len(offers) >= m.MAX_OFFERS

    def why_not_ready(self, now: float) -> str:
        """Why nothing can be had of this broker, in words; nothing where it has welcomed us."""
        if self.ready:
            return ""
        if self.refusal is not None:
            return f"the broker at {self.endpoint} refused this peer: {self.refusal.text}"
        if self.trouble:
            return self.trouble
        down_s = now - self.down_since
        return f"no broker answers at {self.endpoint} ({down_s:.0f} s); is it running?"

    def connected(self, now: float) -> list[LinkAction]:
        """The transport has a connection; greet."""
        if self.state is LinkState.REFUSED:
            return []
        self._heard_at = now
        self._reopen_at = None
        return self._greet(now)

    def disconnected(self, now: float, why: str = "") -> list[LinkAction]:
        """The transport lost the connection; a new socket is opened after a moment.

        Also where a handshake failed (``why``): libzmq does not try that again by itself.
        """
        self.trouble = why or self.trouble
        if self.state is LinkState.REFUSED:
            return []
        if self._reopen_at is not None and self._reopen_at <= now + self._reopen_wait_s:
            return []
        return self._down(now)

    def received(self, message: m.Message, now: float) -> list[LinkAction]:
        """Take any message that came here; what is not the link's business changes nothing."""
        self._heard_at = now
        if self.state is LinkState.REFUSED:
            return []
        if isinstance(message, m.Welcome):
            self.state = LinkState.READY
            self.trouble = ""
            self.broker = message.broker
            if message.number and self.admission is None:
                self.admission = m.Admission(message.broker, message.number)
            self.window = message.window
            self.offers = message.offers
            self.limits = message.limits()
            self.heartbeat_s = message.heartbeat_s
            self.liveness_s = message.liveness_s
            self._reopen_wait_s = _REOPEN_FIRST_S
        elif isinstance(message, m.HelloWanted):
            return self._greet(now)
        elif isinstance(message, m.Refused):
            self.state = LinkState.REFUSED
            self.refusal = message
        elif isinstance(message, m.Heartbeat):
            self.workers, self.offers = message.workers, message.offers
        elif isinstance(message, m.Goodbye):
            return self._down(now)
        return []

    def spoke(self, now: float) -> None:
        """Something was said there by whoever owns the link: as good a sign of life as a beat."""
        self._spoke_at = now

    def moving(self, now: float) -> None:
        """The transport moves a message whose end has not come; heartbeats wait behind it."""
        self._heard_at = now

    def tick(self, now: float) -> list[LinkAction]:
        """Do what is due."""
        if self._reopen_at is not None and now >= self._reopen_at:
            self._reopen_at = now + _CONNECT_S
            return [Reopen(self.endpoint)]
        if self.state in (LinkState.DOWN, LinkState.REFUSED):
            return []
        if now - self._heard_at >= self.liveness_s:
            return self._down(now)
        if now < self._beat_due:
            return []
        if self.state is LinkState.GREETING:
            return self._greet(now)
        self._spoke_at = self._beat_at = now
        return [SendTo(self.endpoint, encode(m.Heartbeat(-1, self._note())))]

    def goodbye(self, reason: str) -> list[LinkAction]:
        """Leave on purpose, if anyone is there to be told."""
        return [SendTo(self.endpoint, encode(m.Goodbye(reason)))] if self.ready else []

    @property
    def next_timer(self) -> float | None:
        """When :meth:`tick` is due."""
        if self._reopen_at is not None:
            return self._reopen_at
        if self.state in (LinkState.DOWN, LinkState.REFUSED):
            return None
        return min(self._beat_due, self._heard_at + self.liveness_s)

    @property
    def _beat_due(self) -> float:
        """When one of both has said nothing for ``heartbeat_s``, since a beat is answered, and
        ``liveness_s`` after the last at the latest: an answer also says who serves what.
        """
        quiet_since = min(self._spoke_at, max(self._heard_at, self._beat_at))
        return min(quiet_since + self.heartbeat_s, self._beat_at + self.liveness_s)

    def _greet(self, now: float) -> list[LinkAction]:
        self.state = LinkState.GREETING
        self._spoke_at = self._beat_at = now
        return [SendTo(self.endpoint, encode(self._hello()))]

    def _down(self, now: float) -> list[LinkAction]:
        if self.state is not LinkState.DOWN:
            self.down_since = now
        self.state = LinkState.DOWN
        self.workers, self.offers = -1, ()
        self._reopen_at = now + self._reopen_wait_s
        self._reopen_wait_s = min(2 * self._reopen_wait_s, _REOPEN_LAST_S)
        return []

    def __repr__(self) -> str:
        return f"<Link {self.endpoint} {self.state.value}>"
