"""Who gets a segment, and what is no segment."""

from __future__ import annotations

import concurrent.futures
import contextlib
import fcntl
import mmap
import os
import secrets
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.worker.direct.pairs import both
from worker.direct import segment
from worker.direct.backend import TransferError
from worker.direct.pair import PairStore

NBYTES = 1 << 16
#: One that has no files and runs no programs of its own, on every Linux.
NOBODY = 65534
SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class Lending(NamedTuple):
    """A segment that is being lent, and what the client is told of it."""

    lent: concurrent.futures.Future[tuple[socket.socket, mmap.mmap]]
    secret: bytes
    name: bytes


@pytest.fixture
def stores() -> Iterator[tuple[PairStore, PairStore]]:
    """The worker's and the client's end of a pair's own connection."""
    ends = [PairStore(end, 2.0, threading.Event()) for end in socket.socketpair()]
    yield ends[0], ends[1]
    for end in ends:
        end.close()


@pytest.fixture
def lending(stores: tuple[PairStore, PairStore]) -> Iterator[Lending]:
    """A worker that lends to whoever is entitled to it, and where."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        lent = pool.submit(segment.lend, stores[0], NBYTES)
        told = stores[1].get("door")
        yield Lending(lent, told[: segment.SECRET_BYTES], told[segment.SECRET_BYTES :])
        stores[0].close()  # ends it, if nobody came
    if not lent.exception():
        lent.result()[0].close()


def mapped() -> list[str]:
    """This process's mappings of segments that were lent."""
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:" in line]


def shown_out(stranger: socket.socket) -> bool:
    """The other end closes the connection, and has sent nothing."""
    stranger.settimeout(10)
    try:
        return stranger.recv(1) == b""
    except ConnectionResetError:  # without reading what was said
        return True


@contextlib.contextmanager
def another_user(act: Callable[[Callable[[bool], object]], None]) -> Iterator[Callable[[], bool]]:
    """A process of another user: what it says while it acts can be heard here, in turn."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            os.setresuid(NOBODY, NOBODY, NOBODY)
            act(lambda said: os.write(writer, b"1" if said else b"0"))
        finally:
            os._exit(0)
    os.close(writer)
    try:
        yield lambda: os.read(reader, 1) == b"1"
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)


@pytest.fixture
def other_self(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From this call on this process takes itself for another user's; the kernel knows better."""
    other = os.geteuid() + 1
    return lambda: monkeypatch.setattr(os, "geteuid", lambda: other)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start another user's process")


def test_what_one_end_writes_the_other_reads(stores: tuple[PairStore, PairStore]) -> None:
    lent, borrowed = both(
        lambda: segment.lend(stores[0], NBYTES), lambda: segment.borrow(stores[1], NBYTES)
    )
    lent[1][-3:] = b"end"
    assert borrowed[1][:] == bytes(NBYTES - 3) + b"end"
    with pytest.raises(TypeError):
        borrowed[1][0] = 1
    for connection, memory in (lent, borrowed):
        connection.close()
        memory.close()
    assert not mapped()


def test_a_segment_keeps_its_size(stores: tuple[PairStore, PairStore], lending: Lending) -> None:
    with segment.local_socket() as client:
        client.connect(lending.name)
        client.send(lending.secret)
        stores[1].set("called", "1")
        stores[1].get("lent")
        _, (descriptor,), _, _ = socket.recv_fds(client, 1, 1)
        for size in (0, NBYTES - 1, 2 * NBYTES):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, size)
        assert os.fstat(descriptor).st_size == NBYTES
        os.close(descriptor)


@pytest.mark.parametrize("said", [None, b"", bytes(segment.SECRET_BYTES)], ids=repr)
def test_who_does_not_know_the_secret_is_shown_out_and_hinders_nobody(
    stores: tuple[PairStore, PairStore], lending: Lending, said: bytes | None
) -> None:
    with segment.local_socket() as stranger:
        stranger.connect(lending.name)
        if said is not None:
            stranger.send(said)
        connection, _ = segment.borrow(stores[1], NBYTES)
        assert shown_out(stranger)
        connection.close()


@as_root
def test_another_users_client_is_shown_out_and_hinders_nobody(
    stores: tuple[PairStore, PairStore], lending: Lending
) -> None:
    def act(say: Callable[[bool], object]) -> None:
        stranger = segment.local_socket()
        stranger.connect(lending.name)
        stranger.send(lending.secret)
        say(True)
        say(shown_out(stranger))

    with another_user(act) as heard:
        assert heard()  # it has called, and comes first
        connection, _ = segment.borrow(stores[1], NBYTES)
        assert heard()
        connection.close()


@as_root
def test_another_users_worker_is_told_nothing(stores: tuple[PairStore, PairStore]) -> None:
    name = segment.NAME + secrets.token_hex(8).encode()

    def act(say: Callable[[bool], object]) -> None:
        door = segment.local_socket()
        door.bind(name)
        door.listen()
        say(True)
        connection, _ = door.accept()
        say(shown_out(connection))

    stores[0].set("door", bytes(segment.SECRET_BYTES) + name)
    with another_user(act) as heard:
        assert heard()
        with pytest.raises(TransferError, match="the worker is another user's"):
            segment.borrow(stores[1], NBYTES)
        assert heard()


def test_a_client_that_is_not_of_this_user_gets_nothing(
    stores: tuple[PairStore, PairStore], lending: Lending, other_self: Callable[[], None]
) -> None:
    with segment.local_socket() as client:
        client.connect(lending.name)
        client.send(lending.secret)
        other_self()
        stores[1].set("called", "1")
        with pytest.raises(TransferError, match="or is another user's"):
            lending.lent.result(10)
        assert shown_out(client)


def test_a_worker_that_is_not_of_this_user_is_refused(
    stores: tuple[PairStore, PairStore], lending: Lending, other_self: Callable[[], None]
) -> None:
    other_self()
    with pytest.raises(TransferError, match="the worker is another user's"):
        segment.borrow(stores[1], NBYTES)


def test_only_a_workers_socket_is_called(stores: tuple[PairStore, PairStore]) -> None:
    stores[0].set("door", bytes(segment.SECRET_BYTES) + b"/run/docker.sock")
    with pytest.raises(TransferError, match="no socket of a worker"):
        segment.borrow(stores[1], NBYTES)


def test_a_worker_out_of_reach_is_an_error(stores: tuple[PairStore, PairStore]) -> None:
    """What a client in another network namespace sees."""
    stores[0].set("door", bytes(segment.SECRET_BYTES) + segment.NAME + b"elsewhere")
    with pytest.raises(ConnectionRefusedError):
        segment.borrow(stores[1], NBYTES)


def memory(size: int, seals: int) -> int:
    descriptor = os.memfd_create("test", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, size)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, seals)
    return descriptor


def file(size: int) -> int:
    descriptor, name = tempfile.mkstemp()
    os.unlink(name)
    os.ftruncate(descriptor, size)
    return descriptor


@pytest.mark.parametrize(
    "make",
    [
        lambda: memory(NBYTES, 0),
        lambda: memory(NBYTES, fcntl.F_SEAL_GROW),
        lambda: memory(NBYTES - 1, SEALED),
        lambda: memory(NBYTES + 1, SEALED),
        lambda: file(NBYTES),
    ],
    ids=["unsealed", "may shrink", "short", "long", "a file"],
)
def test_what_could_fail_under_its_reader_is_refused(make: Callable[[], int]) -> None:
    worker, client = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = make()
    socket.send_fds(worker, [b"\0"], [descriptor])
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(TransferError, match="what the worker lent"):
        segment.take(client, NBYTES)
    assert len(os.listdir("/proc/self/fd")) == before
    os.close(descriptor)
    worker.send(b"\0")
    with pytest.raises(TransferError, match="lent no memory"):
        segment.take(client, NBYTES)
    worker.close()
    client.close()
