from __future__ import annotations

import os

import pytest

from worker.direct.channel import Channel, Failed, Open
from worker.direct.config import DirectConfig, choose, split_address

LOCAL, REMOTE = ["tcp://127.0.0.1:5556"], ["tcp://10.1.2.3:5556"]
CPU = ("shm", "gloo")


@pytest.mark.parametrize(
    ("config", "device", "brokers", "backends", "why"),
    [
        ({}, "cpu", LOCAL, CPU, "brokers on this machine"),
        ({}, "cpu", ["ipc:///tmp/x", "tcp://[::1]:1", "tcp://localhost:2"], CPU, "machine"),
        ({}, "cpu", REMOTE, (), "--direct-address auto, or an address, allows it"),
        ({}, "cpu", [*LOCAL, *REMOTE], (), "the broker at 10.1.2.3 is on a network"),
        ({"address": "10.1.2.9"}, "cpu", REMOTE, CPU, "--direct-address 10.1.2.9"),
        ({"mode": "off"}, "cpu", LOCAL, (), "--direct off"),
        ({"mode": "gloo"}, "cuda:0", LOCAL, ("gloo",), "--direct gloo"),
        ({"mode": "shm"}, "cpu", LOCAL, ("shm",), "--direct shm"),
        ({"mode": "nccl"}, "cpu", LOCAL, (), "--direct nccl cannot move tensors on cpu"),
        ({"mode": "ipc"}, "cuda:1", LOCAL, ("ipc",), "--direct ipc"),
    ],
)
def test_the_choice_says_why(
    config: dict, device: str, brokers: list[str], backends: tuple[str, ...], why: str
) -> None:
    choice = choose(DirectConfig(**config), device, brokers)
    assert choice.backends == backends
    assert why in choice.why
    assert str(choice).startswith(",".join(backends) or "off")


def test_a_gpu_comes_first_and_gloo_last() -> None:
    backends = choose(DirectConfig(), "cuda", LOCAL).backends
    assert (backends[0], backends[-1]) == ("ipc", "gloo")


@pytest.mark.parametrize("refusal", [AttributeError, PermissionError])  # not Linux, or a sandbox
def test_shared_memory_is_not_offered_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, refusal: type[Exception]
) -> None:
    def memfd_create(*_: object) -> int:
        raise refusal

    monkeypatch.setattr(os, "memfd_create", memfd_create)
    assert choose(DirectConfig(), "cpu", LOCAL).backends == ("gloo",)


def test_a_broker_that_no_way_is_known_to_is_a_sentence_and_no_traceback() -> None:
    choice = choose(DirectConfig(address="auto"), "cpu", ["tcp://no-such-host.invalid:5555"])
    assert choice.backends == ()
    assert "no way from here to the broker at no-such-host.invalid is known" in str(choice)
    assert "--direct-address ADDRESS" in str(choice)


def test_auto_takes_the_interface_that_reaches_the_broker() -> None:
    choice = choose(DirectConfig(address="auto"), "cpu", ["tcp://127.0.0.1:1", "tcp://127.0.0.9:2"])
    assert choice.address == "127.0.0.1"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"mode": "rdma"}, "direct must be one of auto, ipc, nccl, shm, gloo, off, got 'rdma'"),
        ({"ports": (9, 3)}, "FIRST-LAST within 0-65535, got 9-3"),
        ({"ports": (1, 70000)}, "got 1-70000"),
        ({"min_bytes": 0}, "min_bytes must be above 0, got 0"),
        ({"advertise": "host:port"}, "'host:port' is no HOST or HOST:PORT"),
        ({"advertise": ":90"}, "is no HOST or HOST:PORT"),
    ],
)
def test_settings_that_cannot_be_are_errors(settings: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DirectConfig(**settings)


def test_addresses_are_read_in_all_forms() -> None:
    assert split_address("gpu-7") == ("gpu-7", 0)
    assert split_address("10.0.0.7:9000") == ("10.0.0.7", 9000)
    assert split_address("[fe80::1]:9000") == ("fe80::1", 9000)


def test_the_summary_counts_channels_and_says_what_ails_them() -> None:
    channels = [Channel("a"), Channel("b")]
    channels[1].handle(Open(1), 0.0)
    channels[1].handle(Failed(1, "connection refused"), 0.0)
    choice = choose(DirectConfig(), "cpu", LOCAL)
    assert choice.summary(channels) == f"{choice}; 1 broken; 1 idle; connection refused"
