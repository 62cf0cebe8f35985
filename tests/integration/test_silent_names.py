"""A name server that says nothing costs nobody but the broker whose name it should know."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from broker.transport import names
from tests.integration.conftest import Cluster, tokens
from tests.waiting import eventually
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.direct.config import DirectConfig
from worker.service import Worker
from worker.supervision.mapping import VocabMapping

_SILENT = "silent.test"
#: The bound for being served, ten times what it is to be, and that for closing.
_SERVED_S, _CLOSED_S = 10 * 1.0, 2.0


@pytest.fixture(autouse=True)
def silent(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No answer about one name, until the end of the test; patience with that is short."""
    over = threading.Event()
    real = names.addresses_of

    def addresses_of(host: str) -> list[str]:
        if host == _SILENT:
            over.wait()
            raise OSError("the test is over")
        return real(host)

    monkeypatch.setattr(names, "addresses_of", addresses_of)
    monkeypatch.setattr(names, "LIMIT_S", 0.5)
    yield
    over.set()


def test_the_other_broker_is_there_at_once_and_stays(
    cluster: Cluster, mapping: VocabMapping
) -> None:
    cluster.worker()
    brokers = [f"tcp://{_SILENT}:5555", cluster.broker.client_endpoint]
    began = time.monotonic()
    remote = RemoteEagle3TargetModel(brokers, timeout=20, direct=DirectConfig(address="auto"))
    try:
        remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
        remote.generate_batch(*tokens())
        assert time.monotonic() - began < _SERVED_S
        quiet, link = (remote._client.core.links[broker] for broker in brokers)

        def is_said() -> bool:
            assert link.ready
            remote.generate_batch(*tokens())
            return "no name server answers" in quiet.trouble

        eventually(is_said)
    finally:
        closing = time.monotonic()
        remote.close()
        assert time.monotonic() - closing < _CLOSED_S


def test_a_worker_serves_the_other_broker_and_leaves_at_once(
    cluster: Cluster, mapping: VocabMapping
) -> None:
    brokers = [f"tcp://{_SILENT}:5556", cluster.broker.worker_endpoint]
    began = time.monotonic()
    with Worker(cluster.target, brokers, direct=DirectConfig(address="auto")) as worker:
        eventually(lambda: not worker.trouble, _SERVED_S)
        assert time.monotonic() - began < _SERVED_S
        cluster.trainer(mapping).generate_batch(*tokens())
        closing = time.monotonic()
        worker.stop()
        assert time.monotonic() - closing < _CLOSED_S
