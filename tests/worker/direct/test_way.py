"""An end follows its host's address, and waits for no name server."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from tests.waiting import eventually
from worker.direct import config, way
from worker.direct.config import DirectConfig
from worker.direct.way import Way, is_ours

_logger = logging.getLogger("draftmq.test")
AUTO = DirectConfig(mode="gloo", address="auto")


class Host:
    """A host whose addresses are said, and the name server that it asks."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.address = "10.9.9.1"
        self.answers = threading.Event()
        self.answers.set()
        monkeypatch.setattr(config, "_towards", self._towards)
        monkeypatch.setattr(way, "is_ours", lambda address: address == self.address)
        monkeypatch.setattr(way, "_ASK_S", 0.0)

    def _towards(self, host: str) -> str:
        self.answers.wait()
        if not self.address:
            raise OSError("Network is unreachable")
        return self.address


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    made = Host(monkeypatch)
    yield made
    made.answers.set()


def test_a_host_that_gets_another_address_is_followed(host: Host) -> None:
    found = Way(AUTO, "cpu", ["tcp://broker:5556"], _logger)
    assert found.choice.address == "10.9.9.1"
    host.address = "10.9.9.2"
    eventually(lambda: found.choice.address == "10.9.9.2")


def test_a_host_without_a_way_has_one_when_there_is_one(host: Host) -> None:
    host.address = ""
    found = Way(AUTO, "cpu", ["tcp://broker:5556"], _logger)
    assert found.choice.backends == ()
    host.address = "10.9.9.3"
    eventually(lambda: found.choice.address == "10.9.9.3")
    assert found.choice.backends == ("gloo",)


def test_a_silent_name_server_holds_nobody(host: Host) -> None:
    host.answers.clear()
    began = time.monotonic()
    found = Way(AUTO, "cpu", ["tcp://broker:5556"], _logger)
    assert time.monotonic() - began < 5.0
    assert found.choice.backends == ()
    assert "not known yet" in str(found.choice)
    host.answers.set()
    eventually(lambda: found.choice.address == host.address)


def test_what_was_given_up_stays_so_and_an_address_that_was_lost_does_not(host: Host) -> None:
    found = Way(AUTO, "cpu", ["tcp://broker:5556"], _logger)
    host.address = "10.9.9.2"
    found.give_up("no port can be bound at 10.9.9.1")
    eventually(lambda: found.choice.address == "10.9.9.2")
    found.give_up("no port is free")
    assert str(found.choice) == "off (no port is free)"


def test_an_address_that_was_given_is_kept(host: Host) -> None:
    given = DirectConfig(mode="gloo", address="10.9.9.7")
    assert Way(given, "cpu", ["tcp://broker:5556"], _logger).choice.address == "10.9.9.7"


def test_addresses_of_this_host() -> None:
    assert is_ours("127.0.0.1")
    assert not is_ours("192.0.2.1")  # of no host: kept for documents


def test_the_way_to_a_broker_with_an_address_is_asked_before_a_name_is_looked_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    real = socket.getaddrinfo

    def resolve(host: str, *rest: Any, **options: Any) -> Any:
        asked.append(host)
        return real("127.0.0.1", *rest, **options)

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    config.choose(AUTO, "cpu", ["tcp://a-name:1", "tcp://10.1.1.1:1"])
    assert asked == ["10.1.1.1"]
