"""What one message raises in the broker costs its connection, and the broker goes on."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest
import zmq

from broker.core import Log, Side
from broker.core.inspect import validate
from broker.protocol import decode, encode
from broker.protocol import messages as m
from broker.service import Broker
from broker.transport.dealer import Dealer


class Peer:
    """A client that says what it is told to."""

    def __init__(self, endpoint: str, name: str) -> None:
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.dealer = Dealer(self.context, endpoint)
        self.say(m.ClientHello(name, 1, "job", 0))
        assert isinstance(self.hear(), m.Welcome)

    def say(self, message: m.Message) -> None:
        self.dealer.send(encode(message).frames)

    def hear(self) -> m.Message:
        assert self.dealer.socket.poll(10_000), "nothing came"
        frames = self.dealer.receive()
        assert frames is not None
        return decode(frames).message

    def close(self) -> None:
        self.dealer.close()
        self.context.term()


@pytest.fixture
def broker() -> Iterator[Broker]:
    with Broker() as broker:
        yield broker


def test_a_message_that_fails_in_the_core(
    broker: Broker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("a bug of ours")

    monkeypatch.setitem(broker.core._handlers[Side.CLIENT], m.Cancel, fail)  # type: ignore[arg-type]
    bad, good = Peer(broker.client_endpoint, "bad"), Peer(broker.client_endpoint, "good")
    with caplog.at_level(logging.ERROR):
        bad.say(m.Cancel(m.RequestId("bad", 1, 1)))
        for _ in range(3):
            good.say(m.Heartbeat(-1))
            assert isinstance(good.hear(), m.Heartbeat)
    (record,) = [record for record in caplog.records if record.message == "message_failed"]
    assert record.fields["kind"] == "Cancel"
    assert record.fields["address"].startswith("127.0.0.1:")
    assert not broker.failed
    shown = broker.snapshot()
    assert shown["counters"]["failed_messages"] == 1
    assert [client["client"] for client in shown["clients"] if client["connected"]] == ["good"]
    validate(broker.core)
    for peer in (bad, good):
        peer.close()


def test_books_that_are_not_true_any_more_end_it(
    broker: Broker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(*arguments: object) -> None:
        broker.core.client_connections[b"nobody"] = broker.core.clients["bad"]
        raise KeyError("a bug of ours")

    monkeypatch.setitem(broker.core._handlers[Side.CLIENT], m.Cancel, spoil)  # type: ignore[arg-type]
    with contextlib.closing(Peer(broker.client_endpoint, "bad")) as peer:
        peer.say(m.Cancel(m.RequestId("bad", 1, 1)))
        assert broker.wait(10)
        assert broker.failed


def test_lines_of_those_who_come_and_go_are_counted_and_not_all_written(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        broker._act([Log("info", "client_joined", {"client": f"c{n}"}) for n in range(5000)])
        broker._act([Log("warning", "foreign_request", {}) for _ in range(5000)])
    lines = [record.message for record in caplog.records]
    assert 2000 <= lines.count("client_joined") < 2100
    assert 20 <= lines.count("foreign_request") < 30
