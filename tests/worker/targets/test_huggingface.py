from __future__ import annotations

import json
import threading
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from tests.worker.targets.tiny_models import MAKERS, VOCAB, make, shared, tokens
from worker.errors import TargetError
from worker.targets.contract import describe
from worker.targets.huggingface import HuggingFaceTarget, _current

CHANGES_LOGITS = {"gemma2", "granite"}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_layout_gives_its_own_logits_and_layer_outputs_bit_for_bit(kind: str) -> None:
    model = shared(kind)
    target = HuggingFaceTarget(model, name=kind)
    ids, mask, loss_mask = tokens()
    mask[1, 7:] = 0
    with torch.no_grad():
        wanted = model(
            input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True
        )
    got = target.forward(ids, mask, loss_mask)
    assert torch.equal(got.logits, wanted.logits)
    layers = [wanted.hidden_states[layer + 1] for layer in (1, 3, 4)]
    assert torch.equal(got.aux_hidden_states, torch.cat(layers, dim=-1))
    assert torch.equal(got.last_hidden_state, wanted.hidden_states[-1])
    assert ("hidden" in target.encodings) == (kind not in CHANGES_LOGITS)
    if "hidden" in target.encodings:
        head = model.get_output_embeddings()
        assert torch.equal(head(got.last_hidden_state), got.logits)
    target.close()


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_a_model_that_changes_its_heads_output_does_not_offer_hidden(kind: str) -> None:
    target = HuggingFaceTarget(shared(kind), name=kind)
    assert target.encodings == ("probs", "topk")
    assert "soft-capping or scaling" in target.hidden_refused


@pytest.mark.parametrize("kind", MAKERS)
def test_padding_on_the_right_changes_no_real_position(kind: str) -> None:
    target = HuggingFaceTarget(shared(kind), name=kind)
    ids, mask, loss_mask = tokens(batch=1, length=7)
    alone = target.forward(ids, mask, loss_mask)
    longer = torch.cat((ids, torch.full((1, 5), 9)), dim=1)
    padded_mask = torch.cat((mask, torch.zeros(1, 5, dtype=mask.dtype)), dim=1)
    padded = target.forward(longer, padded_mask, padded_mask)
    torch.testing.assert_close(padded.logits[:, :7], alone.logits, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        padded.aux_hidden_states[:, :7], alone.aux_hidden_states, atol=1e-5, rtol=1e-4
    )
    target.close()


def test_a_forward_of_the_same_model_in_another_thread_leaves_no_trace() -> None:
    model = make("llama")
    target = HuggingFaceTarget(model, name="tiny")
    (ids, mask, loss_mask), (others, other_mask, _) = tokens(seed=1), tokens(seed=2)
    wanted = target.forward(ids, mask, loss_mask)
    inside, done = threading.Event(), threading.Event()

    def stranger() -> None:
        inside.wait(10)
        with torch.no_grad():
            model(input_ids=others, attention_mask=other_mask)
        done.set()

    def between_the_captured_layers(*_: Any) -> None:
        if threading.current_thread() is not thread and not done.is_set():
            inside.set()
            done.wait(10)

    handle = model.model.layers[7].register_forward_hook(between_the_captured_layers)
    thread = threading.Thread(target=stranger)
    thread.start()
    got = target.forward(ids, mask, loss_mask)
    thread.join()
    handle.remove()
    assert done.is_set()
    assert torch.equal(got.aux_hidden_states, wanted.aux_hidden_states)
    assert torch.equal(got.last_hidden_state, wanted.last_hidden_state)


def test_two_targets_over_one_model_capture_their_own_layers() -> None:
    model = make("llama")
    low = HuggingFaceTarget(model, name="low", aux_layer_ids=(0, 1, 2))
    high = HuggingFaceTarget(model, name="high", aux_layer_ids=(5, 6, 7))
    ids, mask, loss_mask = tokens()
    states = model(
        input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False
    ).hidden_states
    got = low.forward(ids, mask, loss_mask).aux_hidden_states
    assert torch.equal(got, torch.cat(states[1:4], dim=-1))
    got = high.forward(ids, mask, loss_mask).aux_hidden_states
    assert torch.equal(got[..., :64], torch.cat(states[6:8], dim=-1))


def test_target_dies_in_mid_forward_and_the_next_call_sees_nothing_of_it() -> None:
    model = make("llama")
    target = HuggingFaceTarget(model, name="tiny")
    ids, mask, loss_mask = tokens(seed=1)
    wanted = target.forward(ids, mask, loss_mask)

    def fail(*_: Any) -> None:
        raise RuntimeError("broken layer")

    handle = model.model.layers[3].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="broken layer"):
        target.forward(*tokens(seed=2))
    handle.remove()
    assert _current.get() is None
    got = target.forward(ids, mask, loss_mask)
    assert torch.equal(got.aux_hidden_states, wanted.aux_hidden_states)


def test_no_hidden_state_but_the_three_is_kept() -> None:
    model = make("llama")
    target = HuggingFaceTarget(model, name="tiny")
    seen: list[Any] = []
    handle = model.register_forward_hook(lambda *arguments: seen.append(arguments[-1]))
    target.forward(*tokens())
    handle.remove()
    assert seen[0].hidden_states is None
    assert seen[0].past_key_values is None
    assert _current.get() is None


def test_close_takes_the_hooks_off() -> None:
    model = make("llama")
    target = HuggingFaceTarget(model, name="tiny")
    hooked = [module for module in model.modules() if module._forward_hooks]
    assert len(hooked) == len(target._layers) + 1  # and the head
    target.close()
    assert not any(module._forward_hooks for module in model.modules())


def test_the_target_is_frozen_and_in_eval_mode() -> None:
    model = make("llama").train()
    target = HuggingFaceTarget(model, name="tiny")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in target.model.parameters())


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ((1,), r"two or more distinct layers from 0 to 7, got \[1\]"),
        ((1, 2, 2), "two or more distinct"),
        ((1, 2, 8), "from 0 to 7"),
        ((-1, 2, 3), "from 0 to 7"),
    ],
)
def test_bad_aux_layers_are_refused(ids: tuple[int, ...], message: str) -> None:
    with pytest.raises(TargetError, match=message):
        HuggingFaceTarget(shared("llama"), name="tiny", aux_layer_ids=ids)


def test_a_shallow_target_says_what_to_choose() -> None:
    config = hf.LlamaConfig(**{**shared("llama").config.to_dict(), "num_hidden_layers": 4})
    model = hf.LlamaForCausalLM(config)
    with pytest.raises(TargetError, match=r"4 layers, too few .* from 0 to 3"):
        HuggingFaceTarget(model, name="shallow")
    assert HuggingFaceTarget(model, name="shallow", aux_layer_ids=(0, 1, 3)).aux_layer_ids == (
        0,
        1,
        3,
    )


def test_a_model_without_decoder_layers_is_named() -> None:
    class Odd(nn.Module):
        config = None

    with pytest.raises(TargetError, match=r"Odd .* has no decoder layers .* --target-factory"):
        HuggingFaceTarget(Odd(), name="odd")


def test_fingerprint_is_of_weights_and_dtype_and_not_of_aux_layers() -> None:
    first = HuggingFaceTarget(make("llama"), name="a")
    again = HuggingFaceTarget(make("llama"), name="b", aux_layer_ids=(0, 1, 2))
    other = HuggingFaceTarget(make("llama", seed=1), name="a")
    half = HuggingFaceTarget(make("llama").bfloat16(), name="a")
    nudged = make("llama")
    nudged.model.layers[5].mlp.up_proj.weight.data[3, 3] += 1e-3  # one weight of 70,000
    swapped = make("llama")
    norms = swapped.model.layers[0].mlp.up_proj.weight.data
    norms[:2] = norms[:2].flip(0)  # the same weights, two rows exchanged
    prints = [other.fingerprint, half.fingerprint]
    prints += [HuggingFaceTarget(model, name="a").fingerprint for model in (nudged, swapped)]
    assert first.fingerprint == again.fingerprint
    assert len({first.fingerprint, *prints}) == 5


def test_facts_are_plain_and_of_the_text_model() -> None:
    facts = describe(HuggingFaceTarget(shared("llava"), name="vision"), "served-as")
    assert facts.model == "served-as"
    assert (facts.num_hidden_layers, facts.hidden_size, facts.vocab_size) == (8, 32, VOCAB)
    assert facts.aux_layer_ids == (1, 3, 4)
    assert facts.dtype == "float32"
    assert facts.max_position_embeddings == 64
    assert facts.encodings == ("probs", "hidden", "topk")
    assert json.loads(json.dumps(facts.config))["num_key_value_heads"] == 2


def test_aux_layers_that_do_not_ascend_are_refused_with_what_to_say() -> None:
    with pytest.raises(TargetError, match="say 1,5,7"):
        HuggingFaceTarget(make("llama"), name="a", aux_layer_ids=(7, 1, 5))
