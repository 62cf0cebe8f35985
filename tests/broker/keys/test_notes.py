"""What the broker says of strangers: with their addresses, and nothing of a probe."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from broker.core import BrokerConfig
from broker.protocol import encode
from broker.protocol import messages as m
from broker.service import Broker
from tests.broker.core.rig import model
from tests.waiting import eventually
from tests.zmtp import connect, frame, greeting, null_handshake, read_message


@pytest.fixture
def broker(caplog: pytest.LogCaptureFixture) -> Iterator[Broker]:
    caplog.set_level(logging.DEBUG, "draftmq")
    with Broker(config=BrokerConfig(hello_s=5.0)) as service:
        yield service


def said(caplog: pytest.LogCaptureFixture, event: str) -> list[dict[str, Any]]:
    return [r.fields for r in caplog.records if r.getMessage() == event]  # type: ignore[attr-defined]


def connections(broker: Broker) -> int:
    return sum(len(port.connections) for port in broker._ports.values())


def addresses(broker: Broker) -> set[str]:
    """Of the connections that the broker has seen: one that fails before that has none."""
    return {each.address for port in broker._ports.values() for each in port.connections}


def test_a_probe_that_connects_and_closes_is_no_warning(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    for endpoint in (broker.client_endpoint, broker.worker_endpoint) * 3:
        with connect(endpoint):
            eventually(lambda: connections(broker) == 1)
        eventually(lambda: connections(broker) == 0)
    with connect(broker.client_endpoint) as sock:  # what comes next is read after all of that
        sock.sendall(greeting(b"CURVE"))
        eventually(lambda: said(caplog, "handshake_failed"))
    warnings = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert [record.getMessage() for record in warnings] == ["handshake_failed"]


def test_a_failed_handshake_names_the_address(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(broker.client_endpoint) as probe, connect(broker.client_endpoint) as sock:
        probe.close()
        host, port = sock.getsockname()
        eventually(lambda: f"{host}:{port}" in addresses(broker))
        sock.sendall(greeting(b"CURVE"))
        with contextlib.suppress(ConnectionError):
            while sock.recv(4096):
                pass
        eventually(lambda: said(caplog, "handshake_failed"))
    (told,) = said(caplog, "handshake_failed")
    assert told["address"] == f"{host}:{port}"
    assert told["side"] == "client"


def test_messages_at_the_wrong_port_name_the_address(
    broker: Broker, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(broker.client_endpoint) as sock:
        host, port = sock.getsockname()
        null_handshake(sock)
        sock.sendall(frame(encode(m.WorkerHello("w", 1, model(), 1, ())).frames[0]))
        read_message(sock)
        sock.sendall(frame(encode(m.Draining()).frames[0]))
        eventually(lambda: said(caplog, "wrong_message"))
    (told,) = said(caplog, "wrong_port")
    assert told["address"] == f"{host}:{port}"
    assert told["name"] == "w"
    (told,) = said(caplog, "wrong_message")
    assert told == {"side": "client", "kind": "Draining", "address": f"{host}:{port}"}
