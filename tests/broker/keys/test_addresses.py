"""What is an address, and what is said of what is none."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from broker.commands import cli
from broker.keys.addresses import Address, AddressError, connecting, http, is_local, listening
from broker.service import Broker
from tests.waiting import eventually
from trainer_client.service import Client
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.service import Worker
from worker.targets.stub import StubTarget


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("tcp://host:5555", Address("tcp", "host", 5555)),
        ("tcp://10.0.0.1:1", Address("tcp", "10.0.0.1", 1)),
        ("tcp://[::1]:5555", Address("tcp", "::1", 5555)),
        ("tcp://[fe80::1%eth0]:5555", Address("tcp", "fe80::1%eth0", 5555)),
        ("ipc:///run/a", Address("ipc", "/run/a")),
    ],
)
def test_addresses_of_brokers(text: str, address: Address) -> None:
    assert connecting(text) == listening(text) == address


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("http://host:5555", "is a http address; brokers speak ZeroMQ: write tcp://HOST:5555"),
        ("host:5555", "has no tcp:// or ipc:// before it; write tcp://host:5555"),
        ("host", "has no tcp:// or ipc:// before it"),
        ("tcp://host", "has no port; write tcp://HOST:5555"),
        ("tcp://host:99999", "has the port 99999; ports end at 65535"),
        ("tcp://host:-1", "is no HOST:PORT"),
        ("tcp://::1:5555", "stands in brackets"),
        ("tcp://[::zz]:5555", "is no IPv6 address"),
        ("tcp://:5555", "is no HOST:PORT"),
        ("tcp://host:5555/path", "is no HOST:PORT"),
        ("tcp://ho st:5555", "is no HOST:PORT"),
        ("tcp://*:5555", "is no place to connect to"),
        ("tcp://host:0", "is no place to connect to"),
        ("ipc://", "names no path"),
        ("", "has no tcp://"),
    ],
)
@pytest.mark.parametrize(
    "use",
    [
        connecting,
        lambda text: Client([text]),
        lambda text: RemoteEagle3TargetModel.from_urls([text], device="cpu"),
        lambda text: Worker(StubTarget(), text),
    ],
    ids=["parser", "Client", "RemoteEagle3TargetModel", "Worker"],
)
def test_what_is_no_address_is_one_sentence_and_leaves_nothing_open(
    use: Callable[[str], object], text: str, said: str
) -> None:
    with pytest.raises(AddressError) as raised:
        use(text)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["worker", "--target", "nobody/has-this", "--broker", "localhost:5556"], "no tcp:// or"),
        (["broker", "--clients", "127.0.0.1:5555"], "has no tcp:// or ipc:// before it"),
        (["broker", "--clients", "tcp://127.0.0.1:99999"], "ports end at 65535"),
        (["broker", "--http", "http://127.0.0.1:9555"], "is a URL; HTTP is served at HOST:PORT"),
    ],
)
def test_commands_say_it_before_they_do_anything(arguments: list[str], said: str) -> None:
    run = CliRunner().invoke(cli, arguments)
    assert isinstance(run.exception, AddressError)
    assert said in str(run.exception)


def test_loopback_is_more_than_one_address() -> None:
    for text in ("tcp://127.0.0.2:1", "tcp://[::1]:1", "tcp://localhost:1", "ipc://a"):
        assert is_local(text)
    for text in ("tcp://0.0.0.0:1", "tcp://*:1", "tcp://10.0.0.1:1", "tcp://[::]:1", "tcp://h:1"):
        assert not is_local(text)
    assert http("127.0.0.1:0").local
    assert not http("0.0.0.0:9555").local


def test_a_cluster_over_ipv6() -> None:
    any_port = "tcp://[::1]:0"
    with contextlib.ExitStack() as stack:
        broker = stack.enter_context(Broker(any_port, any_port))
        stack.enter_context(Worker(StubTarget(), broker.worker_endpoint))
        eventually(lambda: broker.snapshot()["workers"])
        url = broker.client_endpoint
        remote = stack.enter_context(RemoteEagle3TargetModel.from_urls([url], device="cpu"))
        assert remote.model_info()["model"] == "stub"
