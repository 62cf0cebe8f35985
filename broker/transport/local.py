"""Listening at ``ipc://PATH``, for peers of the same user on the same machine."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

from broker.errors import BrokerError

_KIND = "ipc://"
_OWNER_ONLY = 0o177


class LocalPath:
    """Where a port listens; makes a path as safe as a TCP port is.

    libzmq removes whatever lies at the path that it binds, and leaves its own socket there when it
    closes. So what is not a socket, and a socket on which somebody listens, are errors here; what a
    killed broker left is taken away; and a closing one takes its own socket away. The socket can be
    opened by this user only.
    """

    def __init__(self, address: str) -> None:
        self._path = _path(address)
        #: device and inode of our socket, once there is one
        self._ours: tuple[int, int] | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Around the bind. Raises :class:`BrokerError` where the place is not free."""
        if self._path is None:
            yield
            return
        _check_free(self._path)
        before = os.umask(_OWNER_ONLY)
        try:
            yield
        finally:
            os.umask(before)
        self._ours = _identity(self._path)

    def leave(self) -> None:
        """Take our socket away, unless it is another's by now."""
        if self._path is not None and self._ours is not None:
            with contextlib.suppress(OSError):
                if _identity(self._path) == self._ours:
                    self._path.unlink()


def _identity(path: Path) -> tuple[int, int]:
    status = path.lstat()
    return status.st_dev, status.st_ino


def _path(address: str) -> Path | None:
    """Of an address that makes a file; ``ipc://@NAME`` and ``ipc://*`` make none of that name."""
    if not address.startswith(_KIND) or address[len(_KIND) :].startswith(("@", "*")):
        return None
    return Path(address[len(_KIND) :])


def _check_free(path: Path) -> None:
    try:
        kind = path.lstat().st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(kind):
        raise BrokerError(f"cannot listen at ipc://{path}: there is a file that is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            return
        except OSError as error:
            raise BrokerError(f"cannot listen at ipc://{path}: {error}") from error
    raise BrokerError(
        f"cannot listen at ipc://{path}: somebody listens there; is another broker running?"
    )
