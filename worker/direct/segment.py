"""A few MiB of memory that two processes of one user on one host have mapped, and nobody else.

The segment has no name. The worker hands its descriptor to the client over a local socket, after
each has seen that the other is of the same user, and the kernel frees it when both have gone,
however they went. It is sealed, so that neither end can cut it short under the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import secrets
import socket
import struct

from worker.direct.backend import TransferError
from worker.direct.pair import PairStore

#: Names of the workers' sockets begin so: in the kernel's abstract space, where no files stay.
NAME = b"\0draftmq-"
SECRET_BYTES = 16
_CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid


def possible() -> bool:
    """Linux has all that it takes, unless a sandbox forbids it."""
    try:
        os.close(os.memfd_create("draftmq"))
    except (AttributeError, OSError):
        return False
    return hasattr(socket, "SO_PEERCRED")


def lend(store: PairStore, nbytes: int) -> tuple[socket.socket, mmap.mmap]:
    """The worker's part: a connection to the client, and a segment that both have.

    Raises :class:`TransferError` when the client does not come or is another user's, and
    ``OSError`` where there is no memory or the system forbids it.
    """
    connection = _admit(store)
    try:
        segment = _make(connection, nbytes)
        store.set("lent", "1")
    except BaseException:
        connection.close()
        raise
    return connection, segment


def borrow(store: PairStore, nbytes: int) -> tuple[socket.socket, mmap.mmap]:
    """The client's part: a connection to the worker, and its segment to read from.

    Raises :class:`TransferError` when the worker is another user's or what it lends is unsafe, and
    ``OSError`` when its socket cannot be reached, as from another network namespace.
    """
    connection = _call(store)
    try:
        store.set("called", "1")
        store.wait(["lent"])
        segment = take(connection, nbytes)
    except BaseException:
        connection.close()
        raise
    return connection, segment


def _admit(store: PairStore) -> socket.socket:
    secret = secrets.token_bytes(SECRET_BYTES)
    with local_socket() as door:
        door.bind(NAME + secrets.token_hex(8).encode())
        door.listen()
        door.setblocking(False)
        store.set("door", secret + door.getsockname())
        store.wait(["called"])  # so that nothing below has to wait
        with contextlib.suppress(BlockingIOError):
            while True:
                caller, _ = door.accept()
                if _is_ours(caller) and _said(caller) == secret:
                    return caller
                caller.close()
    raise TransferError("the client did not come to the local socket, or is another user's")


def _call(store: PairStore) -> socket.socket:
    told = store.get("door")
    secret, name = told[:SECRET_BYTES], told[SECRET_BYTES:]
    if not name.startswith(NAME):
        raise TransferError(f"the worker named {name!r:.80}, which is no socket of a worker")
    connection = local_socket()
    try:
        connection.setblocking(False)
        connection.connect(name)
        if not _is_ours(connection):
            raise TransferError("the worker is another user's")
        connection.send(secret)
    except BaseException:
        connection.close()
        raise
    return connection


def local_socket() -> socket.socket:
    """Messages whole and in order, credentials, and its end is told at once."""
    return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def _is_ours(connection: socket.socket) -> bool:
    """Whoever called, or listened, had this process's effective user then."""
    told = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return bool(_CREDENTIALS.unpack(told)[1] == os.geteuid())


def _said(caller: socket.socket) -> bytes:
    with contextlib.suppress(OSError):
        return caller.recv(SECRET_BYTES, socket.MSG_DONTWAIT)
    return b""


def _make(connection: socket.socket, nbytes: int) -> mmap.mmap:
    segment = os.memfd_create("draftmq", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        # all its pages now: a lack of memory is an error here, and would be a signal later
        os.posix_fallocate(segment, 0, nbytes)
        seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
        fcntl.fcntl(segment, fcntl.F_ADD_SEALS, seals)
        socket.send_fds(connection, [b"\0"], [segment])
        return mmap.mmap(segment, nbytes)
    finally:
        os.close(segment)


def take(connection: socket.socket, nbytes: int) -> mmap.mmap:
    """Map what the worker has sent, to read from; it must not be able to shrink.

    Raises :class:`TransferError` for anything that could fail under the reader.
    """
    _, descriptors, _, _ = socket.recv_fds(connection, 1, 1, socket.MSG_CMSG_CLOEXEC)
    if not descriptors:
        raise TransferError("the worker lent no memory")
    (segment,) = descriptors
    try:
        size = os.fstat(segment).st_size
        if size != nbytes or not _seals(segment) & fcntl.F_SEAL_SHRINK:
            raise TransferError(f"what the worker lent ({size} bytes) is not {nbytes} that stay")
        return mmap.mmap(segment, nbytes, prot=mmap.PROT_READ)
    finally:
        os.close(segment)


def _seals(segment: int) -> int:
    try:
        return fcntl.fcntl(segment, fcntl.F_GET_SEALS)
    except OSError:  # a file, which has none
        return 0
