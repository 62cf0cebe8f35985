"""Messages to frames and back. ``PROTOCOL.md`` specifies every byte.

Frame 0 is the header: a fixed prelude, the table of payload frames (length and checksum of each),
the body (one message, msgpack) and a checksum of all of that. The payload frames behind it are the
bytes of the tensors that the body's manifest lists. Checksums are XXH3-64: they find damage, they
do not authenticate.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgpack
import xxhash

from broker.protocol import messages
from broker.protocol.errors import LocalProtocolError, RemoteProtocolError, VersionMismatchError
from broker.protocol.limits import MAX_ITEMS, MAX_STRING_BYTES, Limits
from broker.protocol.messages import DTYPE_BYTES, Message, TensorSpec
from broker.protocol.schema import Codec, SchemaError, codec

MAGIC = b"DRMQ"
VERSION = 3

#: magic, version, kind, reserved (0), payload frames, body bytes, payload bytes
_PRELUDE = struct.Struct("<4sBBHIIQ")
#: length and XXH3-64 of one payload frame
_ENTRY = struct.Struct("<IQ")
_CHECKSUM = struct.Struct("<Q")

#: bytes, memoryview or zmq.Frame: anything with the buffer protocol, never copied here
Buffer = Any

KINDS: dict[int, type] = {cls.KIND: cls for cls in messages.Message.__args__}  # type: ignore[attr-defined]
_MAX_RANK = 8
#: Of one tensor, an empty one counted without its zeros: torch multiplies strides.
_MAX_ELEMENTS = 1 << 40


@dataclass(frozen=True, slots=True)
class Packet:
    """A message with its frames, as they came or as they will go; the payload is not opened."""

    message: Message
    frames: tuple[Buffer, ...]
    checksums: tuple[int, ...]
    #: bytes of all frames
    nbytes: int

    @property
    def payload(self) -> tuple[Buffer, ...]:
        """The frames behind the header."""
        return self.frames[1:]

    def sound_frames(self) -> Iterator[Buffer]:
        """The payload frames, each after its checksum was compared; the broker compares none.

        Raises :class:`RemoteProtocolError` for a damaged frame.
        """
        for number, (frame, expected) in enumerate(zip(self.payload, self.checksums, strict=True)):
            if xxhash.xxh3_64_intdigest(frame) != expected:
                raise RemoteProtocolError(
                    f"payload frame {number} of {type(self.message).__name__} is damaged: its "
                    f"checksum is not the {expected:#018x} that the header says"
                )
            yield frame

    def verify(self) -> None:
        """Raises :class:`RemoteProtocolError` if a payload frame is damaged."""
        for _ in self.sound_frames():
            pass

    def __repr__(self) -> str:
        return f"<Packet {self.message!r} frames={len(self.frames)}>"


def payload_hash(packet: Packet) -> int:
    """One number for all payload bytes: what a reply names as ``tokens_hash``."""
    return xxhash.xxh3_64_intdigest(b"".join(_CHECKSUM.pack(value) for value in packet.checksums))


def mapping_id(vocab_size: int, selected_token_ids: Sequence[Buffer]) -> str:
    """Name of a vocab mapping: a hash of the vocabulary's size and the ids (int64, little endian).

    Being the hash of the content, it can be checked by whoever passes the content on, so that
    nobody can slip another mapping under a name that others use.
    """
    digest = hashlib.blake2b(struct.pack("<Q", vocab_size), digest_size=16)
    for frame in selected_token_ids:
        digest.update(frame)
    return "m" + digest.hexdigest()


def encode(
    message: Message, payload: Sequence[Buffer] = (), limits: Limits | None = None
) -> Packet:
    """Make the frames of ``message``; the payload buffers are hashed and passed on as they are.

    Raises :class:`LocalProtocolError` for what no peer would accept: a value of the wrong type, a
    manifest that is not the payload, anything over the ``limits``.
    """
    limits = limits or Limits()
    try:
        body = msgpack.packb(_codec(message).to_plain(message), use_bin_type=True)
        lengths = [_length(frame) for frame in payload]
        _check_sizes(lengths, limits)
        _check_manifest(message, lengths)
        checksums = tuple(xxhash.xxh3_64_intdigest(frame) for frame in payload)
        table = b"".join(map(_ENTRY.pack, lengths, checksums))
        prelude = _PRELUDE.pack(
            MAGIC, VERSION, type(message).KIND, 0, len(lengths), len(body), sum(lengths)
        )
        header = prelude + table + body
        header += _CHECKSUM.pack(xxhash.xxh3_64_intdigest(header))
        if len(header) > limits.max_header_bytes:
            raise SchemaError(
                f"the header has {len(header)} bytes, the limit is {limits.max_header_bytes}"
            )
        _check_total(message, sum(lengths), limits)
    except SchemaError as error:
        raise LocalProtocolError(f"cannot send {type(message).__name__}: {error}") from None
    return Packet(message, (header, *payload), checksums, len(header) + sum(lengths))


def decode(frames: Sequence[Buffer], limits: Limits | None = None) -> Packet:
    """Read a message from its frames, without opening the payload.

    Raises :class:`RemoteProtocolError`, and nothing else, whatever the bytes are.
    """
    limits = limits or Limits()
    try:
        return _decode(frames, limits)
    except SchemaError as error:
        raise RemoteProtocolError(f"not a message: {error}") from None


def _decode(frames: Sequence[Buffer], limits: Limits) -> Packet:
    if not frames:
        raise SchemaError("no frames at all")
    if _length(frames[0]) > limits.max_header_bytes:
        raise SchemaError(
            f"the header has {_length(frames[0])} bytes, the limit is {limits.max_header_bytes}"
        )
    header = bytes(frames[0])
    if len(header) < _PRELUDE.size + _CHECKSUM.size:
        raise SchemaError(
            f"the header has {len(header)} bytes, the shortest has {_PRELUDE.size + _CHECKSUM.size}"
        )
    magic, version, kind, reserved, count, body_bytes, payload_bytes = _PRELUDE.unpack_from(header)
    if magic != MAGIC:
        raise SchemaError(f"it begins with {magic!r}, not {MAGIC!r}")
    (checksum,) = _CHECKSUM.unpack_from(header, len(header) - _CHECKSUM.size)
    if xxhash.xxh3_64_intdigest(memoryview(header)[: -_CHECKSUM.size]) != checksum:
        raise SchemaError("the header's checksum is wrong")
    if version != VERSION:
        raise VersionMismatchError(
            f"the peer speaks version {version}, this side speaks version {VERSION}; "
            "run the same draftmq release on both"
        )
    expected = _PRELUDE.size + count * _ENTRY.size + body_bytes + _CHECKSUM.size
    if len(header) != expected:
        raise SchemaError(f"the header has {len(header)} bytes and says that it has {expected}")
    if reserved != 0:
        raise SchemaError(f"reserved bits are set: {reserved:#06x}")
    if kind not in KINDS:
        raise SchemaError(f"unknown kind {kind}")
    if count != len(frames) - 1:
        raise SchemaError(f"{len(frames) - 1} payload frames came, the header says {count}")
    table_end = _PRELUDE.size + count * _ENTRY.size
    entries = list(_ENTRY.iter_unpack(memoryview(header)[_PRELUDE.size : table_end]))
    lengths = [_length(frame) for frame in frames[1:]]
    if [length for length, _ in entries] != lengths:
        raise SchemaError("the payload frames do not have the lengths that the header says")
    if sum(lengths) != payload_bytes:
        raise SchemaError(f"{sum(lengths)} payload bytes came, the header says {payload_bytes}")
    _check_sizes(lengths, limits)
    message = codec(KINDS[kind]).from_plain(_unpack(header[table_end : -_CHECKSUM.size]))
    _check_manifest(message, lengths)
    _check_total(message, payload_bytes, limits)
    checksums = tuple(checksum for _, checksum in entries)
    return Packet(message, tuple(frames), checksums, len(header) + payload_bytes)


def _codec(message: Message) -> Codec:
    if type(message) not in KINDS.values():
        raise SchemaError("it is not a message")
    return codec(cast(type, type(message)))


def _unpack(body: bytes) -> Any:
    try:
        return msgpack.unpackb(
            body,
            raw=False,
            use_list=True,
            max_str_len=MAX_STRING_BYTES,
            max_bin_len=0,
            max_array_len=MAX_ITEMS,
            max_map_len=0,
            max_ext_len=0,
        )
    except Exception as error:  # msgpack raises ValueError, its own kinds, and what it lets through
        raise SchemaError(f"the body is not msgpack within the limits: {error}") from None


def _check_sizes(lengths: Sequence[int], limits: Limits) -> None:
    if len(lengths) > limits.max_frames:
        raise SchemaError(f"{len(lengths)} payload frames, the limit is {limits.max_frames}")
    for number, length in enumerate(lengths):
        if not 0 < length <= limits.max_frame_bytes:
            raise SchemaError(
                f"payload frame {number} has {length} bytes, allowed are 1 to "
                f"{limits.max_frame_bytes}"
            )


def _check_total(message: Message, nbytes: int, limits: Limits) -> None:
    limit = limits.max_request_bytes
    if isinstance(message, messages.Reply):
        limit = limits.max_reply_bytes
        nbytes = message.tensor_bytes  # also what comes directly
    if nbytes > limit:
        raise SchemaError(f"the payload has {nbytes} bytes, the limit is {limit}")


def _check_manifest(message: Message, lengths: Sequence[int]) -> None:
    """The manifest must account for every payload frame and every byte, tensor by tensor.

    The tensors of a direct transfer have no frames, those of a reply in parts have them later, and
    a part's are accounted for where the manifest is.
    """
    manifest: tuple[TensorSpec, ...] = getattr(message, "manifest", ())
    _check_tensors(manifest)
    if isinstance(message, messages.Part):
        if not lengths or message.number < 0:
            raise SchemaError(f"part {message.number} has {len(lengths)} payload frames")
    elif isinstance(message, messages.Reply) and (message.parts or message.transfer):
        _check_elsewhere(message, lengths)
    else:
        _account(manifest, lengths)


def _check_tensors(manifest: Sequence[TensorSpec]) -> None:
    names = set()
    for spec in manifest:
        if spec.dtype not in DTYPE_BYTES:
            raise SchemaError(
                f"tensor {spec.name!r} has dtype {spec.dtype!r}, known are {', '.join(DTYPE_BYTES)}"
            )
        if len(spec.shape) > _MAX_RANK or any(not 0 <= size < 1 << 48 for size in spec.shape):
            raise SchemaError(f"tensor {spec.name!r} has the impossible shape {spec.shape}")
        if math.prod(max(1, size) for size in spec.shape) > _MAX_ELEMENTS:  # also where one is 0
            raise SchemaError(f"tensor {spec.name!r} has the impossible shape {spec.shape}")
        if spec.name in names:
            raise SchemaError(f"two tensors are called {spec.name!r}")
        names.add(spec.name)


def _check_elsewhere(reply: messages.Reply, lengths: Sequence[int]) -> None:
    """Of a reply whose tensors are not its payload."""
    if lengths:
        raise SchemaError(f"{len(lengths)} payload frames, the tensors are said to come elsewhere")
    frames = sum(spec.frames for spec in reply.manifest)
    if reply.transfer is not None:
        if frames or reply.parts:
            raise SchemaError(f"its tensors come directly, and have {frames} frames as well")
        return
    for spec in reply.manifest:
        if not (0 < spec.frames <= spec.nbytes or spec.frames == spec.nbytes == 0):
            raise SchemaError(
                f"tensor {spec.name!r} of {spec.nbytes} bytes cannot have {spec.frames} frames"
            )
    if not 0 < reply.parts <= frames:
        raise SchemaError(f"{frames} frames cannot come in {reply.parts} parts")


def _account(manifest: Sequence[TensorSpec], lengths: Sequence[int]) -> None:
    at = 0
    for spec in manifest:
        if not 0 <= spec.frames <= len(lengths) - at:
            raise SchemaError(
                f"tensor {spec.name!r} claims {spec.frames} frames, {len(lengths) - at} are left"
            )
        nbytes = sum(lengths[at : at + spec.frames])
        if nbytes != spec.nbytes:
            raise SchemaError(
                f"tensor {spec.name!r} ({spec.dtype}, {spec.shape}) takes {spec.nbytes} bytes, "
                f"its frames have {nbytes}"
            )
        at += spec.frames
    if at != len(lengths):
        raise SchemaError(f"{len(lengths)} payload frames, the manifest accounts for {at}")


def _length(frame: Buffer) -> int:
    return len(frame) if isinstance(frame, bytes) else memoryview(frame).nbytes
