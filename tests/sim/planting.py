"""How a bug is planted: by changing what goes into a core, or what comes out of it.

That outlives changes inside the core. What replaces a method fails at once when that is gone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from broker.core import Received, Send
from broker.peer.link import Arrived, SendTo
from broker.protocol import decode

Plant = Callable[[], AbstractContextManager[None]]
MUTATIONS: dict[str, Plant] = {}


def mutation(plant: Callable[[], Iterator[None]]) -> Callable[[], Iterator[None]]:
    """Register a planted bug under its name."""
    MUTATIONS[plant.__name__] = contextlib.contextmanager(plant)
    return plant


@contextlib.contextmanager
def instead(owner: Any, name: str, other: Callable[[Any], Any]) -> Iterator[None]:
    """Replace an attribute by what ``other`` makes of it. Raises where there is none."""
    real = getattr(owner, name)
    setattr(owner, name, other(real))
    try:
        yield
    finally:
        setattr(owner, name, real)


def hearing(core: type, change: Callable[[Any, Any], Any]) -> AbstractContextManager[None]:
    """A core that is told ``change(core, event)`` instead; None is an event it ignores."""

    def other(handle: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, event: Any, now: float) -> Any:
            event = change(self, event)
            return handle(self, event, now) if event is not None else []

        return changed

    return instead(core, "handle", other)


def saying(core: type, change: Callable[[Any, Any], list[Any]]) -> AbstractContextManager[None]:
    """A core whose every action becomes those of ``change(core, action)``."""

    def other(handle: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, event: Any, now: float) -> Any:
            return [new for old in handle(self, event, now) for new in change(self, old)]

        return changed

    return instead(core, "handle", other)


def heard(event: Any, *kinds: type) -> Any:
    """The message that an event brings, if it is one of these kinds."""
    if not isinstance(event, (Received, Arrived)):
        return None
    return event.packet.message if isinstance(event.packet.message, kinds) else None


def said(action: Any, *kinds: type) -> Any:
    """The message that an action sends, if it is one of these kinds."""
    if isinstance(action, SendTo):
        message: Any = action.packet.message
    elif isinstance(action, Send):
        message = decode(action.frames).message
    else:
        return None
    return message if isinstance(message, kinds) else None


def with_message(event: Any, **changes: Any) -> Any:
    """The event with another message in it."""
    message = replace(event.packet.message, **changes)
    packet = replace(event.packet, message=message)
    return replace(event, packet=packet)
