"""What NeMo AutoModel's own tests ask of a remote target, asked of ours over real sockets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from broker.core import BrokerConfig
from broker.service import Broker
from tests.integration.conftest import VOCAB, make_target
from tests.trainer_client.nemo import standin
from tests.vocab import shuffled
from tests.waiting import eventually
from trainer_client import RemoteEagle3TargetModel
from worker.service import Worker
from worker.supervision.mapping import VocabMapping
from worker.targets.huggingface import HuggingFaceTarget

TOTAL, PAD = 32, 3
MAPPING = VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)
OTHER = VocabMapping(shuffled(torch.arange(1, VOCAB, 3), 1), VOCAB)
BASE = SimpleNamespace(hidden_size=32, vocab_size=VOCAB, num_hidden_layers=8)


class Seeing(HuggingFaceTarget):
    """Keeps how long the rows were that it saw."""

    lengths: list[int]

    def forward(self, input_ids: Tensor, *masks: Any, **more: Any) -> Any:
        self.__dict__.setdefault("lengths", []).append(input_ids.shape[1])
        return super().forward(input_ids, *masks, **more)


@pytest.fixture(scope="module")
def target() -> Seeing:
    return Seeing(make_target().model, name="tiny")


@pytest.fixture
def nemo(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    standin.install(monkeypatch)
    import trainer_client.nemo

    return trainer_client.nemo


@pytest.fixture
def broker() -> Iterator[Broker]:
    config = BrokerConfig(heartbeat_s=0.2, liveness_s=2.0, model_grace_s=0.5)
    with Broker("tcp://127.0.0.1:0", "tcp://127.0.0.1:0", "127.0.0.1:0", config) as made:
        yield made


@pytest.fixture
def url(broker: Broker, target: Seeing) -> Iterator[str]:
    with Worker(target, broker.worker_endpoint):
        yield broker.client_endpoint


def connect(nemo: ModuleType, url: str, mapping: VocabMapping = MAPPING, **options: Any) -> Any:
    made = nemo.BrokerTarget.from_urls([url], device="cpu", timeout=20, max_retries=0, **options)
    made.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
    return made


def batch(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two rows as NeMo's loader has them: padded to ``TOTAL``, the loss on the last half."""
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(8, 20, (2, 1), generator=draw)
    at = torch.arange(TOTAL)
    attention = (at < lengths).long()
    ids = torch.randint(0, VOCAB, (2, TOTAL), generator=draw)
    return ids.where(attention.bool(), PAD), attention, attention * (at >= lengths // 2)


def colocated(target: HuggingFaceTarget, mapping: VocabMapping, seed: int) -> dict[str, Tensor]:
    """NeMo's own arithmetic: full logits of the padded rows, shifted, projected by the trainer."""
    ids, attention, loss = batch(seed)
    given = target.generate_batch(ids, attention, loss)
    selected = given.logits.index_select(-1, mapping.selected_token_ids)
    known = mapping.selected_token_mask[given.logits.argmax(-1)] & given.loss_mask.bool()
    return {
        "aux_hidden_states": given.aux_hidden_states,
        "target_probs": torch.softmax(selected.float(), dim=-1),
        "position_mask": known.unsqueeze(-1),
        "input_ids": given.input_ids,
        "loss_mask": given.loss_mask,
        "attention_mask": attention,
    }


def assert_supervision(got: Any, wanted: dict[str, Tensor]) -> None:
    """Equal bits wherever a row has tokens, and everywhere in what is not the target's."""
    used = wanted["attention_mask"].bool()
    for name, tensor in wanted.items():
        came = getattr(got, name)
        assert came.shape == tensor.shape, name
        if name in ("aux_hidden_states", "target_probs"):
            came, tensor = came[used], tensor[used]
        assert torch.equal(came, tensor), name


def test_it_is_a_backend_of_nemos_kind_and_so_is_the_plain_client(
    nemo: ModuleType, url: str
) -> None:
    with connect(nemo, url) as made, RemoteEagle3TargetModel([url]) as plain:
        assert isinstance(made, standin.Eagle3TargetBackend)
        assert isinstance(plain, standin.Eagle3TargetBackend)
        assert made.supports_async
        assert isinstance(made.generate_batch(*batch()), standin.Eagle3TargetBatch)


def test_a_batch_is_the_colocated_targets_and_sync_and_async_are_one(
    nemo: ModuleType, url: str, target: Seeing
) -> None:
    with connect(nemo, url) as made:
        sync = made.generate_batch(*batch(3))
        asynchronous = made.generate_batch_async(*batch(3)).result(timeout=30)
    for got in (sync, asynchronous):
        assert got.logits is None
        assert set(got.to_trainer_inputs()) == set(colocated(target, MAPPING, 3))
        assert_supervision(got, colocated(target, MAPPING, 3))


def test_model_info_and_embeddings_are_the_targets(
    nemo: ModuleType, url: str, target: Seeing
) -> None:
    with connect(nemo, url) as made:
        info = made.model_info()
        assert (info["num_hidden_layers"], info["vocab_size"]) == (8, VOCAB)
        assert info["aux_layer_ids"] == [1, 3, 4]
        assert torch.equal(made.get_input_embeddings().weight, target.get_input_embeddings().weight)


@pytest.mark.parametrize("trim", ["exact", "fast", "off"])
def test_padding_is_not_sent_back_and_with_fast_not_computed(
    nemo: ModuleType, url: str, target: Seeing, trim: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[int] = []
    plain = RemoteEagle3TargetModel._batch

    def keep(self: Any, answer: Any, *others: Any) -> Any:
        came.append(answer.tensors["target_probs"].shape[1])
        return plain(self, answer, *others)

    monkeypatch.setattr(RemoteEagle3TargetModel, "_batch", keep)
    ids, attention, loss = batch(1)
    longest = int(attention.sum(1).max())
    target.lengths = []
    with connect(nemo, url, trim=trim) as made:
        got = made.generate_batch(ids, attention, loss)
    assert came == [TOTAL if trim == "off" else longest]
    assert target.lengths == [longest if trim == "fast" else TOTAL]
    wanted = colocated(target, MAPPING, 1)
    if trim != "fast":
        return assert_supervision(got, wanted)
    used = attention.bool()
    close = torch.allclose(got.aux_hidden_states[used], wanted["aux_hidden_states"][used])
    assert close
    assert torch.equal(got.input_ids, wanted["input_ids"])
    return None


def test_hidden_states_are_multiplied_here_to_about_the_same_probabilities(
    nemo: ModuleType, url: str, target: Seeing
) -> None:
    wanted = colocated(target, MAPPING, 2)
    with connect(nemo, url, encoding="hidden") as made:
        got = made.generate_batch(*batch(2))
    used = wanted["attention_mask"].bool()
    off = (got.target_probs[used] - wanted["target_probs"][used]).abs().max()
    assert off < 1e-6
    assert torch.equal(got.position_mask, wanted["position_mask"])


def test_the_plain_clients_encodings_that_nemo_cannot_learn_from_are_refused(
    nemo: ModuleType,
) -> None:
    for option, value in (("encoding", "topk"), ("encoding", "auto"), ("trim", "all")):
        with pytest.raises(ValueError, match=f"remote_{option} is '{value}'; choose"):
            nemo.BrokerTarget.from_urls(["tcp://127.0.0.1:1"], device="cpu", **{option: value})


def test_no_url_and_no_mapping_are_named(nemo: ModuleType, url: str) -> None:
    with pytest.raises(ValueError, match="at least one broker endpoint"):
        nemo.BrokerTarget.from_urls([], device="cpu")
    with (
        nemo.BrokerTarget.from_urls([url], device="cpu", timeout=20) as made,
        pytest.raises(RuntimeError, match="no vocab mapping is set"),
    ):
        made.generate_batch(*batch())


def test_two_runs_with_two_mappings_share_the_workers(
    nemo: ModuleType, url: str, target: Seeing
) -> None:
    with connect(nemo, url) as one, connect(nemo, url, OTHER) as two:
        for seed in range(4):
            assert_supervision(one.generate_batch(*batch(seed)), colocated(target, MAPPING, seed))
            assert_supervision(two.generate_batch(*batch(seed)), colocated(target, OTHER, seed))


def test_what_is_under_way_keeps_the_mapping_that_it_was_asked_with(
    nemo: ModuleType, url: str, target: Seeing
) -> None:
    with connect(nemo, url) as made:
        handle = made.generate_batch_async(*batch())
        made.set_vocab_mapping(OTHER.selected_token_ids, OTHER.selected_token_mask)
        assert_supervision(handle.result(20), colocated(target, MAPPING, 0))
        assert_supervision(made.generate_batch(*batch()), colocated(target, OTHER, 0))


def test_concurrent_requests_get_their_own_tensors(
    nemo: ModuleType, url: str, target: Seeing
) -> None:
    wrong: list[int] = []
    with connect(nemo, url) as made:

        def ask(seed: int) -> None:
            try:
                assert_supervision(made.generate_batch(*batch(seed)), wanted[seed])
            except BaseException:
                wrong.append(seed)
                raise

        wanted = [colocated(target, MAPPING, seed) for seed in range(8)]
        threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_a_request_outlives_its_worker_and_the_broker(
    nemo: ModuleType, broker: Broker, target: Seeing
) -> None:
    ends = (broker.client_endpoint, broker.worker_endpoint)
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(Worker(target, ends[1]))
        made = stack.enter_context(connect(nemo, ends[0]))
        worker.stop()
        handle = made.generate_batch_async(*batch())
        broker.stop()
        stack.enter_context(Broker(*ends, "127.0.0.1:0"))
        stack.enter_context(Worker(target, ends[1]))
        assert_supervision(handle.result(20), colocated(target, MAPPING, 0))


def test_retries_that_are_over_are_a_runtime_error(
    nemo: ModuleType, broker: Broker, target: Seeing
) -> None:
    with Worker(target, broker.worker_endpoint) as worker:
        made = nemo.BrokerTarget.from_urls(
            [broker.client_endpoint], device="cpu", timeout=0.5, max_retries=1
        )
        with made:
            made.set_vocab_mapping(MAPPING.selected_token_ids, MAPPING.selected_token_mask)
            worker.stop()
            with pytest.raises(RuntimeError):
                made.generate_batch(*batch())


# -- the recipe -----------------------------------------------------------------------------------


def recipe_of(nemo: ModuleType, url: str, rank: int = 0, **more: Any) -> Any:
    args = {
        "target_model_backend": "remote",
        "remote_urls": [url],
        "remote_timeout": 20,
        "output_dir": "runs/one",
        "target_prefetch_depth": 4,
    }
    return nemo.TrainEagle3Recipe(args | more, rank)


def set_up(made: Any, mapping: VocabMapping = MAPPING) -> Any:
    made.setup(BASE, mapping.selected_token_ids, mapping.selected_token_mask)
    return made


def loader(n_batches: int) -> Iterator[dict[str, Tensor]]:
    names = ("input_ids", "attention_mask", "loss_mask")
    return (dict(zip(names, batch(seed), strict=True)) for seed in range(n_batches))


def test_the_recipe_prefetches_in_order_and_as_deep_as_it_was_told(
    nemo: ModuleType, url: str, target: Seeing
) -> None:
    made = set_up(recipe_of(nemo, url))
    with made.target_wrapper as remote:
        assert made.target_prefetch_depth == 4  # not the number of urls
        under_way: list[int] = []
        ask = remote.generate_batch_async

        def counted(*tensors: Tensor) -> Any:
            counters = remote.counters()
            under_way.append(1 + counters["requests"] - counters["replies"])
            return ask(*tensors)

        remote.generate_batch_async = counted
        for seed, (_, got) in enumerate(made._prefetched_batches(loader(9))):
            assert_supervision(got, colocated(target, MAPPING, seed))
        assert seed == 8
        assert max(under_way) <= 4


def test_leaving_the_loop_early_leaves_nothing_behind(
    nemo: ModuleType, url: str, broker: Broker, target: Seeing
) -> None:
    made = set_up(recipe_of(nemo, url))
    with made.target_wrapper as remote:
        batches = made._prefetched_batches(loader(9))
        next(batches)
        batches.close()
        assert_supervision(remote.generate_batch(*batch(5)), colocated(target, MAPPING, 5))
        eventually(lambda: not sum(broker.snapshot()["places"].values()))


def test_closing_leaves_workers_and_other_runs_alone(
    nemo: ModuleType, url: str, target: Seeing
) -> None:
    one, two = (set_up(recipe_of(nemo, url)) for _ in range(2))
    one.target_wrapper.close()
    with two.target_wrapper as remote:
        assert_supervision(remote.generate_batch(*batch()), colocated(target, MAPPING, 0))


def test_the_broker_knows_the_ranks_of_a_run_apart(
    nemo: ModuleType, url: str, broker: Broker
) -> None:
    with contextlib.ExitStack() as stack:
        for rank in range(2):
            stack.enter_context(set_up(recipe_of(nemo, url, rank)).target_wrapper)
        clients = broker.snapshot()["clients"]
        assert sorted(client["rank"] for client in clients) == [0, 1]
        assert {client["job"] for client in clients} == {str(Path("runs/one").absolute())}


def test_a_resumed_run_has_the_mapping_of_its_checkpoint(
    nemo: ModuleType, url: str, target: Seeing, tmp_path: Path
) -> None:
    before = set_up(recipe_of(nemo, url), OTHER)
    before._save_extra_state(str(tmp_path), 1)
    before.target_wrapper.close()
    after = set_up(recipe_of(nemo, url), MAPPING)
    with after.target_wrapper as remote:
        after._load_extra_state(str(tmp_path))
        assert_supervision(remote.generate_batch(*batch()), colocated(target, OTHER, 0))


def test_a_run_is_not_resumed_with_another_target(
    nemo: ModuleType, url: str, tmp_path: Path
) -> None:
    before = set_up(recipe_of(nemo, url))
    before._save_extra_state(str(tmp_path), 1)
    before.target_wrapper.close()
    with Broker() as other, Worker(make_target(seed=1), other.worker_endpoint):
        after = set_up(recipe_of(nemo, other.client_endpoint))
        with (
            after.target_wrapper,
            pytest.raises(ValueError, match=r"trained for another target: fingerprint was w\w+"),
        ):
            after._load_extra_state(str(tmp_path))


@pytest.mark.parametrize(
    ("base", "args", "says"),
    [
        ({"hidden_size": 64}, {}, r"has hidden_size 64, the workers' model 'tiny' has 32; serve"),
        ({"num_hidden_layers": 9}, {}, "has num_hidden_layers 9"),
        ({}, {"aux_layer_ids": [2, 3, 4]}, r"serve layers \[1, 3, 4\]; start them with --aux-lay"),
        ({}, {"remote_tiemout": 3}, "has remote_tiemout, which nobody reads; known are"),
        ({}, {"remote_urls": ["http://127.0.0.1:8001"]}, "tcp://"),
        ({}, {"remote_urls": None}, "needs recipe_args.remote_urls"),
        ({}, {"target_model_backend": "colocated"}, "say target_model_backend: remote"),
    ],
)
def test_what_does_not_fit_the_workers_is_said_before_a_step(
    nemo: ModuleType, url: str, base: dict[str, Any], args: dict[str, Any], says: str
) -> None:
    made = recipe_of(nemo, url, **args)
    with pytest.raises(Exception, match=says):
        made.setup(
            SimpleNamespace(**(vars(BASE) | base)),
            MAPPING.selected_token_ids,
            MAPPING.selected_token_mask,
        )


def test_keys_and_all_other_settings_reach_the_client(nemo: ModuleType) -> None:
    from trainer_client.nemo.settings import remote_options

    given = {
        "remote_url": "tcp://a:1",
        "remote_timeout": 7,
        "remote_max_retries": 1,
        "remote_model": "m",
        "remote_encoding": "hidden",
        "remote_trim": "fast",
        "remote_job": "night",
        "remote_key": "/keys/trainer.secret",
        "remote_broker_key": ["k1", "k2"],
        "remote_direct": "off",
        "seq_length": 5,
    }
    assert remote_options(given, rank=3) == {
        "urls": ["tcp://a:1"],
        "timeout": 7.0,
        "max_retries": 1,
        "model": "m",
        "encoding": "hidden",
        "trim": "fast",
        "job": "night",
        "key": "/keys/trainer.secret",
        "broker_key": ["k1", "k2"],
        "direct": "off",
        "rank": 3,
    }
