"""Which faults there are, when they strike, and how a script says so."""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from broker.errors import BrokerError


class ChaosError(BrokerError):
    """The proxy cannot do what was asked; the text says what is allowed."""


class FaultError(ChaosError):
    """A fault is described wrongly. ``field`` is the one to look at."""

    def __init__(self, field: str, text: str) -> None:
        super().__init__(text)
        self.field = field


class Kind(enum.StrEnum):
    """What is done to a connection."""

    CUT = "cut"
    STALL = "stall"
    THROTTLE = "throttle"
    DELAY = "delay"
    TRUNCATE = "truncate"
    CORRUPT = "corrupt"
    HALF_CLOSE = "half-close"
    REFUSE = "refuse"
    BLACKHOLE = "blackhole"


class Direction(enum.StrEnum):
    """``up`` is from whoever connects to the upstream; ``down`` the way back."""

    UP = "up"
    DOWN = "down"
    BOTH = "both"


class Which(enum.StrEnum):
    """The connections that a fault at a given time strikes."""

    ALL = "all"
    ONE = "one"
    NEWEST = "newest"


class How(enum.StrEnum):
    """How TCP says that a connection is over: at once, or after what is under way."""

    RST = "rst"
    FIN = "fin"


#: What goes on until its time is over; the others happen once.
LASTING = frozenset({Kind.STALL, Kind.THROTTLE, Kind.DELAY, Kind.REFUSE, Kind.BLACKHOLE})
#: What strikes bytes on their way rather than a connection: the next ones that pass.
IN_PASSING = frozenset({Kind.TRUNCATE, Kind.CORRUPT})


@dataclass(frozen=True)
class Fault:
    """What is done, to which connections."""

    kind: Kind
    direction: Direction = Direction.BOTH
    connections: Which = Which.ALL
    #: number of the --listen/--upstream pair, from 1; 0: all of them
    pair: int = 0
    #: of lasting kinds: until healed, unless given
    for_s: float = math.inf
    how: How = How.RST
    bytes_per_s: float = math.inf
    delay_s: float = 0.0
    jitter_s: float = 0.0
    bits: int = 1


@dataclass(frozen=True)
class Rule:
    """A fault and when it strikes: at times since the start, or by chance."""

    fault: Fault
    at_s: float | None = None
    every_s: float | None = None
    #: expected strikes in a second of each connection
    per_s: float = 0.0
    #: expected strikes in a MiB that passes on each connection, each way
    per_mib: float = 0.0


def describe(fault: Fault) -> dict[str, Any]:
    """The fault as a script would say it, without what is as usual."""
    said = {
        field.name: getattr(fault, field.name)
        for field in fields(fault)
        if getattr(fault, field.name) != field.default
    }
    if "for_s" in said:
        said["for"] = said.pop("for_s")
    return said


# -- reading ------------------------------------------------------------------------------------

_Reader = Callable[[str, Any], Any]
_YEAR_S = 365 * 24 * 3600.0


def _number(least: float, most: float) -> _Reader:
    def read(name: str, value: Any) -> float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not fits or not least <= value <= most:
            span = f"a number from {least:g} to {most:g}"
            raise FaultError(name, f"{name!r} is {value!r}; it must be {span}")
        return float(value)

    return read


def _integer(least: int) -> _Reader:
    def read(name: str, value: Any) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise FaultError(name, f"{name!r} is {value!r}; it must be an integer from {least}")
        return value

    return read


def _one_of(choices: type[enum.StrEnum]) -> _Reader:
    def read(name: str, value: Any) -> enum.StrEnum:
        allowed = [choice.value for choice in choices]
        if value not in allowed:
            raise FaultError(name, f"{name!r} is {value!r}; it must be one of {', '.join(allowed)}")
        return choices(value)

    return read


_WHAT: dict[str, tuple[str, _Reader]] = {
    "kind": ("kind", _one_of(Kind)),
    "direction": ("direction", _one_of(Direction)),
    "connections": ("connections", _one_of(Which)),
    "pair": ("pair", _integer(1)),
    "for": ("for_s", _number(0.001, _YEAR_S)),
    "how": ("how", _one_of(How)),
    "bytes_per_s": ("bytes_per_s", _number(1, 1e12)),
    "delay_s": ("delay_s", _number(0, 3600)),
    "jitter_s": ("jitter_s", _number(0, 3600)),
    "bits": ("bits", _integer(1)),
}
_WHEN: dict[str, tuple[str, _Reader]] = {
    "at": ("at_s", _number(0, _YEAR_S)),
    "every": ("every_s", _number(0.001, _YEAR_S)),
    "per_s": ("per_s", _number(1e-9, 1000)),
    "per_mib": ("per_mib", _number(1e-9, 1 << 20)),
}
#: Fields that only some kinds have.
_OWN = {
    "for": LASTING,
    "how": {Kind.CUT, Kind.TRUNCATE},
    "bytes_per_s": {Kind.THROTTLE},
    "delay_s": {Kind.DELAY},
    "jitter_s": {Kind.DELAY},
    "bits": {Kind.CORRUPT},
    "direction": set(Kind) - {Kind.CUT, Kind.REFUSE},
    "connections": set(Kind) - {Kind.REFUSE},
}


def read_fault(said: Any) -> Fault:
    """A fault from a mapping like ``{"kind": "stall", "for": 2}``. Raises :class:`FaultError`."""
    values = _read(said, _WHAT)
    if "kind" not in values:
        kinds = ", ".join(Kind)
        raise FaultError("", f"'kind' is missing; it must be one of {kinds}")
    fault = Fault(**values)
    for name in said:
        if fault.kind not in _OWN.get(name, Kind):
            takers = ", ".join(sorted(_OWN[name]))
            raise FaultError(name, f"{name!r} means nothing for a {fault.kind}, only for {takers}")
    if fault.kind is Kind.THROTTLE and "bytes_per_s" not in said:
        raise FaultError("kind", "a throttle needs 'bytes_per_s'")
    if fault.kind is Kind.DELAY and not fault.delay_s + fault.jitter_s:
        raise FaultError("kind", "a delay needs 'delay_s' or 'jitter_s' above 0")
    return fault


def read_rule(said: Any) -> Rule:
    """A fault with its times, like ``{"kind": "cut", "every": 2}``. Raises :class:`FaultError`."""
    when = _read(said, _WHEN, also=_WHAT)
    fault = read_fault({name: value for name, value in said.items() if name not in _WHEN})
    chance = [name for name in ("per_s", "per_mib") if name in said]
    times = [name for name in ("at", "every") if name in said]
    if len(chance) + bool(times) != 1:
        raise FaultError(
            (chance + times + [""])[0],
            "say when: 'at' and/or 'every' (seconds), or 'per_s', or 'per_mib'; one of the three",
        )
    if chance and fault.kind is Kind.REFUSE:
        raise FaultError(chance[0], "refuse strikes no connection; use 'at' or 'every'")
    if chance and "connections" in said:
        raise FaultError("connections", f"{chance[0]!r} strikes each connection by its own chance")
    if fault.kind in LASTING and times != ["at"] and fault.for_s == math.inf:
        raise FaultError("for", f"a {fault.kind} that comes again needs 'for' (seconds)")
    return Rule(fault, **when)


def _read(
    said: Any, known: Mapping[str, tuple[str, _Reader]], also: Mapping[str, Any] = {}
) -> dict[str, Any]:
    if not isinstance(said, Mapping):
        raise FaultError("", f"a fault is a table of fields, not {said!r}")
    for name in said:
        if name not in known and name not in also:
            allowed = ", ".join([*known, *also])
            raise FaultError(str(name), f"there is no field {name!r}; allowed are {allowed}")
    return {known[name][0]: known[name][1](name, said[name]) for name in known if name in said}
