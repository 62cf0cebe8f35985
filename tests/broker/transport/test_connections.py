"""Connections are told apart by the ROUTER's names, since descriptors are used again."""

from __future__ import annotations

import pytest
import zmq

from broker.core import BrokerConfig, ConnectionLost, Received, Side
from broker.protocol import encode
from broker.protocol import messages as m
from broker.transport.connections import Allowance, Connections
from broker.transport.port import Port


def name(number: int) -> bytes:
    """As a ROUTER counts them."""
    return b"\0" + (number % (1 << 32)).to_bytes(4)


class Frame(bytes):
    """A received frame of the connection with descriptor 7, as far as a port asks."""

    more = False

    def get(self, option: object) -> int:
        assert option == zmq.SRCFD
        return 7


@pytest.mark.parametrize("first", [5, (1 << 32) - 1])
def test_a_late_message_of_a_dead_connection_does_not_make_its_successor_deaf(first: int) -> None:
    known: set[bytes] = set()
    connections = Connections(known, Allowance(1.0, 8, 1 << 20))
    older, newer = name(first), name(first + 1)
    connections.accepted(7, 0.0)
    connections.closed(7)
    connections.accepted(7, 1.0)
    assert connections.spoke(7, older, "", 1.1) is not None  # nobody can know better yet
    assert connections.displaced(7, newer) == older
    connection = connections.spoke(7, newer, "", 1.2)
    assert connection is connections.named(newer)
    assert connections.named(older) is None
    assert connections.displaced(7, older) == b""
    assert connections.spoke(7, older, "", 1.3) is None  # and the dead stays dead


def test_a_name_that_a_peer_chose_displaces_nobody() -> None:
    connections = Connections(set(), Allowance(1.0, 8, 1 << 20))
    connections.accepted(7, 0.0)
    connections.spoke(7, name(3), "", 0.1)
    for chosen in (b"zzzzz", b"\0", b"\xff" * 5, b"\0\0\0\0\0\4"):
        assert connections.displaced(7, chosen) == b""


def test_a_port_hears_the_successor_and_reports_the_dead_one_lost() -> None:
    with zmq.Context() as context:
        port = Port(
            context,
            Side.CLIENT,
            "tcp://127.0.0.1:0",
            BrokerConfig(),
            set(),
            None,
            lambda *_, **__: None,
        )
        try:
            port.connections.accepted(7, 0.0)
            hello = bytes(encode(m.ClientHello("rank0", 1, "", 0)).frames[0])
            for number in (1, 2):
                port._receive(name(number), [Frame(hello)], len(hello), 0.1)
            events = port.events(0.2, ())
        finally:
            port.close()
    assert [type(event) for event in events] == [Received, ConnectionLost, Received]
    assert [event.connection for event in events] == [name(1), name(1), name(2)]
