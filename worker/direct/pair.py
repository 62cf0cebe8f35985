"""The two ends' own connection: what a process group's constructor is told, and who has gone.

torch's ``TCPStore`` would do for the first, but its client waits without any limit for a server
that has stopped answering, and it takes no credentials. Here every wait has a limit, and a peer's
death is seen at once, also between transfers.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import Store

from worker.direct.backend import TransferError

_HEAD = struct.Struct("!HI")
_MAX_KEY_BYTES, _MAX_VALUE_BYTES = 1024, 1 << 20
_SLICE_S = 0.05


class PairStore(Store):
    """A store of two: a key that one end sets is sent to the other.

    Every wait ends after ``limit_s``, or when ``leaving`` is set, with :class:`TransferError`.
    """

    def __init__(self, connection: socket.socket, limit_s: float, leaving: threading.Event) -> None:
        super().__init__()
        self._connection = connection
        self._limit_s = limit_s
        self._leaving = leaving
        self._values: dict[str, bytes] = {}
        self._unread = bytearray()
        self._lock = threading.Lock()

    # -- what torch calls -------------------------------------------------------------------------

    def set(self, key: str, value: str | bytes) -> None:
        octets = value.encode() if isinstance(value, str) else bytes(value)
        name = key.encode()
        with self._lock:
            self._values[key] = octets
            try:
                self._connection.sendall(_HEAD.pack(len(name), len(octets)) + name + octets)
            except OSError as error:
                raise TransferError(f"the other end is gone: {error}") from error

    def get(self, key: str) -> bytes:
        self._await([key], self._limit_s)
        return self._values[key]

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        self._await(keys, self._limit_s if timeout is None else timeout.total_seconds())

    def check(self, keys: Sequence[str]) -> bool:
        with self._lock:
            self._read(0.0)
        return all(key in self._values for key in keys)

    def delete_key(self, key: str) -> bool:
        return self._values.pop(key, None) is not None

    def set_timeout(self, timeout: timedelta) -> None:
        """Ours is the channel's, and stays."""

    # -- what a channel calls ---------------------------------------------------------------------

    @property
    def gone(self) -> bool:
        """The other end has closed its connection, or died."""
        try:
            with self._lock:
                self._read(0.0)
        except TransferError:
            return True
        return False

    def take(self, key: str, limit_s: float) -> bytes:
        """What the other end sets this key to, once. Raises :class:`TransferError` as all waits."""
        self._await([key], limit_s, f"timed out: nothing moved for {limit_s:g} s")
        return self._values.pop(key)

    def told(self, key: str) -> str:
        """What the other end has set this key to, as text; empty where it has not."""
        return self._values.get(key, b"").decode(errors="replace")

    def leave(self, key: str, limit_s: float) -> None:
        """Have the other end see that this one leaves, and wait until it has said its last word
        ``key``, or has gone, or ``limit_s`` is over.
        """
        deadline = time.monotonic() + limit_s
        with contextlib.suppress(OSError, TransferError):
            self._connection.shutdown(socket.SHUT_WR)
            while key not in self._values and time.monotonic() < deadline:
                with self._lock:
                    self._read(_SLICE_S)

    def interrupt(self) -> None:
        """Free whoever waits at either end; from any thread."""
        with contextlib.suppress(OSError):  # it was closed, or the other end has gone
            self._connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._connection.close()

    def _await(self, keys: Sequence[str], limit_s: float, late: str = "") -> None:
        deadline = time.monotonic() + limit_s
        while not all(key in self._values for key in keys):
            if self._leaving.is_set():
                raise TransferError("this end leaves")
            if time.monotonic() >= deadline:
                late = late or f"the other end did not say {keys[0]!r} within {limit_s:g} s"
                raise TransferError(late)
            with self._lock:
                self._read(_SLICE_S)

    def _read(self, patience_s: float) -> None:
        """Take what has come. Raises :class:`TransferError` when nothing more ever will."""
        ended = ""
        try:
            while not ended and select.select([self._connection], [], [], patience_s)[0]:
                octets = self._connection.recv(1 << 16)
                self._unread += octets
                ended = "" if octets else "the other end is gone"
                patience_s = 0.0
        except (OSError, ValueError) as error:  # ValueError: this end has closed it
            ended = f"the other end is gone: {error}"
        news = False
        while (message := self._next()) is not None:
            self._values[message[0]] = message[1]
            news = True
        if ended and not news:
            raise TransferError(ended)

    def _next(self) -> tuple[str, bytes] | None:
        if len(self._unread) < _HEAD.size:
            return None
        key_bytes, value_bytes = _HEAD.unpack_from(self._unread)
        if key_bytes > _MAX_KEY_BYTES or value_bytes > _MAX_VALUE_BYTES:
            raise TransferError(f"the other end says {value_bytes} bytes of {key_bytes}: nonsense")
        end = _HEAD.size + key_bytes + value_bytes
        if len(self._unread) < end:
            return None
        key = bytes(self._unread[_HEAD.size : _HEAD.size + key_bytes]).decode(errors="replace")
        value = bytes(self._unread[_HEAD.size + key_bytes : end])
        del self._unread[:end]
        return key, value


class OnPair:
    """What every backend has of its pair's own connection: it tells that the other end has gone."""

    def __init__(self, store: PairStore) -> None:
        self._store = store

    @property
    def gone(self) -> bool:
        return self._store.gone

    def close(self) -> None:
        self._store.close()
