"""What happened in one schedule, line by line, for a person who looks for the cause."""

from __future__ import annotations

from typing import Any

from broker.core import BadBytes, ConnectionLost, Received, Send
from broker.peer.link import Arrived, SendTo
from broker.protocol import Packet, decode
from broker.protocol import messages as m
from tests.sim.peers import BrokerProcess, Process

#: Every peer says and hears these all the time.
_NOISE = (m.Heartbeat,)


class Story:
    """Collects the lines; heartbeats are left out."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, now: float, who: object, what: str) -> None:
        self.lines.append(f"{now:9.3f}  {who!s:6} {what}")

    def event(self, now: float, process: Process, event: Any, actions: list[Any]) -> None:
        cause = self._event(process, event)
        for effect in filter(None, (self._action(process, action) for action in actions)):
            cause = f"{cause}, {effect}" if cause else effect
        if cause:
            self.note(now, process, cause)

    def _event(self, process: Process, event: Any) -> str:
        if isinstance(event, Received):
            heard = _shown(event.packet)
            return f"hears {_peer(process, event.connection)}: {heard}" if heard else ""
        if isinstance(event, Arrived):
            heard = _shown(event.packet)
            return f"hears {event.endpoint}: {heard}" if heard else ""
        if isinstance(event, (BadBytes, ConnectionLost)):
            return f"{type(event).__name__} of {_peer(process, event.connection)}"
        name = type(event).__name__
        return "" if name == "Tick" else name + _shown_fields(event)

    def _action(self, process: Process, action: Any) -> str:
        if isinstance(action, Send):
            said = _shown(decode(action.frames))
            return f"tells {_peer(process, action.connection)}: {said}" if said else ""
        if isinstance(action, SendTo):
            said = _shown(action.packet)
            return f"tells {action.endpoint}: {said}" if said else ""
        name = type(action).__name__
        return "" if name == "Log" else name + _shown_fields(action)


def _peer(process: Process, connection: bytes) -> str:
    assert isinstance(process, BrokerProcess)
    known = process.connections.get(connection)
    owner = str(known.socket.owner) if known else "nobody"
    return f"{owner}({connection.decode()})"


def _shown(packet: Packet) -> str:
    message = packet.message
    if isinstance(message, _NOISE):
        return ""
    return type(message).__name__ + _details(message)


def _shown_fields(thing: Any) -> str:
    """The packet, request or endpoint that an event or an action is about."""
    if isinstance(packet := getattr(thing, "packet", None), Packet):
        return f" {_shown(packet)}"
    about = [getattr(thing, name, None) for name in ("id", "endpoint", "code", "text", "reason")]
    return "".join(f" {value}" for value in about if value)


def _details(message: Any) -> str:
    """A message's fields, without those that say the same in every message of a schedule."""
    names = ("id", "ids", "held", "incarnation", "mapping_id", "code", "text")
    shown = []
    for name in names:
        value = getattr(message, name, None)
        if isinstance(value, tuple):
            value = " ".join(map(str, value))
        if value not in (None, ""):
            shown.append(f" {name}={value}" if name in ("held", "incarnation") else f" {value}")
    return "".join(shown)
