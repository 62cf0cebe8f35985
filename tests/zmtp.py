"""ZMTP by hand: what a peer that is none of ours can put on a connection."""

from __future__ import annotations

import socket
import struct
from urllib.parse import urlsplit


def connect(endpoint: str) -> socket.socket:
    where = urlsplit(endpoint)
    return socket.create_connection((where.hostname, where.port), timeout=20)


def greeting(mechanism: bytes = b"NULL") -> bytes:
    return b"\xff" + bytes(8) + b"\x7f\x03\x00" + mechanism.ljust(20, b"\0") + bytes(32)


def null_handshake(sock: socket.socket) -> None:
    """The whole of ZMTP's handshake as a DEALER without keys."""
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    sock.sendall(greeting() + b"\x04" + bytes([len(ready)]) + ready)
    if _read(sock, 64)[12:17] != b"CURVE":
        _read(sock, _read(sock, 2)[1])


def frame(body: bytes, *, more: bool = False) -> bytes:
    return bytes([2 | more]) + struct.pack(">Q", len(body)) + body


def read_message(sock: socket.socket) -> list[bytes]:
    """All frames of the next message."""
    frames, more = [], True
    while more:
        flags = _read(sock, 1)[0]
        more = bool(flags & 1)
        (length,) = struct.unpack(">Q", _read(sock, 8)) if flags & 2 else _read(sock, 1)
        frames.append(_read(sock, length))
    return frames


def _read(sock: socket.socket, nbytes: int) -> bytes:
    octets = b""
    while len(octets) < nbytes:
        more = sock.recv(nbytes - len(octets))
        if not more:
            raise ConnectionError("the other side closed the connection")
        octets += more
    return octets
