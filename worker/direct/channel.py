"""A direct channel as a state machine: one worker and one trainer rank, seen from either end.

Both ends hold one :class:`Channel` each and drive it with the same events; the worker begins an
epoch, the client joins it. Nothing here has a socket or a clock. Every event names the epoch that
it is about, and what is about another epoch than the present one changes nothing: so a late
failure of an old process group cannot take down its successor (fencing, as torchft rebuilds its
process groups per quorum).
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, Union

from broker.log_line import Log
from broker.numbers import check_numbers


class ChannelState(enum.Enum):
    """Where a channel stands."""

    IDLE = "idle"
    CONNECTING = "connecting"
    READY = "ready"
    BROKEN = "broken"
    CLOSED = "closed"


@dataclass(frozen=True)
class Open:
    """An attempt begins: the worker sends an invitation, or the client has received one."""

    epoch: int


@dataclass(frozen=True)
class Joined:
    """Both ends are in the process group of this epoch."""

    epoch: int


@dataclass(frozen=True)
class Announced:
    """A reply says that its tensors come as transfer ``seq`` of this epoch (client only)."""

    epoch: int
    seq: int


@dataclass(frozen=True)
class Moved:
    """A transfer of this epoch is complete, and the other end has said so."""

    epoch: int


@dataclass(frozen=True)
class Failed:
    """Connecting or a transfer failed, or stalled past its limit."""

    epoch: int
    why: str
    #: nothing was under way: the other end has left, as ends do
    at_rest: bool = False


@dataclass(frozen=True)
class GiveUp:
    """Too many attempts in a row have failed: what these two move goes by wire from now on."""

    epoch: int
    why: str


@dataclass(frozen=True)
class Close:
    """This end leaves."""

    epoch: int
    why: str


@dataclass(frozen=True)
class Tick:
    """Time has passed."""

    epoch: int


Event = Union[Open, Joined, Announced, Moved, Failed, GiveUp, Close, Tick]  # noqa: UP007

#: Every transition there is; an event that has none here changes nothing. ``docs/direct.md`` draws
#: its diagram from this table.
TRANSITIONS: dict[tuple[ChannelState, type], ChannelState] = {
    (ChannelState.IDLE, Open): ChannelState.CONNECTING,
    (ChannelState.CONNECTING, Joined): ChannelState.READY,
    (ChannelState.CONNECTING, Failed): ChannelState.BROKEN,
    (ChannelState.CONNECTING, Open): ChannelState.CONNECTING,
    (ChannelState.READY, Moved): ChannelState.READY,
    (ChannelState.READY, Failed): ChannelState.BROKEN,
    (ChannelState.READY, Open): ChannelState.CONNECTING,
    (ChannelState.BROKEN, Open): ChannelState.CONNECTING,
    (ChannelState.BROKEN, GiveUp): ChannelState.CLOSED,
    (ChannelState.IDLE, Close): ChannelState.CLOSED,
    (ChannelState.CONNECTING, Close): ChannelState.CLOSED,
    (ChannelState.READY, Close): ChannelState.CLOSED,
    (ChannelState.BROKEN, Close): ChannelState.CLOSED,
}


@dataclass(frozen=True)
class Connect:
    """Build the process group of this epoch, in the background."""

    epoch: int


@dataclass(frozen=True)
class Drop:
    """Free whoever waits on this epoch's process group, then let it go."""

    epoch: int
    why: str


@dataclass(frozen=True)
class Receive:
    """Receive this transfer now: all before it are received (client only)."""

    epoch: int
    seq: int


@dataclass(frozen=True)
class Reject:
    """This transfer will not come; ask for its tensors on the wire (client only)."""

    epoch: int
    seq: int
    why: str


Action = Union[Connect, Drop, Receive, Reject, Log]  # noqa: UP007


@dataclass(frozen=True)
class ChannelConfig:
    """How patient a channel is, each default with its reason."""

    #: A transfer may stand still for so long before it counts as failed. Not the time of a whole
    #: transfer: that would end healthy ones on slow networks.
    limit_s: float = 5.0
    #: Building a process group takes milliseconds, but the invitation travels with a wire reply.
    connect_s: float = 10.0
    #: Wait after a failure, doubled with each further one until a transfer succeeds. The first is
    #: short, for most failures are one cut connection.
    backoff_s: float = 0.1
    backoff_max_s: float = 30.0
    #: Failures in a row after which these two stay on the wire: a port that is blocked stays so.
    max_failures: int = 6

    def __post_init__(self) -> None:
        check_numbers(self, above_0="limit_s connect_s backoff_s backoff_max_s max_failures")


class Channel:
    """One end of one channel. ``name`` is the same at both ends and unlike any other's."""

    def __init__(self, name: str, config: ChannelConfig | None = None) -> None:
        self.name = name
        self.config = config or ChannelConfig()
        self.state = ChannelState.IDLE
        #: number of the present attempt; 0 before the first
        self.epoch = 0
        #: transfers begun in this epoch, in this end's view: sent, or received
        self.seq = 0
        #: failures since the last transfer that succeeded
        self.failures = 0
        self.transfers = 0
        self.retry_at = 0.0
        self.why = ""
        #: announced and not yet received, with the time of the announcement; none is below ``seq``
        self.announced: dict[int, float] = {}
        #: given out by :class:`Receive` and neither moved nor failed
        self.receiving: int | None = None
        self._actions: list[Action] = []

    # -- the only way in ------------------------------------------------------------------------

    def handle(self, event: Event, now: float) -> list[Action]:
        """Take one event; say what to do. ``now`` is monotonic seconds."""
        self._actions = []
        if isinstance(event, Announced):
            self._announced(event, now)
        elif isinstance(event, Open):
            if event.epoch > self.epoch:
                self._move(event, now)
        elif event.epoch == self.epoch:
            self._move(event, now)
        self._receive_next(now)
        return self._actions

    def take_seq(self) -> int:
        """The number of a transfer that begins now (worker only; the channel must be ready)."""
        assert self.state is ChannelState.READY, f"{self} cannot send"
        self.seq += 1
        return self.seq - 1

    def may_open(self, now: float) -> bool:
        """A new attempt is due (worker only)."""
        return self.state is ChannelState.IDLE or (
            self.state is ChannelState.BROKEN and now >= self.retry_at
        )

    @property
    def next_timer(self) -> float | None:
        """When :class:`Tick` should come: a transfer that is announced waits for an earlier one."""
        if self.state is ChannelState.READY and self.announced and self.receiving is None:
            return min(self.announced.values()) + self.config.limit_s
        return None

    # -- transitions ----------------------------------------------------------------------------

    def _move(self, event: Event, now: float) -> None:
        target = TRANSITIONS.get((self.state, type(event)))
        if target is None:
            return
        if self.state in (ChannelState.CONNECTING, ChannelState.READY):
            if isinstance(event, (Failed, Close)):
                self._drop(event.why)
            elif isinstance(event, Open):
                self._drop(f"the other end began epoch {event.epoch}")
        self.state = target
        if isinstance(event, Open):
            self.epoch, self.seq = event.epoch, 0
            self._actions.append(Connect(event.epoch))
        elif isinstance(event, Joined):
            self._log("info", "channel_ready", epoch=self.epoch)
        elif isinstance(event, Moved):
            self.failures = 0
            self.transfers += 1
            self.receiving = None
        elif isinstance(event, Failed):
            self._failed(event, now)
        elif isinstance(event, GiveUp):
            self.why = f"on the wire after {self.failures} failures in a row: {event.why}"
            self._log("warning", "channel_given_up", failures=self.failures, why=event.why)
        elif isinstance(event, Close):
            self.why = event.why

    def _failed(self, event: Failed, now: float) -> None:
        self.why = why = event.why
        wait_s = self.config.backoff_s * 2.0 ** min(self.failures, 30)
        self.failures += 1
        self.retry_at = now + min(wait_s, self.config.backoff_max_s)
        if event.at_rest:
            self._log("info", "channel_left", epoch=self.epoch, why=why)
        else:
            self._log(
                "warning", "channel_broken", epoch=self.epoch, why=why, failures=self.failures
            )
        if self.failures >= self.config.max_failures:
            self._move(GiveUp(self.epoch, why), now)

    def _drop(self, why: str) -> None:
        self._actions.append(Drop(self.epoch, why))
        unfinished = [self.receiving] if self.receiving is not None else []
        unfinished += sorted(self.announced)
        self._actions += [Reject(self.epoch, seq, why) for seq in unfinished]
        self.announced.clear()
        self.receiving = None

    # -- in the order of their numbers ----------------------------------------------------------

    def _announced(self, event: Announced, now: float) -> None:
        there = self.state in (ChannelState.CONNECTING, ChannelState.READY)
        if event.epoch != self.epoch or not there:
            why = f"epoch {event.epoch} is over, the channel is {self.state.value}"
            self._actions.append(Reject(event.epoch, event.seq, self.why or why))
        elif event.seq < self.seq or event.seq in self.announced:
            self._actions.append(Reject(event.epoch, event.seq, "it was received before"))
        else:
            self.announced[event.seq] = now

    def _receive_next(self, now: float) -> None:
        if self.state is not ChannelState.READY or self.receiving is not None:
            return
        if self.announced.pop(self.seq, None) is not None:
            self.receiving = self.seq
            self.seq += 1
            self._actions.append(Receive(self.epoch, self.receiving))
        elif (due := self.next_timer) is not None and now >= due:
            why = f"transfer {self.seq} was never announced, {min(self.announced)} was"
            self._move(Failed(self.epoch, why), now)

    # -- to look at -----------------------------------------------------------------------------

    def _log(self, level: str, event: str, **fields: Any) -> None:
        self._actions.append(Log(level, event, {"channel": self.name, **fields}))

    def __repr__(self) -> str:
        return f"<Channel {self.name} {self.state.value} epoch={self.epoch} seq={self.seq}>"

    def validate(self) -> None:
        """Check every invariant; raises ``AssertionError``."""
        assert (self.state is ChannelState.IDLE) <= (self.epoch == 0)
        assert self.receiving is None or self.receiving == self.seq - 1
        assert all(seq >= self.seq for seq in self.announced)
        if self.state not in (ChannelState.CONNECTING, ChannelState.READY):
            assert not self.announced
            assert self.receiving is None
        assert self.state is ChannelState.CLOSED or self.failures < self.config.max_failures
