"""What can keep a broker from running."""

from __future__ import annotations

from broker.protocol.errors import DraftmqError


class BrokerError(DraftmqError):
    """Root of the broker's errors; the text says what to do."""
