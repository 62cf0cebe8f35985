"""Wishes over real sockets: the very rows that a co-located target gives, and nothing more."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import worker.answers
from broker.protocol.wish import parse_wish
from tests.integration.conftest import LENGTH, VOCAB, Cluster, make_target, tokens
from tests.integration.test_training import assert_same, run, settings
from trainer_client.errors import BadRequestError, IdentityError
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.targets.wished import TargetSupervision
from worker.answers import description
from worker.direct.config import DirectConfig
from worker.supervision.mapping import VocabMapping
from worker.targets.contract import describe
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget

#: The wish of each family of drafts, for a target of 8 layers.
FAMILIES = {
    "EAGLE-3": "layers=1,3,4;last",
    "EAGLE-3 in fp8": "layers=1,3,4;last;states=fp8",
    "EAGLE-3 where it counts": "layers=1,3,4;last;at=loss",
    "EAGLE-3 of the top": "layers=1,3,4;topk=8",
    "EAGLE-3 of 5 layers": "layers=1,2,3,4,5;last",
    "DFlash": "layers=1,2,3,4,5",
    "DFlash with KL": "layers=1,2,3,4,5;last;at=loss",
    "DSpark over the draft vocabulary": "layers=1,2,3,4,5;probs;at=loss",
    "DSpark of 6 layers": "layers=1,2,3,4,5,6;last",
    "MTP": "last",
    "MTP in fp8": "last=fp8",
    "speculators": "layers=1,3,4,7",
    "embeddings too": "layers=-1,7",
    "a rank of a sequence": "layers=1,3;last;rows=5-11",
}
LENGTHS = torch.tensor([3, 16, 1, 9])


def packed(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``input_ids`` and ``loss_mask`` [N]."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (int(LENGTHS.sum()),), generator=draw)
    return ids, torch.randint(0, 2, ids.shape, generator=draw)


def rows(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids, mask, _ = tokens(seed)
    draw = torch.Generator().manual_seed(seed)
    return ids, mask, torch.randint(0, 2, ids.shape, generator=draw)


def assert_equal(one: TargetSupervision, other: TargetSupervision) -> None:
    ours, theirs = one._tensors(), other._tensors()
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype
        assert torch.equal(tensor, theirs[name]), name


@pytest.fixture
def alone(target: HuggingFaceTarget, mapping: VocabMapping) -> ColocatedTarget:
    made = ColocatedTarget(target)
    made.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
    return made


@pytest.mark.parametrize("wish", FAMILIES.values(), ids=FAMILIES)
def test_each_familys_wish_has_the_bits_of_a_colocated_target(
    cluster: Cluster, alone: ColocatedTarget, mapping: VocabMapping, wish: str
) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping)
    assert_equal(remote.supervise(wish, *rows(1)).result(), alone.supervise(wish, *rows(1)))
    ids, loss_mask = packed(2)
    got = remote.supervise(wish, ids, loss_mask=loss_mask, lengths=LENGTHS)
    expected = alone.supervise(wish, ids, loss_mask=loss_mask, lengths=LENGTHS)
    assert_equal(got.result(), expected)


@pytest.mark.parametrize("backend", ["gloo", "shm"])
def test_fp8_comes_directly_too(
    cluster: Cluster, alone: ColocatedTarget, mapping: VocabMapping, backend: str
) -> None:
    direct = DirectConfig(mode=backend, address="127.0.0.1", min_bytes=1)
    cluster.worker(direct=direct)
    remote = cluster.trainer(mapping, direct=direct)
    wish = FAMILIES["EAGLE-3 in fp8"]
    expected = alone.supervise(wish, *rows(3))
    while remote.counters()["direct"] < 3:
        assert_equal(remote.supervise(wish, *rows(3)).result(), expected)


def test_a_worker_measures_what_fp8_costs_in_the_first_batch_of_a_wish(cluster: Cluster) -> None:
    worker = cluster.worker()
    remote = cluster.trainer()
    for _ in range(3):
        remote.supervise("layers=1,3;last=fp8;states=fp8", *rows(0)).result()
    errors = worker.measures.plain()["fp8_errors"]
    assert set(errors) == {"states", "last"}
    assert all(0.01 < error < 0.04 for error in errors.values())


def test_no_mapping_is_needed_where_nothing_is_over_a_vocabulary(cluster: Cluster) -> None:
    cluster.worker()
    remote = cluster.trainer()
    assert remote.supervise("layers=1;last", *rows(0)).result().states is not None
    with pytest.raises(BadRequestError, match="call set_vocab_mapping"):
        remote.supervise("topk=3", *rows(0))


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("layers=8", "layers 8 are asked for, and target 'tiny' with its 8 layers gives -1 to 7"),
        ("layers=1;rows=9-17", "rows=9-17 is asked for, and there are 16 positions"),
    ],
)
def test_what_no_worker_gives_is_refused_before_it_is_sent(
    cluster: Cluster, wish: str, says: str
) -> None:
    cluster.worker()
    remote = cluster.trainer()
    with pytest.raises(BadRequestError, match=says):
        remote.supervise(wish, *rows(0))


@pytest.mark.parametrize(
    ("lengths", "says"),
    [
        ([3, 16], "lengths add up to 19, and there are 29 tokens"),
        ([0, 29], "a document has 0 tokens"),
        ([], "there are no documents"),
        ([29 + LENGTH], "add up to"),
    ],
)
def test_documents_that_are_not_the_tokens_are_refused(
    cluster: Cluster, lengths: list[int], says: str
) -> None:
    cluster.worker()
    remote = cluster.trainer()
    ids, _ = packed(0)
    with pytest.raises(BadRequestError, match=says):
        remote.supervise("last", ids, lengths=torch.tensor(lengths, dtype=torch.int64))


def test_a_worker_of_fixed_layers_says_which(cluster: Cluster, target: HuggingFaceTarget) -> None:
    cluster.worker(ForeignTarget(target, "tiny"))
    remote = cluster.trainer()
    assert remote.model_info()["layers"] == [1, 3, 4]
    assert remote.supervise("layers=1,4", *rows(0)).result().states is not None
    with pytest.raises(BadRequestError, match="with its 8 layers gives 1, 3, 4"):
        remote.supervise("layers=1,2", *rows(0))


def test_another_engine_is_another_offer(target: HuggingFaceTarget) -> None:
    said = description(describe(target))
    assert said.engine.startswith("transformers ")
    others: list[dict[str, Any]] = [{"engine": "vllm 0.32.0"}, {"layers": (1, 2)}]
    for changed in others:
        assert replace(said, **changed).offer != said.offer


@pytest.mark.parametrize("wish", ["probs", "layers=1,3;last"])
def test_tensors_of_another_shape_are_not_used(
    cluster: Cluster, mapping: VocabMapping, monkeypatch: pytest.MonkeyPatch, wish: str
) -> None:
    """A worker that does not look at what it sends, or lies."""
    monkeypatch.setattr("worker.answers.check_shapes", lambda got, wanted: None)
    real = worker.answers.compute

    def narrower(*args: Any, **named: Any) -> dict[str, torch.Tensor]:
        made = real(*args, **named)
        name = next(iter(made))
        return made | {name: made[name][:, :-1]}

    monkeypatch.setattr("worker.answers.compute", narrower)
    cluster.worker()
    remote = cluster.trainer(mapping, encoding="probs")
    ask = remote.generate_batch_async if wish == "probs" else partial(remote.supervise, wish)
    with pytest.raises(IdentityError, match=r"gave .* of shape .* was expected; nothing of it was"):
        ask(*rows(0)).result()


@pytest.mark.parametrize("wish", ["layers=1,3,4;last;states=fp8", "layers=0,3,6;probs;at=loss"])
def test_a_draft_trained_with_a_wish_has_the_bits_of_the_same_colocated(
    cluster: Cluster, tmp_path: Path, wish: str
) -> None:
    wanted = settings(tmp_path, "alone", max_steps=12)
    run(ColocatedTarget(make_target(), wish), wanted)
    cluster.worker(make_target())
    remote = cluster.trainer(encoding=wish)
    assert_same(wanted.output, run(remote, settings(tmp_path, "through", max_steps=12)))
    assert remote.model_info()["aux_layer_ids"] == list(parse_wish(wish).layers)


def test_every_wish_keeps_its_rows_through_faults(
    cluster: Cluster, alone: ColocatedTarget, mapping: VocabMapping
) -> None:
    """Many wishes at once, while workers leave and come and the broker is started again."""
    workers = [cluster.worker(make_target()) for _ in range(2)]
    remote = cluster.trainer(mapping, timeout=60)
    asked = [(wish, seed) for seed in range(6) for wish in FAMILIES.values()]
    handles = []

    def ask() -> None:
        for wish, seed in asked:
            ids, loss_mask = packed(seed)
            handles.append(remote.supervise(wish, *rows(seed)))
            handles.append(remote.supervise(wish, ids, loss_mask=loss_mask, lengths=LENGTHS))

    asking = threading.Thread(target=ask)
    asking.start()
    workers[0].stop()
    cluster.worker(make_target())
    old = cluster.broker
    ends = old.client_endpoint, old.worker_endpoint
    old.stop()
    cluster.broker = cluster.start_broker(*ends)
    asking.join()
    for at, (wish, seed) in enumerate(asked):
        ids, loss_mask = packed(seed)
        assert_equal(handles[2 * at].result(), alone.supervise(wish, *rows(seed)))
        expected = alone.supervise(wish, ids, loss_mask=loss_mask, lengths=LENGTHS)
        assert_equal(handles[2 * at + 1].result(), expected)
