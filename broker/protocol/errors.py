"""The two ways a protocol goes wrong: our mistake, or the peer's (after h11)."""

from __future__ import annotations


class DraftmqError(Exception):
    """Root of every package's errors: the text is one sentence that says what to do."""


class ProtocolError(DraftmqError):
    """Root of everything that can be wrong with a message."""


class LocalProtocolError(ProtocolError):
    """This side tried to send what the protocol does not allow; nothing was sent."""


class RemoteProtocolError(ProtocolError):
    """The peer sent bytes that are not a message: damaged, cut, oversized or another version.

    A peer's bytes can raise nothing else.
    """


class VersionMismatchError(RemoteProtocolError):
    """The peer speaks another version of the protocol; trying again does not help."""
