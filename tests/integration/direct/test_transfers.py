"""Direct transfers when nothing fails: what is asked for is what comes, and nothing stays."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import pytest
import torch

from tests.integration.conftest import Cluster, make_target, tokens
from tests.waiting import eventually
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.direct.config import DirectConfig
from worker.service import Worker
from worker.supervision.mapping import VocabMapping
from worker.targets.huggingface import HuggingFaceTarget


@pytest.fixture
def small(backend: str) -> DirectConfig:
    """Everything goes directly."""
    return DirectConfig(mode=backend, min_bytes=1)


@pytest.fixture
def cluster(target: HuggingFaceTarget) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(target, stack)


def until_direct(remote: RemoteEagle3TargetModel, more: int = 1) -> None:
    wanted = remote.counters()["direct"] + more

    def step() -> bool:
        remote.generate_batch(*tokens())
        return remote.counters()["direct"] >= wanted

    eventually(step)


def assert_same(one: object, other: object) -> None:
    for name in ("aux_hidden_states", "target_probs", "position_mask", "input_ids", "loss_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name


def test_what_comes_directly_is_what_comes_by_wire(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    cluster.worker(direct=small)
    direct = cluster.trainer(mapping, direct=small)
    wire = cluster.trainer(mapping, direct="off")
    until_direct(direct)
    for seed in range(5):
        assert_same(direct.generate_batch(*tokens(seed)), wire.generate_batch(*tokens(seed)))
    assert direct.counters()["direct"] >= 6
    assert wire.counters()["direct"] == 0


def test_many_trainers_have_channels_with_many_workers(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    for _ in range(2):
        cluster.worker(make_target(), direct=small)
    remotes = [cluster.trainer(mapping, direct=small) for _ in range(3)]
    wire = cluster.trainer(mapping, direct="off")
    expected = [wire.generate_batch(*tokens(seed)) for seed in range(20)]

    def train(remote: RemoteEagle3TargetModel) -> None:
        handles = [remote.generate_batch_async(*tokens(seed)) for seed in range(20)]
        for handle, right in zip(handles, expected, strict=True):
            assert_same(handle.result(60), right)

    threads = [threading.Thread(target=train, args=(remote,)) for remote in remotes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for remote in remotes:
        assert remote.counters()["direct_failed"] == 0
        until_direct(remote)


def test_cancelled_transfers_leave_the_pair_in_step(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    cluster.worker(direct=small)
    remote = cluster.trainer(mapping, direct=small)
    until_direct(remote)
    for seed in range(10):
        handle = remote.generate_batch_async(*tokens(seed))
        handle.cancel()
    until_direct(remote, 3)
    assert remote.counters()["direct_failed"] == 0


def test_what_is_staged_is_let_go(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    worker = cluster.worker(direct=small)
    remote = cluster.trainer(mapping, direct=small)
    until_direct(remote, 5)
    eventually(lambda: worker._sender.staged_bytes == 0)


def test_above_the_staging_limit_replies_go_by_wire(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    cluster.worker(direct=DirectConfig(mode=small.mode, min_bytes=1, max_staged_bytes=1))
    remote = cluster.trainer(mapping, direct=small)
    for seed in range(10):
        remote.generate_batch(*tokens(seed))
    assert remote.counters()["direct"] == 0


def test_a_restarted_trainer_of_the_same_name_gets_a_channel_of_its_own(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    cluster.worker(direct=small)
    for _ in range(3):
        remote = cluster.trainer(mapping, direct=small, name="rank0")
        until_direct(remote)
        remote.close()


def test_a_restarted_worker_of_the_same_name_gets_a_channel_of_its_own(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    remote = None
    for _ in range(3):
        with Worker(cluster.target, cluster.broker.worker_endpoint, name="w0", direct=small):
            remote = remote or cluster.trainer(mapping, direct=small)
            until_direct(remote)
    assert remote is not None
    assert remote.counters()["failures"] == 0


def test_closing_ends_the_requests_and_transfers_under_way(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    worker = cluster.worker(direct=small)
    remote = cluster.trainer(mapping, direct=small)
    until_direct(remote)
    handles = [remote.generate_batch_async(*tokens(seed)) for seed in range(4)]
    remote.close()
    assert all(handle.done() for handle in handles)
    eventually(lambda: not cluster.broker.core.entries)
    eventually(lambda: worker._sender.staged_bytes == 0)
    worker.stop()


def test_the_choice_is_shown_to_operators(
    cluster: Cluster, mapping: VocabMapping, small: DirectConfig
) -> None:
    cluster.worker(direct=small)
    remote = cluster.trainer(mapping, direct=small)
    until_direct(remote)  # before there is another worker, which might be given every request
    cluster.worker(make_target(), direct=DirectConfig(mode="off"))

    def shown() -> bool:
        status = cluster.broker.snapshot()
        said = " | ".join(peer["direct"] for peer in [*status["workers"], *status["clients"]])
        return "off (--direct off)" in said and said.count("1 ready") == 2

    eventually(shown)
    assert cluster.broker.snapshot()["counters"]["direct_replies"] >= 1
