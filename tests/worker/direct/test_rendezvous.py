from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable

import pytest
import torch

from tests.waiting import eventually
from tests.worker.direct.pairs import both, invitation, pair
from worker.direct.backend import TransferError
from worker.direct.channel import ChannelConfig
from worker.direct.pair import PairStore
from worker.direct.rendezvous import End, Rendezvous, join

SHORT = End("127.0.0.1", torch.device("cpu"), ChannelConfig(limit_s=0.5, connect_s=0.5))
STAYING = threading.Event()


@pytest.fixture
def rendezvous() -> object:
    made = Rendezvous("127.0.0.1", (0, 0))
    yield made
    made.close()


def test_it_listens_on_its_interface_and_in_its_ports(rendezvous: Rendezvous) -> None:
    with pytest.raises(TransferError, match=rf"no port of {rendezvous.port}-{rendezvous.port} can"):
        Rendezvous("127.0.0.1", (rendezvous.port, rendezvous.port))
    last = min(rendezvous.port + 20, 65535)
    second = Rendezvous("127.0.0.1", (rendezvous.port, last))
    assert rendezvous.port < second.port <= last
    second.close()
    with socket.socket() as elsewhere, pytest.raises(ConnectionRefusedError):
        elsewhere.connect(("127.0.0.2", rendezvous.port))


def test_neither_end_waits_long_for_the_other(rendezvous: Rendezvous) -> None:
    invited = invitation(rendezvous)
    with pytest.raises(TransferError, match=r"the client did not come within 0.5 s"):
        rendezvous.meet(invited, SHORT, STAYING)
    with pytest.raises(TransferError, match=r"did not say"):
        join(invited, SHORT, STAYING)


def test_a_wrong_nonce_meets_nobody(rendezvous: Rendezvous) -> None:
    right = invitation(rendezvous)
    wrong = invitation(rendezvous)
    with pytest.raises(TransferError):
        both(lambda: rendezvous.meet(right, SHORT, STAYING), lambda: join(wrong, SHORT, STAYING))


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\n\r\n", b"0" * 32, b"\xff" * 4096], ids=repr
)
def test_strangers_are_shown_out_and_hinder_nobody(rendezvous: Rendezvous, said: bytes) -> None:
    strangers = [socket.create_connection(("127.0.0.1", rendezvous.port)) for _ in range(100)]
    for stranger in strangers:
        stranger.sendall(said)
    end = End("127.0.0.1", torch.device("cpu"), ChannelConfig(limit_s=2, connect_s=5))
    invited = invitation(rendezvous)
    worker, client = both(
        lambda: rendezvous.meet(invited, end, STAYING), lambda: join(invited, end, STAYING)
    )
    _, got = both(
        lambda: worker.send(0, [torch.ones(3, dtype=torch.uint8)], 2),
        lambda: client.receive(0, [3], 2),
    )
    assert got[0].tolist() == [1, 1, 1]
    for each in (worker, client):
        each.interrupt()
        each.close()
    if said != b"":  # who says nothing is shown out after a while
        eventually(lambda: all(_closed(stranger) for stranger in strangers[:30]))
    for stranger in strangers:
        stranger.close()


def _closed(stranger: socket.socket) -> bool:
    stranger.setblocking(False)
    try:
        return stranger.recv(1) == b""
    except BlockingIOError:
        return False
    except ConnectionError:
        return True


@pytest.mark.parametrize("block", ["refused", "silent"])
def test_a_blocked_port_ends_the_attempt_and_leaving_ends_it_at_once(
    rendezvous: Rendezvous, block: str
) -> None:
    with socket.socket() as blocked:
        blocked.bind(("127.0.0.1", 0))
        if block == "silent":
            blocked.listen()
        port = blocked.getsockname()[1]
        with pytest.raises(TransferError, match=r"nobody can be reached|did not say"):
            join(invitation(rendezvous, port=port), SHORT, STAYING)
        patient = End("127.0.0.1", torch.device("cpu"), ChannelConfig(connect_s=60))
        leaving = threading.Event()
        leaving.set()
        began = time.monotonic()
        with pytest.raises(TransferError):
            join(invitation(rendezvous, port=port), patient, leaving)
        assert time.monotonic() - began < 30


def test_an_unknown_backend_is_named(rendezvous: Rendezvous) -> None:
    invited = invitation(rendezvous, "carrier-pigeon")
    errors = both(
        lambda: _error_of(lambda: join(invited, SHORT, STAYING)),
        lambda: _error_of(lambda: rendezvous.meet(invited, SHORT, STAYING)),
    )
    assert any("unknown backend 'carrier-pigeon'; known are ipc" in error for error in errors), (
        errors
    )


def _error_of(call: Callable[[], object]) -> str:
    with pytest.raises(TransferError) as caught:
        call()
    return str(caught.value)


def test_a_store_of_two_is_read_by_both() -> None:
    ends = socket.socketpair()
    one, other = (PairStore(end, 0.5, STAYING) for end in ends)
    one.set("a", b"\x00" * 100_000)
    assert other.get("a") == b"\x00" * 100_000
    assert one.get("a") == other.get("a")
    assert not one.check(["b"])
    with pytest.raises(TransferError, match=r"did not say 'b' within 0.5 s"):
        one.get("b")
    other.close()
    assert one.gone
    with pytest.raises(TransferError, match="the other end is gone"):
        one.get("b")
    one.close()


def test_nonsense_on_the_connection_is_an_error() -> None:
    ends = socket.socketpair()
    store = PairStore(ends[0], 0.5, STAYING)
    ends[1].sendall(b"\xff" * 64)
    with pytest.raises(TransferError, match="nonsense"):
        store.get("a")
    store.close()
    ends[1].close()


def test_a_pair_leaves_nothing_open() -> None:
    before = threading.active_count()
    with pair():
        pass
    eventually(lambda: threading.active_count() <= before)
