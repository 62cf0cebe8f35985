"""What a worker holds: a request from its arrival until its answer is on its way."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from broker.protocol import Packet
from broker.protocol import messages as m


class Stage(enum.Enum):
    """How far a request is; it only ever goes forward."""

    WAITING = "waiting"
    COMPUTING = "computing"
    #: the target is done; the answer is copied to the CPU, hashed and encoded
    STAGED = "staged"
    #: a broker that waits for the answer cannot be reached
    ANSWERED = "answered"


@dataclass(eq=False)
class Held:
    """One request."""

    #: the brokers that wait for the answer; several when the client failed over meanwhile
    endpoints: list[str]
    packet: Packet
    received_at: float
    #: when its client no longer wants it, counted from the last time that it was asked for
    expires_at: float
    stage: Stage = Stage.WAITING
    #: number of the forward that computes it; those that run together have the same
    forward: int = 0
    cancelled: bool = False
    #: its messages; there exactly in the last stage
    answer: tuple[Packet, ...] = ()

    @property
    def request(self) -> m.Request:
        return cast(m.Request, self.packet.message)


def together(waiting: Iterable[Held], max_tokens: int) -> list[Held]:
    """The first of those that wait, and those right behind it that can run in the same forward.

    They want the same of the target, and padded to the longest they have at most ``max_tokens``
    (B*T) together. Nobody is overtaken: the first that does not fit ends the batch. Only what the
    manifest says is looked at.
    """
    chosen: list[Held] = []
    rows = longest = 0
    for held in waiting:
        shape = _shape(held.request)
        if chosen:
            if shape is None or _kind(held.request) != _kind(chosen[0].request):
                break
            if (rows + shape[0]) * max(longest, shape[1]) > max_tokens:
                break
        chosen.append(held)
        if shape is None:
            break
        rows, longest = rows + shape[0], max(longest, shape[1])
    return chosen


def _shape(request: m.Request) -> tuple[int, int] | None:
    """[B, T] of a request whose tensors are of one such shape; None for all that go alone."""
    shapes = {spec.shape for spec in request.manifest}
    if request.operation != "generate" or len(shapes) != 1:
        return None
    (shape,) = shapes
    return (shape[0], shape[1]) if len(shape) == 2 else None


def _kind(request: m.Request) -> tuple[object, ...]:
    tensors = tuple((spec.name, spec.dtype) for spec in request.manifest)
    wish = request.encoding.partition(";rows=")[0]  # what is sent of a forward is not its kind
    return (request.operation, request.model, request.mapping_id, wish, tensors)
