"""Planted bugs: each believes something of rude peers, and schedules with bad manners find it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from broker.core import BrokerCore
from broker.core.timers import Timers
from broker.core.workers import Workers
from broker.protocol import Packet
from broker.protocol import messages as m
from broker.protocol.wire import encode
from tests.sim import rude
from tests.sim.planting import instead

Plant = Callable[[], AbstractContextManager[None]]


def two_names_on_one_connection() -> AbstractContextManager[None]:
    return instead(BrokerCore, "_leave_other_name", lambda _: lambda self, event, name, now: None)


def values_without_bounds() -> AbstractContextManager[None]:
    """What comes is what was meant, however long its names are and whatever its numbers."""

    def other(real: Any) -> Any:
        def unchecked(message: m.Message, payload: list[bytes]) -> Packet:
            frames = (encode(m.Draining()).frames[0], *payload)
            return Packet(message, frames, (0,) * len(payload), sum(map(len, frames)))

        return unchecked

    return instead(rude, "on_the_wire", other)


def every_held_request_is_one_that_was_given() -> AbstractContextManager[None]:
    return instead(Workers, "_had", lambda _: lambda self, before, hello: set(hello.held))


def timers_stay_until_they_are_due() -> AbstractContextManager[None]:
    return instead(Timers, "cancel", lambda _: lambda self, timer: None)


RUDE_MUTATIONS: dict[str, Plant] = {
    plant.__name__: plant
    for plant in (
        two_names_on_one_connection,
        values_without_bounds,
        every_held_request_is_one_that_was_given,
        timers_stay_until_they_are_due,
    )
}
