"""One client has one model for its life, whatever else brokers serve."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import pytest
import torch

from tests.integration.conftest import VOCAB, Cluster, tokens
from tests.vocab import shuffled
from tests.waiting import eventually
from trainer_client.core import ClientConfig
from trainer_client.errors import BadRequestError
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.supervision.mapping import VocabMapping
from worker.targets.stub import StubTarget

MAPPING = VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(StubTarget(vocab_size=VOCAB, name="base", seed=0), stack)


def test_brokers_with_different_models_are_an_error_before_the_first_step(
    cluster: Cluster,
) -> None:
    cluster.worker()
    with contextlib.ExitStack() as stack:
        other = Cluster(StubTarget(vocab_size=VOCAB, name="instruct", seed=1), stack)
        other.worker()
        for each in (cluster, other):
            eventually(lambda each=each: each.broker.snapshot()["workers"])
        urls = [cluster.broker.client_endpoint, other.broker.client_endpoint]
        with (
            RemoteEagle3TargetModel.from_urls(urls, device="cpu", timeout=20) as remote,
            pytest.raises(BadRequestError, match="serves other models than"),
        ):
            remote.model_info()


def test_a_run_waits_for_its_own_model_and_goes_on(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    """The base model's last worker leaves, and another model of the same name and sizes comes."""
    base = cluster.worker()
    remote = cluster.trainer(MAPPING, timeout=60, config=ClientConfig(notice_s=0.2))
    expected = remote.generate_batch(*tokens())
    base.stop()
    eventually(lambda: not cluster.broker.snapshot()["workers"])
    instruct = cluster.worker(StubTarget(vocab_size=VOCAB, name="base", seed=1))
    eventually(lambda: cluster.broker.snapshot()["workers"])
    with caplog.at_level(logging.WARNING):
        handle = remote.generate_batch_async(*tokens())
        eventually(lambda: any("serve other models just now" in said(r) for r in caplog.records))
    assert not handle.done()
    instruct.stop()
    eventually(lambda: not cluster.broker.snapshot()["workers"])
    cluster.worker()
    got = handle.result(60)
    assert torch.equal(got.target_probs, expected.target_probs)
    assert torch.equal(got.aux_hidden_states, expected.aux_hidden_states)


def said(record: logging.LogRecord) -> str:
    return str(getattr(record, "fields", {}).get("why", ""))


def test_a_second_model_does_not_end_a_run_that_named_none(cluster: Cluster) -> None:
    cluster.worker()
    remote = cluster.trainer(MAPPING)
    first = remote.generate_batch(*tokens())
    cluster.worker(StubTarget(vocab_size=VOCAB, name="second", seed=1))
    eventually(lambda: len(cluster.broker.snapshot()["workers"]) == 2)
    for _ in range(4):
        again = remote.generate_batch(*tokens())
        assert torch.equal(again.aux_hidden_states, first.aux_hidden_states)
