from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.vocab import shuffled
from tests.worker.targets.tiny_models import VOCAB, shared, tokens
from worker.errors import BadRequest
from worker.supervision.mapping import VocabMapping
from worker.supervision.requests import validate_request
from worker.supervision.supervision import (
    compute_supervision,
    input_embeddings,
    lm_head_rows,
)
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.stub import StubTarget

MAPPING = VocabMapping(shuffled(torch.arange(1, VOCAB, 3)), VOCAB)


@pytest.fixture(scope="module")
def llama() -> HuggingFaceTarget:
    return HuggingFaceTarget(shared("llama"), name="tiny")


def supervise(target: Any, encoding: str, loss_mask: torch.Tensor | None = None) -> Any:
    ids, attention_mask, ones = tokens()
    mask = ones if loss_mask is None else loss_mask
    return compute_supervision(
        target, ids, attention_mask, mask, mapping=MAPPING, encoding=encoding
    )


def test_probs_are_bit_for_bit_the_softmax_of_the_selected_logits_of_the_next_token(
    llama: HuggingFaceTarget,
) -> None:
    ids, mask, _ = tokens()
    logits = llama.model(input_ids=ids, attention_mask=mask).logits
    shifted = torch.cat((logits[:, 1:], torch.zeros_like(logits[:, :1])), dim=1)
    wanted = torch.softmax(shifted[..., MAPPING.selected_token_ids].float(), dim=-1)
    got = supervise(llama, "probs")
    assert list(got) == [
        "aux_hidden_states",
        "position_mask",
        "input_ids",
        "loss_mask",
        "target_probs",
    ]
    assert torch.equal(got["target_probs"], wanted)
    assert torch.equal(got["input_ids"][:, :-1], ids[:, 1:])
    assert not got["input_ids"][:, -1].any()


def test_positions_are_supervised_where_the_argmax_is_a_draft_token_and_the_loss_wants_it(
    llama: HuggingFaceTarget,
) -> None:
    ids, mask, _ = tokens()
    loss_mask = torch.zeros_like(ids)
    loss_mask[0, 4:9] = 1
    top_ids = llama.model(input_ids=ids, attention_mask=mask).logits.argmax(-1)
    wanted = torch.zeros(2, 12, 1, dtype=torch.bool)
    for slot in range(3, 8):
        wanted[0, slot, 0] = bool(MAPPING.t2d[top_ids[0, slot + 1]])
    assert 0 < int(wanted.sum()) < 5  # else the test could not tell
    for encoding in ("probs", "hidden"):
        got = supervise(llama, encoding, loss_mask)
        assert got["position_mask"].dtype == torch.bool
        assert torch.equal(got["position_mask"], wanted)


def test_hidden_times_the_head_rows_is_the_same_distribution(llama: HuggingFaceTarget) -> None:
    probs, hidden = supervise(llama, "probs"), supervise(llama, "hidden")
    weight = lm_head_rows(llama, MAPPING)["weight"]
    remade = torch.softmax((hidden["last_hidden_state"] @ weight.T).float(), dim=-1)
    assert weight.shape == (MAPPING.draft_vocab_size, 32)
    torch.testing.assert_close(remade, probs["target_probs"], atol=1e-6, rtol=0)
    for name in ("aux_hidden_states", "position_mask", "input_ids", "loss_mask"):
        assert torch.equal(hidden[name], probs[name])


def test_a_target_that_shifts_itself_is_not_shifted_again() -> None:
    stub = StubTarget(vocab_size=VOCAB)
    ours, theirs = supervise(stub, "probs"), supervise(ForeignTarget(stub, "theirs"), "probs")
    for name, tensor in ours.items():
        assert torch.equal(theirs[name], tensor), name


def test_bfloat16_logits_never_become_a_full_float32_copy() -> None:
    target = StubTarget(vocab_size=VOCAB, dtype=torch.bfloat16)

    class Watch(TorchFunctionMode):
        largest = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.largest = max(self.largest, result.numel())
            return result

    with Watch() as watch:
        got = supervise(target, "probs")
    assert got["target_probs"].dtype == torch.float32
    assert watch.largest == 2 * 12 * MAPPING.draft_vocab_size


def test_supervision_has_no_graph_and_can_be_trained_on(llama: HuggingFaceTarget) -> None:
    aux = supervise(llama, "hidden")["aux_hidden_states"]
    fuse = torch.nn.Linear(aux.shape[-1], 4)
    fuse(aux).sum().backward()  # an inference-mode tensor would refuse
    assert not aux.requires_grad
    assert fuse.weight.grad is not None


def test_integer_and_bool_inputs_mean_the_same() -> None:
    target = StubTarget(vocab_size=VOCAB)
    ids, mask, loss_mask = tokens()
    wide = compute_supervision(target, ids, mask, loss_mask, mapping=MAPPING, encoding="probs")
    narrow = compute_supervision(
        target, ids.int(), mask.bool(), loss_mask.bool(), mapping=MAPPING, encoding="probs"
    )
    assert narrow["input_ids"].dtype == torch.int64
    assert narrow["loss_mask"].dtype == torch.bool
    assert torch.equal(narrow["target_probs"], wide["target_probs"])
    assert torch.equal(narrow["position_mask"], wide["position_mask"])


def test_an_encoding_that_is_not_offered_says_why() -> None:
    gemma = HuggingFaceTarget(shared("gemma2"), name="capped")
    with pytest.raises(BadRequest, match=r"'hidden' because .*soft-capping.*; it offers probs"):
        supervise(gemma, "hidden")


def test_a_mapping_for_another_vocabulary_is_refused_with_both_sizes() -> None:
    small = StubTarget(vocab_size=64)
    for call in (lambda: supervise(small, "probs"), lambda: lm_head_rows(small, MAPPING)):
        with pytest.raises(BadRequest, match="for 128 target tokens, target 'stub' has 64"):
            call()


def test_head_rows_bring_the_bias_where_there_is_one() -> None:
    phi = HuggingFaceTarget(shared("phi"), name="phi")  # its head has a bias
    rows = lm_head_rows(phi, MAPPING)
    assert torch.equal(rows["bias"], phi.model.lm_head.bias[MAPPING.selected_token_ids])


def test_input_embeddings_are_the_whole_table(llama: HuggingFaceTarget) -> None:
    assert torch.equal(input_embeddings(llama)["weight"], llama.model.model.embed_tokens.weight)


ids, ones = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.ones(2, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ((ids.float(), ones, ones), "input_ids is torch.float32; it must be one of int64, int32"),
        ((ids, ones.float(), ones), "attention_mask is torch.float32"),
        ((ids, ones, ones.double()), "loss_mask is torch.float64"),
        ((ids[0], ones, ones), r"input_ids must be \[batch, tokens\], got shape \(3,\)"),
        ((ids, ones[:, :2], ones), r"attention_mask has shape \(2, 2\), input_ids \(2, 3\)"),
        ((ids, ones, ones[:1]), r"loss_mask has shape \(1, 3\), input_ids \(2, 3\)"),
        ((ids[:0], ones[:0], ones[:0]), r"empty: input_ids has shape \(0, 3\)"),
        ((ids[:, :0], ones[:, :0], ones[:, :0]), "empty"),
        ((ids + 3, ones, ones), r"input_ids\[1, 2\] is 9, .* has 9 tokens \(valid: 0 to 8\)"),
        ((ids - 2, ones, ones), r"input_ids\[0, 0\] is -1"),
    ],
)
def test_a_bad_request_is_named(tensors: tuple[torch.Tensor, ...], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        validate_request(*tensors, vocab_size=9)


def test_a_sequence_longer_than_the_positions_is_refused_with_both_numbers() -> None:
    validate_request(ids, ones, ones, 9, 3)
    validate_request(ids, ones, ones, 9, 0)  # a target that does not say
    with pytest.raises(BadRequest, match="have 3 tokens, the target has positions for 2"):
        validate_request(ids, ones, ones, 9, 2)


@pytest.mark.parametrize("encoding", ["probs", "hidden", "topk"])
@pytest.mark.parametrize("slots", [1, 7, 11, 12])
def test_the_first_slots_have_the_bits_that_they_have_in_the_whole(
    llama: HuggingFaceTarget, encoding: str, slots: int
) -> None:
    whole = supervise(llama, encoding)
    part = compute_supervision(
        llama, *tokens(), mapping=MAPPING, encoding=f"{encoding};rows=0-{slots}"
    )
    assert list(part) == list(whole)
    for name, tensor in whole.items():
        assert torch.equal(part[name], tensor[:, :slots]), name


def test_the_first_slots_of_a_target_that_shifts_are_those_of_the_whole(
    llama: HuggingFaceTarget,
) -> None:
    theirs = ForeignTarget(llama, "theirs")
    whole = supervise(theirs, "probs")
    part = compute_supervision(theirs, *tokens(), mapping=MAPPING, encoding="probs;rows=0-5")
    for name, tensor in whole.items():
        assert torch.equal(part[name], tensor[:, :5]), name
