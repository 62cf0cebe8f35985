"""``python -m tests.hosts.names NAME=ADDRESS...``: a name server that knows these, on port 53.

Stopped by SIGSTOP it is a silent one: who asks is not even told that nobody listens.
"""

from __future__ import annotations

import socket
import struct
import sys

_A, _IN = 1, 1
_ANSWER, _NO_SUCH_NAME = 0x8180, 3
_POINTER_TO_QUESTION = 0xC00C


def answer(question: bytes, known: dict[str, str]) -> bytes:
    """The reply to one question: the address, none of that type, or no such name."""
    name, at = _name(question, 12)
    kind, _ = struct.unpack_from(">HH", question, at)
    asked = question[12 : at + 4]
    address = known.get(name) if kind == _A else None
    flags = _ANSWER | (0 if name in known else _NO_SUCH_NAME)
    header = question[:2] + struct.pack(">HHHHH", flags, 1, 1 if address else 0, 0, 0)
    if address is None:
        return header + asked
    record = struct.pack(">HHHIH", _POINTER_TO_QUESTION, _A, _IN, 0, 4)
    return header + asked + record + socket.inet_aton(address)


def _name(octets: bytes, at: int) -> tuple[str, int]:
    labels = []
    while (length := octets[at]) != 0:
        labels.append(octets[at + 1 : at + 1 + length].decode())
        at += 1 + length
    return ".".join(labels).lower(), at + 1


def main(*known: str) -> None:
    """Until it is killed."""
    pairs = dict(pair.split("=") for pair in known)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("0.0.0.0", 53))
        while True:
            question, sender = server.recvfrom(512)
            server.sendto(answer(question, pairs), sender)


if __name__ == "__main__":
    main(*sys.argv[1:])
