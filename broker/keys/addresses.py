"""Which addresses only this machine can reach."""

from __future__ import annotations

from urllib.parse import urlsplit

from broker.errors import BrokerError


def is_local(address: str) -> bool:
    """Whether no other machine reaches it: ``ipc://``, ``inproc://`` or loopback.

    Raises :class:`BrokerError` for what is no address.
    """
    if address.startswith(("ipc://", "inproc://")):
        return True
    try:
        host = urlsplit(address).hostname or ""
    except ValueError as error:
        raise BrokerError(f"{address!r} is no address: {error}; write tcp://HOST:PORT") from None
    return host in ("127.0.0.1", "::1", "localhost")
