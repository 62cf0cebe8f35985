"""Names are looked up beside the connections, and all addresses of a host are tried in turn."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import zmq

from broker.protocol import messages as m
from broker.protocol.wire import encode
from broker.service import Broker
from broker.transport import names
from broker.transport.dealer import Dealer, _leads_to_itself
from tests.waiting import eventually
from trainer_client import RemoteEagle3TargetModel

HELLO = encode(m.ClientHello("rank0", 1, "", 0)).frames


@pytest.fixture
def context() -> Iterator[zmq.Context[zmq.Socket[bytes]]]:
    with zmq.Context() as context:
        yield context


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as broker:
        yield broker


def port_of(broker: Broker) -> str:
    return broker.client_endpoint.rpartition(":")[2]


def resolve(monkeypatch: pytest.MonkeyPatch, known: dict[str, list[str]]) -> None:
    """Names have these addresses; others have none."""

    def addresses_of(host: str) -> list[str]:
        if host not in known:
            raise socket.gaierror(-2, "Name or service not known")
        return known[host]

    monkeypatch.setattr(names, "addresses_of", addresses_of)


def connects(dealer: Dealer) -> bool:
    """One look, as the loop that owns it has them."""
    dealer.advance(time.monotonic())
    return any(up for up, _ in dealer.changes())


def test_a_name_is_looked_up_and_connected(
    context: zmq.Context[zmq.Socket[bytes]], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, {"broker.example": ["127.0.0.1"]})
    dealer = Dealer(context, f"tcp://broker.example:{port_of(broker)}")
    eventually(lambda: connects(dealer))
    dealer.send(HELLO)
    eventually(lambda: dealer.receive())
    dealer.close()


def test_an_address_that_refuses_is_followed_by_the_next(
    context: zmq.Context[zmq.Socket[bytes]], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve(monkeypatch, {"pods.example": ["127.0.0.7", "127.0.0.8", "127.0.0.1"]})
    dealer = Dealer(context, f"tcp://pods.example:{port_of(broker)}")
    eventually(lambda: connects(dealer))
    dealer.close()


def test_an_address_that_says_nothing_is_followed_by_the_next(
    context: zmq.Context[zmq.Socket[bytes]], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(names.Route, "FIRST_S", 0.05)
    with socket.socket() as silent, socket.socket() as filler:
        silent.bind(("127.0.0.7", int(port_of(broker))))
        silent.listen(0)
        filler.connect(silent.getsockname())  # its queue is full: a further SYN has no answer
        resolve(monkeypatch, {"pods.example": ["127.0.0.7", "127.0.0.1"]})
        dealer = Dealer(context, f"tcp://pods.example:{port_of(broker)}")
        eventually(lambda: connects(dealer))
        dealer.close()


def test_a_name_without_an_address_is_said_and_found_when_it_has_one(
    context: zmq.Context[zmq.Socket[bytes]], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[str, list[str]] = {}
    resolve(monkeypatch, known)
    dealer = Dealer(context, f"tcp://later.example:{port_of(broker)}")
    said: list[str] = []
    eventually(lambda: said.append(dealer.advance(time.monotonic())) or any(said))
    assert "'later.example' has no address here" in next(filter(None, said))
    known["later.example"] = ["127.0.0.1"]
    dealer.reopen()
    eventually(lambda: connects(dealer))
    dealer.close()


def test_a_host_that_has_moved_is_followed(
    context: zmq.Context[zmq.Socket[bytes]], broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = {"moves.example": ["127.0.0.7"]}
    resolve(monkeypatch, known)
    dealer = Dealer(context, f"tcp://moves.example:{port_of(broker)}")
    eventually(lambda: dealer.advance(time.monotonic()) or dealer.socket is not None)
    known["moves.example"] = ["127.0.0.1"]
    dealer.reopen()
    eventually(lambda: connects(dealer))
    dealer.close()


def test_a_silent_name_server_costs_no_other_broker_and_holds_no_close(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, silence = threading.Event(), threading.Event()

    def addresses_of(host: str) -> list[str]:
        asked.set()
        silence.wait(60)
        return []

    monkeypatch.setattr(names, "addresses_of", addresses_of)
    try:
        urls = ["tcp://silent.example:5555", broker.client_endpoint]
        with RemoteEagle3TargetModel.from_urls(urls, device="cpu", timeout=20) as remote:
            links = remote._client.core.links
            eventually(lambda: links[broker.client_endpoint].ready)
            assert asked.wait(20)
        assert not silence.is_set()  # closed, while nobody has answered yet
    finally:
        silence.set()


def test_a_connection_to_itself_is_recognised() -> None:
    with socket.socket() as itself, socket.create_server(("127.0.0.1", 0)) as server:
        itself.bind(("127.0.0.1", 0))
        itself.connect(itself.getsockname())
        assert _leads_to_itself(itself.fileno())
        with socket.create_connection(server.getsockname()) as other:
            assert not _leads_to_itself(other.fileno())


def test_a_peer_that_was_connected_to_itself_gives_the_port_back(
    context: zmq.Context[zmq.Socket[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr("broker.transport.dealer._leads_to_itself", lambda descriptor: True)
        dealer = Dealer(context, f"tcp://127.0.0.1:{server.getsockname()[1]}")
        found: list[tuple[bool, str]] = []
        eventually(lambda: found.extend(dealer.changes()) or found)
        assert found[0][0] is False
        assert "connected to itself" in found[0][1]
        assert dealer.socket is None
        dealer.close()


def test_addresses_are_tried_once_a_round_and_the_one_that_worked_first() -> None:
    route = names.Route(["a", "b", "c"])
    assert [route.next() for _ in range(3)] == ["a", "b", "c"]
    route.worked()
    assert [route.next() for _ in range(3)] == ["c", "a", "b"]
    assert route.round_over
