"""Two ends in one process, in a thread each."""

from __future__ import annotations

import concurrent.futures
import contextlib
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from broker.protocol.messages import Invitation
from worker.direct.backend import Backend
from worker.direct.channel import ChannelConfig
from worker.direct.rendezvous import End, Rendezvous, join

PATIENCE = ChannelConfig(limit_s=1.0, connect_s=5.0)


def both(one: Callable[[], Any], other: Callable[[], Any]) -> tuple[Any, Any]:
    """Run both at once; raises what the first of them raised."""
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(one), pool.submit(other)]
        return futures[0].result(30), futures[1].result(30)


def invitation(rendezvous: Rendezvous, backend: str = "gloo", **changes: Any) -> Invitation:
    fields = {
        "channel": "w/c",
        "epoch": 1,
        "nonce": secrets.token_hex(16),
        "backend": backend,
        "host": rendezvous.address,
        "port": rendezvous.port,
    }
    return Invitation(**{**fields, **changes})


@contextlib.contextmanager
def pair(
    backend: str = "gloo", device: str = "cpu", patience: ChannelConfig = PATIENCE
) -> Iterator[tuple[Backend, Backend]]:
    """``(worker's, client's)`` ends of one epoch."""
    rendezvous = Rendezvous("127.0.0.1", (0, 0))
    end, leaving = End("127.0.0.1", torch.device(device), patience), threading.Event()
    invited = invitation(rendezvous, backend)
    ends: tuple[Backend, ...] = ()
    try:
        ends = both(
            lambda: rendezvous.meet(invited, end, leaving), lambda: join(invited, end, leaving)
        )
        yield ends
    finally:
        for each in ends:
            each.interrupt()
            each.close()
        rendezvous.close()
