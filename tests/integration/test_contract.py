"""The seed's contract, over real sockets."""

from __future__ import annotations

import concurrent.futures
import itertools
import threading
from typing import Any

import pytest
import torch

from broker.protocol import messages as m
from broker.service import Broker
from tests.integration.conftest import LENGTH, VOCAB, Cluster, make_target, tokens
from tests.vocab import shuffled
from tests.waiting import eventually
from trainer_client import Prefetcher, RemoteEagle3TargetModel
from trainer_client.errors import BadRequestError, ClientClosedError, DeadlineError
from trainer_client.targets.batch import Eagle3TargetBatch
from worker.service import Worker
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_supervision
from worker.targets.contract import TargetOutputs
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.stub import StubTarget


def assert_is_supervision(
    batch: Eagle3TargetBatch,
    target: HuggingFaceTarget,
    mapping: VocabMapping,
    encoding: str,
    seed: int,
) -> None:
    expected = compute_supervision(target, *tokens(seed), mapping=mapping, encoding=encoding)
    for name, tensor in expected.items():
        assert torch.equal(getattr(batch, name), tensor), name


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_a_batch_has_the_bits_of_a_colocated_target(
    cluster: Cluster, target: HuggingFaceTarget, mapping: VocabMapping, encoding: str
) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping, encoding=encoding)
    assert_is_supervision(remote.generate_batch(*tokens(7)), target, mapping, encoding, 7)


def test_model_info_embeddings_and_lm_head_rows(
    cluster: Cluster, target: HuggingFaceTarget, mapping: VocabMapping
) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping)
    info = remote.model_info()
    assert info["num_hidden_layers"] == 8
    assert info["hidden_size"] == 32
    assert info["vocab_size"] == VOCAB
    assert info["aux_layer_ids"] == [1, 3, 4]
    assert info["model"] == "tiny"
    weight = target.get_input_embeddings().weight
    assert torch.equal(remote.get_input_embeddings().weight, weight)
    assert remote.get_input_embeddings() is remote.get_input_embeddings()  # fetched once
    head = target.model.lm_head.weight[mapping.selected_token_ids]
    assert torch.equal(remote.lm_head_rows().weight, head)


def test_lm_head_rows_follow_the_mapping(cluster: Cluster, target: HuggingFaceTarget) -> None:
    cluster.worker()
    one, two = (VocabMapping(torch.tensor(ids), VOCAB) for ids in ([1, 2], [3, 4, 5]))
    remote = cluster.trainer(one)
    assert remote.lm_head_rows().weight.shape == (2, 32)
    remote.set_vocab_mapping(two.selected_token_ids, two.selected_token_mask)
    assert torch.equal(remote.lm_head_rows().weight, target.model.lm_head.weight[[3, 4, 5]])


def test_handles_are_futures(cluster: Cluster, mapping: VocabMapping) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping)
    assert remote.supports_async
    called = threading.Event()
    handle = remote.generate_batch_async(*tokens())
    handle.add_done_callback(lambda done: called.set())
    assert handle.result(timeout=20).target_probs is not None
    assert called.wait(5)
    assert not handle.cancel()  # it has ended


def test_to_trainer_inputs_are_the_contracts(cluster: Cluster, mapping: VocabMapping) -> None:
    cluster.worker()
    inputs = cluster.trainer(mapping).generate_batch(*tokens()).to_trainer_inputs()
    assert set(inputs) == {
        "input_ids",
        "attention_mask",
        "loss_mask",
        "aux_hidden_states",
        "target_probs",
        "position_mask",
    }


def test_a_callers_patience_is_not_the_requests_end(
    cluster: Cluster, mapping: VocabMapping
) -> None:
    worker = cluster.worker()
    remote = cluster.trainer(mapping)
    remote.model_info()
    worker.stop()
    handle = remote.generate_batch_async(*tokens())
    with pytest.raises(TimeoutError):
        handle.result(timeout=0.05)
    cluster.worker()
    assert handle.result(timeout=20).input_ids.shape == (2, 16)


def test_a_cancelled_request_ends_at_once_and_leaves_nothing(
    cluster: Cluster, mapping: VocabMapping
) -> None:
    worker = cluster.worker()
    remote = cluster.trainer(mapping)
    worker.stop()
    handle = remote.generate_batch_async(*tokens())
    assert handle.cancel()
    with pytest.raises(concurrent.futures.CancelledError):
        handle.result()
    cluster.worker()
    remote.generate_batch(*tokens())
    assert cluster.broker.snapshot()["counters"]["requests"] <= 3


def test_threads_share_a_client_and_ranks_share_workers_without_mixing(
    cluster: Cluster, target: HuggingFaceTarget, mapping: VocabMapping
) -> None:
    for _ in range(2):
        cluster.worker(make_target())
    remotes = [cluster.trainer(mapping, rank=rank, job="job") for rank in range(2)]

    def ask(seed: int) -> None:
        batch = remotes[seed % 2].generate_batch(*tokens(seed))
        assert_is_supervision(batch, target, mapping, "probs", seed)

    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(ask, range(40)))


def test_two_jobs_with_different_mappings_share_a_worker(
    cluster: Cluster, target: HuggingFaceTarget
) -> None:
    cluster.worker()
    mappings = [VocabMapping(shuffled(torch.arange(start, VOCAB, 3)), VOCAB) for start in (0, 1)]
    remotes = [cluster.trainer(mapping) for mapping in mappings]
    for seed in range(6):
        remote, mapping = remotes[seed % 2], mappings[seed % 2]
        assert_is_supervision(remote.generate_batch(*tokens(seed)), target, mapping, "probs", seed)


def test_closing_a_client_stops_nobody_else(cluster: Cluster, mapping: VocabMapping) -> None:
    cluster.worker()
    one, two = cluster.trainer(mapping), cluster.trainer(mapping)
    one.generate_batch(*tokens())
    one.close()
    one.close()  # twice is fine
    two.generate_batch(*tokens())
    with pytest.raises(ClientClosedError):
        one.generate_batch(*tokens())


def test_the_prefetcher_yields_in_order_and_counts_waiting(
    cluster: Cluster, target: HuggingFaceTarget, mapping: VocabMapping
) -> None:
    for _ in range(2):
        cluster.worker(make_target())
    remote = cluster.trainer(mapping)

    class Sample:
        def __init__(self, seed: int) -> None:
            self.seed = seed
            self.input_ids, self.attention_mask, self.loss_mask = tokens(seed)

    prefetcher = Prefetcher(remote, map(Sample, range(12)))
    seen = []
    for sample, batch in prefetcher:
        seen.append(sample.seed)
        assert_is_supervision(batch, target, mapping, "probs", sample.seed)
    assert seen == list(range(12))
    assert prefetcher.waited_s > 0
    assert prefetcher.depth >= 1
    assert remote.window == cluster.broker.core.config.window


def test_leaving_a_prefetcher_early_cancels_what_is_under_way(
    cluster: Cluster, mapping: VocabMapping
) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping)

    class Sample:
        input_ids, attention_mask, loss_mask = tokens()

    held, calls = threading.Event(), itertools.count()
    forward = cluster.target.forward

    def slow(*ids: torch.Tensor) -> TargetOutputs:
        if next(calls):  # all but the first, which the iterator shall give
            held.wait(20)
        return forward(*ids)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster.target, "forward", slow)
        iterator = iter(Prefetcher(remote, [Sample()] * 10, depth=4))
        try:
            next(iterator)
            eventually(lambda: len(cluster.broker.core.entries) == 4)
            iterator.close()
            eventually(lambda: len(cluster.broker.core.entries) == 0)
        finally:
            held.set()
    remote.generate_batch(*tokens())  # nothing is in the way
    assert remote.counters()["replies"] <= 3


def test_a_reply_larger_than_a_frame_arrives_whole(cluster: Cluster) -> None:
    cluster.worker()
    every = VocabMapping(shuffled(torch.arange(VOCAB)), VOCAB)
    remote = cluster.trainer(every)
    batch = remote.generate_batch(*tokens(3, batch=40, length=LENGTH))  # 2.6 MB of target_probs
    expected = compute_supervision(
        cluster.target, *tokens(3, batch=40, length=LENGTH), mapping=every, encoding="probs"
    )
    assert torch.equal(batch.target_probs, expected["target_probs"])


def test_over_ipc(target: HuggingFaceTarget, mapping: VocabMapping, tmp_path: object) -> None:
    from broker.service import Broker
    from worker.service import Worker

    ends = [f"ipc://{tmp_path}/{side}" for side in ("clients", "workers")]
    with (
        Broker(*ends) as broker,
        Worker(target, broker.worker_endpoint),
        RemoteEagle3TargetModel([broker.client_endpoint], timeout=20) as remote,
    ):
        remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
        assert remote.generate_batch(*tokens()).target_probs is not None


def test_a_failure_code_has_an_exception_of_its_kind() -> None:
    from trainer_client.errors import RequestError, request_error

    for code in m.FAILURE_CODES:
        error = request_error(code, "why")
        assert isinstance(error, RequestError)
        assert (error.code, str(error)) == (code, "why")
    assert isinstance(request_error("bad_request", ""), BadRequestError)


class Colocated:
    """NeMo AutoModel's side of the contract, and nothing else."""

    def __init__(self, inner: StubTarget) -> None:
        self._inner = inner
        self.model, self.aux_layer_ids = inner.model, list(inner.aux_layer_ids)

    def get_input_embeddings(self) -> Any:
        return self._inner.get_input_embeddings()

    def generate_batch(self, *, input_ids: Any, attention_mask: Any, loss_mask: Any) -> Any:
        return self._inner.generate_batch(input_ids, attention_mask, loss_mask)


def test_a_worker_serves_any_object_with_the_colocated_contract() -> None:
    inner = StubTarget()
    ids = torch.arange(12).view(2, 6)
    with Broker() as broker, Worker(Colocated(inner), broker.worker_endpoint, model="theirs"):
        url = broker.client_endpoint
        with RemoteEagle3TargetModel.from_urls([url], device="cpu", timeout=20) as remote:
            assert remote.model_info()["model"] == "theirs"
            assert remote.num_remote_servers >= 1
            mapping = VocabMapping(shuffled(torch.arange(0, 64, 2)), 64)
            remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
            got = remote.generate_batch(ids, torch.ones_like(ids), torch.ones_like(ids))
            outputs = inner.forward(ids, torch.ones_like(ids), torch.ones_like(ids))
            assert torch.equal(got.aux_hidden_states, outputs.aux_hidden_states)


def test_errors_when_retries_are_over_are_what_nemo_expects() -> None:
    assert issubclass(DeadlineError, RuntimeError)
    assert issubclass(DeadlineError, TimeoutError)
