"""Where the two ends of a channel meet: the worker listens, the client brings the secret nonce.

A process group's constructor waits up to five times its timeout for a peer that has gone away, so
neither end begins to construct before both are known to be there.
"""

from __future__ import annotations

import contextlib
import errno
import math
import secrets
import select
import socket
import threading
import time
from dataclasses import dataclass, field

import torch

from broker.protocol.messages import BACKENDS, Invitation
from worker.direct.backend import CLIENT, WORKER, Backend, TransferError, plain
from worker.direct.channel import ChannelConfig
from worker.direct.pair import PairStore

#: 128 bits, in hexadecimal.
_NONCE_BYTES = 32
#: A connection that nobody met is closed after so long, and beyond so many the oldest goes.
_CALLER_S, _MAX_CALLERS = 5.0, 64
_SLICE_S = 0.05
#: Characters of what one end says of its failure to the other.
_MAX_WHY = 500


@dataclass(frozen=True)
class End:
    """What one end brings to a channel: its own interface, where its tensors are, its patience."""

    address: str
    device: torch.device
    patience: ChannelConfig


@dataclass(eq=False)
class _Caller:
    """A connection that has not met anybody yet."""

    connection: socket.socket
    since: float
    nonce: bytearray = field(default_factory=bytearray)

    @property
    def said_all(self) -> bool:
        return len(self.nonce) == _NONCE_BYTES


class Rendezvous:
    """A worker's listening port, one for all of its channels, on one interface.

    Raises :class:`TransferError` when no port can be bound.
    """

    def __init__(self, address: str, ports: tuple[int, int]) -> None:
        self._listener = _listen(address, ports)
        self.address = address
        self.port: int = self._listener.getsockname()[1]
        #: in the order in which they came
        self._callers: list[_Caller] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="draftmq-rendezvous", daemon=True)
        self._thread.start()

    def meet(self, invitation: Invitation, end: End, leaving: threading.Event) -> Backend:
        """Wait for the invited client and build the backend.

        Raises :class:`TransferError` when it does not come in time, or ``leaving`` is set.
        """
        limit_s = end.patience.connect_s
        deadline = time.monotonic() + limit_s
        with self._changed:
            while (caller := self._called(invitation.nonce.encode())) is None:
                if leaving.is_set() or self._closing:
                    raise TransferError("this end leaves")
                if time.monotonic() >= deadline:
                    raise TransferError(f"the client did not come within {limit_s:g} s")
                self._changed.wait(_SLICE_S)
            self._callers.remove(caller)
        return _build(caller.connection, WORKER, invitation, end, leaving)

    def close(self) -> None:
        """Stop listening."""
        self._closing = True
        self._thread.join()
        self._listener.close()
        for caller in self._callers:
            caller.connection.close()

    def _called(self, nonce: bytes) -> _Caller | None:
        for caller in self._callers:
            if secrets.compare_digest(bytes(caller.nonce), nonce):
                return caller
        return None

    def _run(self) -> None:
        while not self._closing:
            with self._changed:
                speaking = {c.connection: c for c in self._callers if not c.said_all}
            for ready in select.select([self._listener, *speaking], [], [], _SLICE_S)[0]:
                if ready is self._listener:
                    self._accept()
                else:
                    self._hear(speaking[ready])
            self._show_out(time.monotonic())

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:  # it has gone already, or this process has no descriptors left
            time.sleep(_SLICE_S)
            return
        connection.setblocking(False)
        with self._changed:
            self._callers.append(_Caller(connection, time.monotonic()))

    def _hear(self, caller: _Caller) -> None:
        try:
            octets = caller.connection.recv(_NONCE_BYTES - len(caller.nonce))
        except OSError:
            octets = b""
        caller.nonce += octets
        if not octets:
            caller.since = -math.inf
        with self._changed:
            self._changed.notify_all()

    def _show_out(self, now: float) -> None:
        """Close connections that nobody met in time, and the oldest where they are too many."""
        with self._changed:
            crowd = len(self._callers) - _MAX_CALLERS
            for number, caller in enumerate(list(self._callers)):
                if number < crowd or now - caller.since > _CALLER_S:
                    self._callers.remove(caller)
                    caller.connection.close()


def join(invitation: Invitation, end: End, leaving: threading.Event) -> Backend:
    """Go to the worker that invites, and build the backend.

    Raises :class:`TransferError` when it is not there in time, or ``leaving`` is set.
    """
    connection = _connect(invitation, end.patience.connect_s, leaving)
    connection.sendall(invitation.nonce.encode())
    return _build(connection, CLIENT, invitation, end, leaving)


def _build(
    connection: socket.socket,
    rank: int,
    invitation: Invitation,
    end: End,
    leaving: threading.Event,
) -> Backend:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.setblocking(True)
    store = PairStore(connection, end.patience.connect_s, leaving)
    holding: PairStore | Backend = store
    try:
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{1 - rank}"])
        holding = backend = _make(invitation.backend, store, rank, end)
        store.set(f"joined/{rank}", "1")
        store.wait([f"joined/{1 - rank}"])
    except Exception as error:
        theirs = store.told(f"failed/{1 - rank}")
        why = f"the other end: {theirs}" if theirs else plain(error)
        with contextlib.suppress(TransferError):  # it may have gone
            store.set(f"failed/{rank}", plain(error)[:_MAX_WHY])
        holding.close()
        raise TransferError(why) from error
    return backend


def _make(name: str, store: PairStore, rank: int, end: End) -> Backend:
    """Backends are imported when they are wanted: not every build of torch has all of them."""
    if name == "gloo":
        from worker.direct.gloo import GlooBackend

        return GlooBackend(store, rank, end.address, end.patience.limit_s)
    if name == "shm":
        from worker.direct.shm import ShmBackend

        return ShmBackend(store, rank)
    if name == "nccl":
        from worker.direct.nccl import NcclBackend

        return NcclBackend(store, rank, end.device, end.patience.limit_s)
    if name == "ipc":
        from worker.direct.ipc import IpcBackend

        return IpcBackend(store, rank, end.device)
    raise TransferError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")


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


def _connect(invitation: Invitation, limit_s: float, leaving: threading.Event) -> socket.socket:
    """A connection to the worker; ``leaving`` ends the attempt, which a plain connect would not."""
    where = f"{invitation.host}:{invitation.port}"
    deadline = time.monotonic() + limit_s
    try:
        found = socket.getaddrinfo(invitation.host, invitation.port, type=socket.SOCK_STREAM)[0]
        connection = socket.socket(found[0])
    except OSError as error:
        raise TransferError(f"the worker's address {where} is not known here: {error}") from error
    connection.setblocking(False)
    problem = connection.connect_ex(found[4])
    while problem == errno.EINPROGRESS and time.monotonic() < deadline and not leaving.is_set():
        if select.select([], [connection], [], _SLICE_S)[1]:
            problem = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    if problem:
        connection.close()
        why = "no answer" if problem == errno.EINPROGRESS else errno.errorcode.get(problem, problem)
        raise TransferError(f"nobody can be reached at {where} ({why}); is the port open?")
    connection.setblocking(True)
    return connection
