from __future__ import annotations

from concurrent.futures import CancelledError
from typing import Any

import pytest
import torch

from tests.vocab import shuffled
from trainer_client.targets.batch import BatchHandle, Eagle3TargetBatch, TargetBackend
from trainer_client.targets.colocated import ColocatedTarget
from worker.errors import BadRequest, TargetError
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_supervision
from worker.targets.foreign import ForeignTarget
from worker.targets.stub import StubTarget

V, D = 64, 20
MAPPING = VocabMapping(shuffled(torch.arange(2, 2 + 3 * D, 3)), V)


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ids = torch.arange(2 * 9).reshape(2, 9)
    return ids, torch.ones_like(ids), torch.ones_like(ids)


def backend(encoding: str = "probs", target: Any = None) -> ColocatedTarget:
    colocated = ColocatedTarget(target or StubTarget(vocab_size=V), encoding)
    colocated.set_vocab_mapping(MAPPING.selected_token_ids, MAPPING.selected_token_mask)
    return colocated


@pytest.mark.parametrize("encoding", ["probs", "hidden", "topk"])
def test_a_batch_is_what_a_worker_would_send(encoding: str) -> None:
    wanted = compute_supervision(
        StubTarget(vocab_size=V), *tokens(), mapping=MAPPING, encoding=encoding
    )
    batch = backend(encoding).generate_batch(*tokens())
    for name, tensor in wanted.items():
        assert torch.equal(getattr(batch, name), tensor), name
    assert torch.equal(batch.attention_mask, tokens()[1])
    assert batch.logits is None


def test_logits_are_the_whole_vocabulary_and_project_to_the_same_probs() -> None:
    batch, probs = (backend(e).generate_batch(*tokens()) for e in ("logits", "probs"))
    assert batch.logits is not None
    assert batch.logits.shape == (2, 9, V)
    projected = torch.softmax(batch.logits[..., MAPPING.selected_token_ids].float(), dim=-1)
    assert torch.equal(projected, probs.target_probs)
    assert set(batch.to_trainer_inputs()) == {
        "input_ids",
        "attention_mask",
        "loss_mask",
        "aux_hidden_states",
        "target_logits",
    }


def test_it_is_a_target_backend() -> None:
    colocated: TargetBackend = backend()
    handle: BatchHandle = colocated.generate_batch_async(*tokens())
    assert colocated.supports_async is False
    assert isinstance(handle.result(), Eagle3TargetBatch)
    colocated.close()


def test_model_info_has_the_keys_of_the_remote_one() -> None:
    info = backend().model_info()
    assert info["model"] == "stub"
    assert info["aux_layer_ids"] == [1, 3, 4]
    assert info["encodings"] == ["probs", "hidden", "topk"]
    assert (info["num_hidden_layers"], info["hidden_size"], info["vocab_size"]) == (8, 16, V)
    assert set(info) >= {"fingerprint", "dtype", "max_position_embeddings", "tokenizer", "config"}


def test_head_rows_and_embeddings_are_the_targets() -> None:
    target = StubTarget(vocab_size=V)
    rows = backend(target=target).lm_head_rows()
    assert torch.equal(rows.weight, target.lm_head[MAPPING.selected_token_ids])
    assert rows.bias is None
    assert torch.equal(backend(target=target).get_input_embeddings().weight, target.states[0])


def test_a_handle_computes_once_and_when_asked() -> None:
    target = StubTarget(vocab_size=V)
    handle = backend(target=target).generate_batch_async(*tokens())
    assert target.calls == 0
    assert handle.result() is handle.result(timeout=1)
    assert target.calls == 1
    assert not handle.cancel()


def test_a_cancelled_handle_never_computes() -> None:
    target = StubTarget(vocab_size=V)
    handle = backend(target=target).generate_batch_async(*tokens())
    assert handle.cancel()
    with pytest.raises(CancelledError):
        handle.result()
    assert target.calls == 0


def test_a_handle_whose_target_failed_may_be_asked_again() -> None:
    target = StubTarget(vocab_size=V, failures={0: RuntimeError("out of memory")})
    handle = backend(target=target).generate_batch_async(*tokens())
    with pytest.raises(RuntimeError, match="out of memory"):
        handle.result()
    assert handle.result().target_probs is not None


def test_generating_before_the_mapping_says_what_to_call() -> None:
    colocated = ColocatedTarget(StubTarget(vocab_size=V), "probs")
    for call in (lambda: colocated.generate_batch(*tokens()), colocated.lm_head_rows):
        with pytest.raises(ValueError, match="call set_vocab_mapping first"):
            call()


def test_logits_need_no_mapping() -> None:
    batch = ColocatedTarget(StubTarget(vocab_size=V), "logits").generate_batch(*tokens())
    assert batch.logits is not None


def test_a_mapping_for_another_vocabulary_is_refused_with_both_sizes() -> None:
    other = VocabMapping(shuffled(torch.arange(4)), 65)
    with pytest.raises(ValueError, match="vocabulary of 65, the target 'stub' has 64"):
        backend().set_vocab_mapping(other.selected_token_ids, other.selected_token_mask)


def test_bad_input_is_refused_as_by_a_worker() -> None:
    ids, mask, loss_mask = tokens()
    with pytest.raises(BadRequest, match=r"input_ids\[1, 8\] is 64"):
        backend().generate_batch(ids + 47, mask, loss_mask)


@pytest.mark.parametrize("encoding", ["layers=1,2;last", "hidden"])
def test_an_encoding_that_is_not_there_is_refused_with_those_that_are(encoding: str) -> None:
    foreign = ForeignTarget(StubTarget(vocab_size=V), "foreign")
    with pytest.raises(
        ValueError, match=f"'{encoding}' is not to be had .*choose probs, topk, logits"
    ):
        ColocatedTarget(foreign, encoding)


def test_an_object_without_the_contract_is_refused() -> None:
    with pytest.raises(TargetError, match="a dict is no target"):
        ColocatedTarget({}, "probs")
