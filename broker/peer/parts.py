"""Large replies in parts, and the tensors of any message put together as its frames come.

libzmq hands a message over when the last of its frames is here. A reply of many MiB in one message
would be on one connection at a time: first the worker's, then the client's. So it is several
messages, which the broker passes on one by one, while they are in its cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from broker.peer.memory import POOL
from broker.protocol import messages as m
from broker.protocol.errors import RemoteProtocolError
from broker.protocol.limits import MIB, Limits
from broker.protocol.wire import Buffer, Packet, encode

#: Payload of one part. Less costs the broker more for each byte, more brings nothing
#: (docs/decisions/0012-replies-in-parts.md). A reply with no more payload is one message.
PART_BYTES = 4 * MIB


def in_parts(
    reply: m.Reply,
    payload: Sequence[Buffer],
    limits: Limits | None = None,
    nbytes: int = PART_BYTES,
) -> tuple[Packet, ...]:
    """The messages of a reply: itself, and where the payload has more than ``nbytes`` its parts.

    Raises :class:`LocalProtocolError` for what :func:`encode` refuses.
    """
    if sum(map(_length, payload)) <= nbytes:
        return (encode(reply, payload, limits),)
    groups = list(_grouped(payload, nbytes))
    first = encode(replace(reply, parts=len(groups)), (), limits)
    parts = [encode(m.Part(reply.id, at), group, limits) for at, group in enumerate(groups)]
    return (first, *parts)


def _grouped(payload: Sequence[Buffer], nbytes: int) -> Iterator[list[Buffer]]:
    group: list[Buffer] = []
    room = nbytes
    for frame in payload:
        if group and _length(frame) > room:
            yield group
            group, room = [], nbytes
        group.append(frame)
        room -= _length(frame)
    yield group


def _length(frame: Buffer) -> int:
    return memoryview(frame).nbytes


class Assembly:
    """The tensors of a manifest, each uint8 [nbytes] in memory of its own, filled frame by frame.

    A frame is compared with its checksum and copied at once, while it is in a cache.
    """

    def __init__(self, manifest: Sequence[m.TensorSpec]) -> None:
        self.octets: list[NDArray[np.uint8]] = [POOL.take(spec.nbytes) for spec in manifest]
        #: what is left to be filled, in order: the rest of a tensor, and in how many frames
        self._left = [
            (octets, spec.frames)
            for octets, spec in zip(self.octets, manifest, strict=True)
            if spec.frames
        ]
        self._left.reverse()

    def add(self, packet: Packet) -> None:
        """Take the next payload frames.

        Raises :class:`RemoteProtocolError` for a damaged frame, and for one that is not the next
        of the manifest.
        """
        for frame in packet.sound_frames():
            part = np.frombuffer(frame, dtype=np.uint8)
            octets, frames = self._left.pop() if self._left else (part[:0], 0)
            if part.size > octets.size or (frames == 1 and part.size < octets.size):
                raise RemoteProtocolError(
                    f"a frame has {part.size} bytes where its tensor has {octets.size} left, in "
                    f"{frames} frames"
                )
            octets[: part.size] = part
            if frames > 1:
                self._left.append((octets[part.size :], frames - 1))

    @property
    def complete(self) -> bool:
        """Whether every byte is here."""
        return not self._left
