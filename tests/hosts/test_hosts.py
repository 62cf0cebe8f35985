"""Training between hosts that come, go and move has the weights of an undisturbed run.

The first two are part of ``make test``; all of them are part of ``make test-long``.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.hosts.cluster import CLIENTS, HOSTS, LIVENESS_S, PATIENCE_S, Hosts
from tests.hosts.crowd import crowd
from tests.hosts.lab import Lab, why_not
from tests.hosts.trainer import wanted
from tests.integration.conftest import make_target
from tests.integration.test_training import run, weights
from trainer_client.targets.colocated import ColocatedTarget

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts can be made here: {why_not()}"),
]
#: Longer than the broker and its peers bear with silence.
_LONG_S = 2 * LIVENESS_S
#: What the bench measures, and how much more a busy machine may take.
_SERVED_S = 10 * 1.0
_N_CLIENTS = 6


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of the same run with the target in this process."""
    directory = tmp_path_factory.mktemp("undisturbed")
    return weights(run(ColocatedTarget(make_target(), "probs"), wanted(directory / "run")))


@pytest.fixture(scope="module")
def _hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    with Lab(HOSTS) as lab:
        hosts = Hosts(lab, tmp_path_factory.mktemp("hosts"))
        try:
            yield hosts
        finally:
            hosts.close()


@pytest.fixture
def hosts(_hosts: Hosts) -> Iterator[Hosts]:
    """All hosts up and attached, and nothing wrong between them; so they are again at the end."""
    _hosts.all_there()
    yield _hosts
    _hosts.lab.heal()


@pytest.fixture
def trains(
    hosts: Hosts, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> Callable[..., None]:
    """Train with a fault in the middle, and compare the weights."""

    def through(fault: Callable[[], None], **options: object) -> None:
        hosts.train(tmp_path / "run", fault, **options)  # type: ignore[arg-type]
        found = weights(tmp_path / "run")
        assert found.keys() == undisturbed.keys()
        differing = [name for name in found if not torch.equal(found[name], undisturbed[name])]
        assert not differing

    return through


def _after(seconds: float, call: Callable[[], None]) -> None:
    """Do it later, while the trainer goes on."""
    threading.Timer(seconds, call).start()


def test_the_trainer_is_cut_off_from_the_broker_for_a_while(
    hosts: Hosts, trains: Callable[..., None]
) -> None:
    def fault() -> None:
        hosts.lab.part("trainer", "broker")
        _after(_LONG_S, hosts.lab.heal)

    trains(fault)


def test_a_worker_goes_without_a_word_and_another_comes(
    hosts: Hosts, trains: Callable[..., None]
) -> None:
    def fault() -> None:
        hosts.lab.unplug("w1")
        hosts.end("w1", "worker")

    trains(fault)
    hosts.wait_for_workers("w2")
    hosts.lab.heal()
    hosts.worker("w1")
    hosts.wait_for_workers("w1", "w2")


@pytest.mark.slow
@pytest.mark.parametrize("host", ["broker", "w1", "trainer"])
def test_a_host_gets_another_address(hosts: Hosts, trains: Callable[..., None], host: str) -> None:
    trains(lambda: hosts.lab.move(host))
    hosts.wait_for_workers("w1", "w2")


@pytest.mark.slow
@pytest.mark.parametrize("ends", [("broker", "w1"), ("w1", "broker"), ("trainer", "broker")])
def test_nothing_passes_one_way_for_a_while(
    hosts: Hosts, trains: Callable[..., None], ends: tuple[str, str]
) -> None:
    def fault() -> None:
        hosts.lab.one_way(*ends)
        _after(_LONG_S, hosts.lab.heal)

    trains(fault)
    hosts.wait_for_workers("w1", "w2")


@pytest.mark.slow
def test_packets_come_late_and_some_never(hosts: Hosts, trains: Callable[..., None]) -> None:
    ends: list[Callable[[], None]] = []
    try:
        trains(lambda: ends.append(hosts.lab.disturb("trainer", delay_s=0.02, loss=0.05)))
    finally:
        for end in ends:
            end()


@pytest.mark.slow
def test_there_is_ipv6_and_nothing_else(hosts: Hosts, trains: Callable[..., None]) -> None:
    try:
        trains(lambda: hosts.lab.use(6))
        hosts.wait_for_workers("w1", "w2")
    finally:
        hosts.lab.use(4, 6)


@pytest.mark.slow
def test_one_of_two_brokers_loses_its_name_server(
    hosts: Hosts, trains: Callable[..., None]
) -> None:
    named = f"other.test={hosts.lab.address('other')}"
    server = hosts.lab.start("router", "tests.hosts.names", named)
    hosts.broker("other")
    hosts.worker("other", name="w3", broker="127.0.0.1")
    hosts.wait_for_workers("w3", host="other")

    def fault() -> None:
        server.send_signal(signal.SIGSTOP)
        hosts.end("other", "broker")

    try:
        trains(fault, brokers=[f"tcp://broker:{CLIENTS}", f"tcp://other.test:{CLIENTS}"])
    finally:
        server.kill()
        hosts.end("other", "worker")


@pytest.mark.slow
def test_the_broker_stands_still_and_six_clients_wait(
    hosts: Hosts, trains: Callable[..., None]
) -> None:
    broker = f"tcp://{hosts.lab.address('broker')}:{CLIENTS}"
    with crowd(hosts.lab, "trainer", broker, _N_CLIENTS) as asking:

        def fault() -> None:
            hosts.signal("broker", "broker", signal.SIGSTOP)
            time.sleep(_LONG_S)
            hosts.signal("broker", "broker", signal.SIGCONT)
            assert asking.served_after_s(time.monotonic(), PATIENCE_S) < _SERVED_S

        trains(fault)
