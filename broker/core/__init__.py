"""The broker's core: who is there, who waits, who works on what. No sockets, no clock."""

from broker.core.config import BrokerConfig
from broker.core.events import (
    Action,
    BadBytes,
    ConnectionLost,
    Event,
    Log,
    Moving,
    Received,
    Send,
    Side,
    Tick,
)
from broker.core.machine import BrokerCore

__all__ = [
    "Action",
    "BadBytes",
    "BrokerConfig",
    "BrokerCore",
    "ConnectionLost",
    "Event",
    "Log",
    "Moving",
    "Received",
    "Send",
    "Side",
    "Tick",
]
