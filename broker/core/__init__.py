"""The broker's core: who is there, who waits, who works on what. No sockets, no clock."""

from broker.core.config import BrokerConfig
from broker.core.events import (
    Action,
    BadBytes,
    ConnectionLost,
    Event,
    Moving,
    Received,
    Send,
    Side,
    Tick,
)
from broker.core.machine import BrokerCore
from broker.log_line import Log

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
