"""The language that trainers, broker and workers speak. ``PROTOCOL.md`` specifies the bytes."""

from broker.protocol.errors import (
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
    VersionMismatchError,
)
from broker.protocol.limits import Limits
from broker.protocol.wire import Packet, decode, encode, mapping_id, payload_hash

__all__ = [
    "Limits",
    "LocalProtocolError",
    "Packet",
    "ProtocolError",
    "RemoteProtocolError",
    "VersionMismatchError",
    "decode",
    "encode",
    "mapping_id",
    "payload_hash",
]
