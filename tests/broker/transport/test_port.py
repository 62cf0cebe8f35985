"""One side's port: nobody makes the other side wait for it."""

from __future__ import annotations

import time
from unittest import mock

import zmq

import broker.transport.port
from broker.core import BrokerConfig, Side
from broker.protocol import decode, encode
from broker.protocol import messages as m
from broker.transport.port import Port
from broker.transport.sockets import configure


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
