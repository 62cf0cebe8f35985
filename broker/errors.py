"""What can keep a broker from running."""

from __future__ import annotations


class BrokerError(Exception):
    """Root of the broker's errors; the text says what to do."""
