"""The client's core: unfinished requests, and where each of them stands. No sockets, no clock."""

from broker.log_line import Log
from trainer_client.core.config import ClientConfig
from trainer_client.core.events import (
    Action,
    CancelRequest,
    Deliver,
    Event,
    Fail,
    JoinChannel,
    KeepMapping,
    Received,
    ReceiveDirectly,
    Submit,
)
from trainer_client.core.ledger import COUNTERS
from trainer_client.core.machine import ClientCore

__all__ = [
    "COUNTERS",
    "Action",
    "CancelRequest",
    "ClientConfig",
    "ClientCore",
    "Deliver",
    "Event",
    "Fail",
    "JoinChannel",
    "KeepMapping",
    "Log",
    "ReceiveDirectly",
    "Received",
    "Submit",
]
