"""One side's port: nobody makes the other side wait for it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from unittest import mock

import pytest
import zmq

import broker.transport.port
from broker.core import BrokerConfig, ConnectionLost, Event, Received, Send, Side
from broker.protocol import decode, encode
from broker.protocol import messages as m
from broker.transport.port import Port
from broker.transport.sockets import configure


@pytest.fixture
def port() -> Iterator[Port]:
    with zmq.Context() as context:
        known, config = mock.MagicMock(), BrokerConfig()
        known.__contains__.return_value = True
        made = Port(context, Side.CLIENT, "tcp://127.0.0.1:0", config, known, None, mock.Mock())
        yield made
        made.close()


def say_and_go(port: Port, numbers: range) -> Received:
    """A peer says hello, is heard, says more and is gone; its hello."""
    with zmq.Context() as context:
        peer = context.socket(zmq.DEALER)
        configure(peer, port.limits)
        peer.connect(port.endpoint)
        peer.send_multipart(encode(m.ClientHello("c", 1, "", 0)).frames)
        (hello,) = until(port, 1)
        for number in numbers:
            peer.send_multipart(encode(m.Cancel(m.RequestId("c", 1, number))).frames)
        peer.close(linger=10_000)
    assert port.monitor.socket.poll(10_000)  # gone, and behind its last message
    assert isinstance(hello, Received)
    return hello


def until(port: Port, number: int) -> list[Event]:
    """So many events, of what is there."""
    found: list[Event] = []
    end = time.monotonic() + 10
    while len(found) < number and time.monotonic() < end:
        polled = [port.socket, port.monitor.socket]
        ready = {sock for sock in polled if sock.poll(0 if port.next_at else 100)}
        found += port.events(time.monotonic(), ready)
    return found


@pytest.mark.parametrize("number", [1, 200])
def test_what_a_peer_said_last_is_heard_before_it_is_gone(port: Port, number: int) -> None:
    hello = say_and_go(port, range(number))
    *said, last = until(port, number + 1)
    heard = [event.packet.message for event in said if isinstance(event, Received)]
    assert heard == [m.Cancel(m.RequestId("c", 1, each)) for each in range(number)]
    assert last == ConnectionLost(Side.CLIENT, hello.connection)


def test_that_there_is_nobody_to_send_to_is_no_news_before_its_last_words(port: Port) -> None:
    hello = say_and_go(port, range(1))
    assert port.send(Send(Side.CLIENT, hello.connection, encode(m.Draining()).frames))
    said, last = until(port, 2)
    assert isinstance(said, Received)
    assert last == ConnectionLost(Side.CLIENT, hello.connection)


def test_messages_that_take_long_to_read_end_a_ports_turn() -> None:
    """The other port has its turn after one of them, and not after a batch."""
    read = 0

    def slowly(*args: object) -> object:
        nonlocal read
        read += 1
        ends_at = time.monotonic() + 0.03
        while time.monotonic() < ends_at:
            pass
        return decode(*args)  # type: ignore[arg-type]

    with zmq.Context() as context:
        config = BrokerConfig()
        known: set[bytes] = set()
        port = Port(context, Side.CLIENT, "tcp://127.0.0.1:0", config, known, None, mock.Mock())
        peer = context.socket(zmq.DEALER)
        configure(peer, config.limits)
        try:
            peer.connect(port.endpoint)
            for number in range(20):
                peer.send_multipart(encode(m.ClientHello(f"c{number}", 1, "", 0)).frames)
            assert port.socket.poll(10_000)
            port.monitor.socket.poll(10_000)
            with mock.patch.object(broker.transport.port, "decode", slowly):
                ready = (port.socket, port.monitor.socket)
                events = port.events(time.monotonic(), ready)
        finally:
            peer.close()
            port.close()
    assert read == len(events) == 1
