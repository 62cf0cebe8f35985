"""Where the two ends of a channel meet: the worker listens, the client brings the secret nonce.

A process group's constructor waits up to five times its timeout for a peer that has gone away, so
neither end begins to construct before both are known to be there.
"""

from __future__ import annotations

import errno
import select
import socket
import threading
import time
from dataclasses import dataclass

import torch

from broker.protocol.channel import ChannelConfig
from broker.protocol.messages import BACKENDS, Invitation
from worker.direct.backend import CLIENT, WORKER, Backend, TransferError, plain
from worker.direct.pair import PairStore

#: A stranger's connection is closed after so long, and beyond so many the oldest goes.
_STRANGER_S, _MAX_STRANGERS = 5.0, 64
_SLICE_S = 0.05


@dataclass(frozen=True)
class End:
    """What one end brings to a channel: its own interface, where its tensors are, its patience."""

    address: str
    device: torch.device
    patience: ChannelConfig


class Rendezvous:
    """A worker's listening port, one for all of its channels, on one interface.

    Raises :class:`TransferError` when no port can be bound.
    """

    def __init__(self, address: str, ports: tuple[int, int]) -> None:
        self._listener = _listen(address, ports)
        self.address = address
        self.port: int = self._listener.getsockname()[1]
        #: nonce -> the connection that brought it, once it has come
        self._expected: dict[bytes, socket.socket | None] = {}
        self._arrived = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="draftmq-rendezvous", daemon=True)
        self._thread.start()

    def meet(self, invitation: Invitation, end: End, leaving: threading.Event) -> Backend:
        """Wait for the invited client and build the backend.

        Raises :class:`TransferError` when it does not come in time, or ``leaving`` is set.
        """
        nonce = invitation.nonce.encode()
        limit_s = end.patience.connect_s
        deadline = time.monotonic() + limit_s
        with self._arrived:
            self._expected[nonce] = None
            try:
                while (connection := self._expected[nonce]) is None:
                    if leaving.is_set() or self._closing:
                        raise TransferError("this end leaves")
                    if time.monotonic() >= deadline:
                        raise TransferError(f"the client did not come within {limit_s:g} s")
                    self._arrived.wait(_SLICE_S)
            finally:
                del self._expected[nonce]
        return _build(connection, WORKER, invitation, end, leaving)

    def close(self) -> None:
        """Stop listening."""
        self._closing = True
        self._listener.close()
        self._thread.join()

    def _run(self) -> None:
        strangers: dict[socket.socket, tuple[float, bytearray]] = {}
        while not self._closing:
            try:
                readable = select.select([self._listener, *strangers], [], [], _SLICE_S)[0]
            except (OSError, ValueError):  # closed
                break
            for ready in readable:
                if ready is self._listener:
                    self._accept(strangers)
                else:
                    self._hear(ready, strangers)
            for stranger, (since, _) in list(strangers.items()):
                crowded = len(strangers) > _MAX_STRANGERS
                if crowded or time.monotonic() - since > _STRANGER_S:
                    strangers.pop(stranger)
                    stranger.close()
        for stranger in strangers:
            stranger.close()

    def _accept(self, strangers: dict[socket.socket, tuple[float, bytearray]]) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        strangers[connection] = (time.monotonic(), bytearray())

    def _hear(
        self, stranger: socket.socket, strangers: dict[socket.socket, tuple[float, bytearray]]
    ) -> None:
        heard = strangers[stranger][1]
        try:
            octets = stranger.recv(_NONCE_BYTES - len(heard))
        except OSError:
            octets = b""
        heard += octets
        if octets and len(heard) < _NONCE_BYTES:
            return
        del strangers[stranger]
        nonce = bytes(heard)
        with self._arrived:
            if nonce in self._expected and self._expected[nonce] is None:
                self._expected[nonce] = stranger
                self._arrived.notify_all()
            else:
                stranger.close()


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
    try:
        store.set(f"here/{rank}", "1")
        store.wait([f"here/{1 - rank}"])
        backend = _make(invitation.backend, store, rank, end)
        store.set(f"joined/{rank}", "1")
        store.wait([f"joined/{1 - rank}"])
    except Exception as error:
        store.close()
        if isinstance(error, TransferError):
            raise
        raise TransferError(plain(error)) from error
    return backend


def _make(name: str, store: PairStore, rank: int, end: End) -> Backend:
    """Backends are imported when they are wanted: not every build of torch has all of them."""
    if name == "gloo":
        from worker.direct.gloo import GlooBackend

        return GlooBackend(store, rank, end.address, end.patience.limit_s)
    if name == "nccl":
        from worker.direct.nccl import NcclBackend

        return NcclBackend(store, rank, end.device, end.patience.limit_s)
    if name == "ipc":
        from worker.direct.ipc import IpcBackend

        return IpcBackend(store, end.device)
    raise TransferError(f"unknown backend {name!r}; known are {', '.join(BACKENDS)}")


#: 128 bits, in hexadecimal.
_NONCE_BYTES = 32


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
