"""Where the two ends of a channel meet: a store at the worker, and a handshake in it.

A process group's constructor waits up to five times its timeout for a peer that has gone away, so
neither end begins to construct before both have said, under this attempt's secret nonce, that they
are there.
"""

from __future__ import annotations

import socket
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch.distributed import PrefixStore, Store, TCPStore

from broker.protocol.channel import ChannelConfig
from broker.protocol.messages import BACKENDS, Invitation
from worker.direct.backend import WORKER, Backend, TransferError

_POLL_S = 0.01


class Rendezvous:
    """A worker's store: one port for all of its channels, on one interface."""

    def __init__(self, address: str, ports: tuple[int, int]) -> None:
        listener = _listen(address, ports)
        self.address = address
        self.port: int = listener.getsockname()[1]
        self._store = TCPStore(
            address,
            self.port,
            None,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=listener.detach(),  # torch alone would listen on every interface
        )

    def close(self) -> None:
        del self._store


def _listen(address: str, ports: tuple[int, int]) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    for port in range(ports[0], ports[1] + 1):
        listener = socket.socket(family)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((address, port))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            refusal = error
    raise TransferError(
        f"no port of {ports[0]}-{ports[1]} can be bound at {address}: {refusal.strerror}; "
        "choose --direct-address and --direct-ports that this host has free"
    )


@dataclass(frozen=True)
class End:
    """What one end brings to a channel: its rank, its own interface, where its tensors are."""

    rank: int
    address: str
    device: torch.device
    patience: ChannelConfig


def join(invitation: Invitation, end: End, leaving: threading.Event) -> Backend:
    """Meet the other end and build the backend.

    Raises :class:`TransferError` when it does not come in time, or ``leaving`` is set.
    """
    connect_s = end.patience.connect_s
    deadline = time.monotonic() + connect_s
    host, port = invitation.host, invitation.port
    try:
        store = TCPStore(host, port, timeout=timedelta(seconds=connect_s), wait_for_workers=False)
    except RuntimeError as error:
        raise TransferError(f"no rendezvous store answers at {host}:{port}") from error
    prefix = f"{invitation.channel}/{invitation.epoch}/{invitation.nonce}"
    pair = PrefixStore(prefix, store)
    try:
        _meet(pair, end.rank, deadline, leaving)
        backend = _make(invitation.backend, pair, end)
        pair.set(f"joined/{end.rank}", "1")
        _await(pair, f"joined/{1 - end.rank}", deadline + end.patience.limit_s, leaving)
    except RuntimeError as error:
        raise TransferError(str(error).strip().splitlines()[0]) from error
    if end.rank == WORKER:
        _forget(store, prefix)
    return backend


def _meet(pair: Store, rank: int, deadline: float, leaving: threading.Event) -> None:
    pair.set(f"ready/{rank}", "1")
    try:
        _await(pair, f"ready/{1 - rank}", deadline, leaving)
    except TransferError:
        pair.delete_key(f"ready/{rank}")  # so that a late peer does not construct alone
        raise


def _await(pair: Store, key: str, deadline: float, leaving: threading.Event) -> None:
    """Wait for a key; a blocking wait in the store could not be ended by ``leaving``."""
    began = time.monotonic()
    while not pair.check([key]):
        if leaving.wait(_POLL_S):
            raise TransferError("this end leaves")
        if time.monotonic() >= deadline:
            waited_s = time.monotonic() - began
            raise TransferError(f"the other end did not come within {waited_s:.1f} s")


def _forget(store: TCPStore, prefix: str) -> None:
    for key in store.list_keys():
        if key.startswith(prefix):
            store.delete_key(key)


def _make(name: str, pair: Store, end: End) -> Backend:
    """Backends are imported when they are wanted: not every build of torch has all of them."""
    if name == "gloo":
        from worker.direct.gloo import GlooBackend

        return GlooBackend(pair, end.rank, end.address, end.patience.limit_s)
    if name == "nccl":
        from worker.direct.nccl import NcclBackend

        return NcclBackend(pair, end.rank, end.device, end.patience.limit_s)
    if name == "ipc":
        from worker.direct.ipc import IpcBackend

        return IpcBackend(pair, end.rank, end.device)
    raise TransferError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")
