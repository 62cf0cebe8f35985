from __future__ import annotations

import dataclasses
from dataclasses import replace

import pytest
import torch

from trainer_client.eagle3.config import DraftConfig, rope_parameters
from trainer_client.eagle3.draft import DecodeCache, Eagle3Draft, TTTCache
from trainer_client.eagle3.supervision import of_hidden
from trainer_client.eagle3.unroll import Eagle3Unroll, simulated_accept_length
from trainer_client.targets.batch import LmHeadRows

VOCAB, DRAFT, HIDDEN = 40, 24, 16
CONFIG = DraftConfig(
    vocab_size=VOCAB,
    draft_vocab_size=DRAFT,
    target_hidden_size=HIDDEN,
    hidden_size=HIDDEN,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
    max_position_embeddings=64,
)
SELECTED = torch.cat((torch.arange(0, 10), torch.arange(12, 40, 2)))[:DRAFT]


NETWORKS: dict[str, dict[str, bool]] = {
    "EAGLE-3": {},
    "EAGLE-3.1": {"fc_norm": True, "norm_output": True},
    "speculators'": {"norm_before_fc": True, "norm_output": True, "norm_before_residual": True},
}


@pytest.fixture(params=NETWORKS.values(), ids=NETWORKS)
def draft(request: pytest.FixtureRequest) -> Eagle3Draft:
    torch.manual_seed(0)
    config = replace(CONFIG, **request.param)
    model = Eagle3Draft(config, SELECTED, torch.randn(VOCAB, HIDDEN))
    for parameter in model.parameters():  # away from the small first weights
        if parameter.requires_grad and parameter.ndim > 1:
            parameter.data.mul_(10)
    return model.double()


def batch(length: int = 9, rows: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, VOCAB, (rows, length), generator=generator)
    aux = torch.randn(rows, length, 3 * HIDDEN, generator=generator, dtype=torch.float64)
    probs = torch.softmax(torch.randn(rows, length, DRAFT, generator=generator), -1)
    mask = torch.rand(rows, length, 1, generator=generator) > 0.3
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "loss_mask": torch.ones_like(ids),
        "aux_hidden_states": aux,
        "target_probs": probs,
        "position_mask": mask,
    }


def test_the_buffers_are_the_mapping_in_offset_form(draft: Eagle3Draft) -> None:
    assert torch.equal(draft.d2t + torch.arange(DRAFT), SELECTED)
    assert torch.equal(draft.t2d.nonzero().flatten(), SELECTED)
    assert torch.equal(draft.selected_token_ids, SELECTED)


def test_decoding_is_the_first_depth_of_the_unroll(draft: Eagle3Draft) -> None:
    inputs = batch(rows=1)
    hidden = draft.fuse(inputs["aux_hidden_states"])
    at_once = draft.step(inputs["input_ids"], hidden, TTTCache(), inputs["attention_mask"])
    cache = DecodeCache()
    parts = [
        draft.decode(inputs["input_ids"][:, a:b], hidden[:, a:b], cache)
        for a, b in ((0, 4), (4, 5), (5, 9))
    ]
    torch.testing.assert_close(torch.cat(parts, dim=1), at_once)


def test_drafting_sees_what_the_unroll_saw_at_every_depth(draft: Eagle3Draft) -> None:
    """Slot t of depth i is what real decoding computes i tokens after slot t."""
    inputs = batch(rows=1)
    ids, ones = inputs["input_ids"], inputs["attention_mask"]
    ttt, hidden = TTTCache(), draft.fuse(inputs["aux_hidden_states"])
    first = hidden
    depths = []
    for depth in range(4):
        rolled = torch.nn.functional.pad(ids[:, depth:], (0, depth))
        hidden = draft.step(rolled, hidden, ttt, ones)
        depths.append(hidden)
        hidden = draft.fed_back(hidden, draft.norm(hidden))
    for slot in (0, 3, 5):
        cache = DecodeCache()
        own = draft.decode(ids[:, : slot + 1], first[:, : slot + 1], cache)[:, -1:]
        torch.testing.assert_close(own, depths[0][:, slot : slot + 1])
        for depth in (1, 2, 3):
            own = draft.fed_back(own, draft.norm(own))
            own = draft.decode(ids[:, slot + depth : slot + depth + 1], own, cache)
            expected = depths[depth][:, slot : slot + 1]
            torch.testing.assert_close(own, expected, atol=1e-6, rtol=1e-5)  # softmax is float32


def test_a_cropped_cache_forgets(draft: Eagle3Draft) -> None:
    inputs = batch(rows=1)
    hidden, cache = draft.fuse(inputs["aux_hidden_states"]), DecodeCache()
    draft.decode(inputs["input_ids"][:, :5], hidden[:, :5], cache)
    once = draft.decode(inputs["input_ids"][:, 5:7], hidden[:, 5:7], cache)
    cache.crop(5)
    again = draft.decode(inputs["input_ids"][:, 5:7], hidden[:, 5:7], cache)
    torch.testing.assert_close(once, again)


def reference_loss(draft: Eagle3Draft, inputs: dict[str, torch.Tensor], depths: int) -> float:
    """The paper's definition, slot by slot, by decoding from every prefix."""
    ids, probs, mask = inputs["input_ids"], inputs["target_probs"], inputs["position_mask"]
    fused = draft.fuse(inputs["aux_hidden_states"])
    rows, length = ids.shape
    total = weight = 0.0
    for depth in range(depths):
        losses = []
        for row in range(rows):
            for slot in range(length - depth):
                if not mask[row, slot + depth]:
                    continue
                cache, one = DecodeCache(), slice(row, row + 1)
                own = draft.decode(ids[one, : slot + 1], fused[one, : slot + 1], cache)[:, -1:]
                for later in range(1, depth + 1):
                    token = ids[one, slot + later : slot + later + 1]
                    own = draft.decode(token, draft.fed_back(own, draft.norm(own)), cache)
                log_probs = torch.log_softmax(draft.logits(own)[0, 0].float(), -1)
                losses.append(float(-(probs[row, slot + depth] * log_probs).sum()))
        total += 0.8**depth * sum(losses) / len(losses)
        weight += 0.8**depth
    return total / weight


@torch.no_grad()
def test_the_loss_is_the_papers_slot_by_slot(draft: Eagle3Draft) -> None:
    inputs = batch()
    output = Eagle3Unroll(draft, depths=3)(**inputs)
    assert float(output.loss) == pytest.approx(reference_loss(draft, inputs, 3), rel=1e-5)


def test_padding_changes_nothing(draft: Eagle3Draft) -> None:
    inputs = batch(rows=1)
    plain = Eagle3Unroll(draft, depths=3)(**inputs)
    padded = {
        name: torch.nn.functional.pad(t, [0, 0] * (t.ndim - 2) + [0, 4])
        for name, t in inputs.items()
    }
    with_padding = Eagle3Unroll(draft, depths=3)(**padded)
    torch.testing.assert_close(plain.loss, with_padding.loss)
    assert torch.equal(plain.correct, with_padding.correct)
    assert torch.equal(plain.chain_hits, with_padding.chain_hits)


@torch.no_grad()
def test_all_three_kinds_of_supervision_give_the_same_loss(draft: Eagle3Draft) -> None:
    inputs = batch()
    generator = torch.Generator().manual_seed(2)
    head = torch.randn(VOCAB, HIDDEN, generator=generator)
    last = torch.randn(2, 9, HIDDEN, generator=generator)
    logits = last @ head.T
    del inputs["target_probs"], inputs["position_mask"]
    unroll = Eagle3Unroll(draft, depths=3)
    whole = unroll(**inputs, target_logits=logits)
    known = draft.t2d[logits.argmax(-1)].unsqueeze(-1)
    probs = torch.softmax(logits[..., SELECTED], -1)
    assert float(unroll(**inputs, target_probs=probs, position_mask=known).loss) == float(
        whole.loss
    )
    rows = LmHeadRows(head[SELECTED])
    hidden = unroll(**inputs, last_hidden_state=last, position_mask=known, lm_head=rows)
    torch.testing.assert_close(hidden.loss, whole.loss, atol=1e-4, rtol=0)


def test_without_supervision_it_says_what_is_wanted(draft: Eagle3Draft) -> None:
    inputs = batch()
    del inputs["target_probs"]
    with pytest.raises(
        ValueError, match=r"no supervision in \['position_mask'\]: give target_logits"
    ):
        Eagle3Unroll(draft)(**inputs)


def test_the_embeddings_do_not_train_and_all_else_does(draft: Eagle3Draft) -> None:
    Eagle3Unroll(draft, depths=2)(**batch()).loss.backward()
    for name, parameter in draft.named_parameters():
        if name == "embed_tokens.weight":
            assert parameter.grad is None
        else:
            assert parameter.grad is not None, name
            assert parameter.grad.abs().sum() > 0, name


def test_a_few_steps_learn_a_batch_by_heart(draft: Eagle3Draft) -> None:
    inputs = batch()
    inputs["target_probs"] = torch.nn.functional.one_hot(
        inputs["target_probs"].argmax(-1), DRAFT
    ).float()
    draft.float()
    inputs["aux_hidden_states"] = inputs["aux_hidden_states"].float()
    unroll = Eagle3Unroll(draft, depths=3)
    optimizer = torch.optim.Adam([p for p in draft.parameters() if p.requires_grad], lr=0.01)
    first = unroll(**inputs).loss.item()
    for _ in range(80):
        output = unroll(**inputs)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
    assert float(output.loss) < 0.05 * first
    assert torch.equal(output.correct[0], output.supervised[0])


def test_a_chain_ends_at_a_miss_and_counts_tokens_outside_the_draft_vocab(
    draft: Eagle3Draft,
) -> None:
    inputs = batch(rows=1)
    inputs["position_mask"][:] = True
    inputs["position_mask"][0, 4] = False  # the target's token there is not in the draft vocab
    best = torch.zeros(1, 9, DRAFT)
    best[..., 3] = 1.0
    inputs["target_probs"] = best
    with torch.no_grad():
        draft.lm_head.weight.zero_()
        draft.norm.weight.fill_(1.0)
    output = Eagle3Unroll(draft, depths=2)(**inputs)  # argmax of equal logits is 0: never 3
    assert output.correct.tolist() == [0, 0]
    assert output.chain_hits.tolist() == [0, 0]
    assert output.chains.tolist() == [9, 8]
    assert output.supervised.tolist() == [8, 7]


def test_the_simulated_accept_length_adds_survival_rates() -> None:
    assert simulated_accept_length(torch.tensor([8, 4]), torch.tensor([10, 10])) == 2.2
    assert simulated_accept_length(torch.tensor([0, 0]), torch.tensor([0, 0])) == 1.0


def test_a_draft_vocab_distribution_is_the_softmax_of_the_selected_rows() -> None:
    hidden, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    expected = torch.softmax(hidden @ weight.T + bias, -1)
    known = torch.ones(2, 3, dtype=torch.bool)
    supervision = of_hidden(hidden, known, LmHeadRows(weight, bias))
    torch.testing.assert_close(supervision.probs(torch.tensor([1, 4])), expected.view(6, 5)[[1, 4]])


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"rope_theta": 5e5}, {"rope_type": "default", "rope_theta": 5e5}),
        (
            {"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2.0}},
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        (
            {
                "rope_parameters": {
                    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                }
            },
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        (  # Phi rotates a part of its heads
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            {"rope_type": "default", "rope_theta": 1e4},
        ),
        (  # Qwen-VL, in two ages
            {"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [1, 1]}},
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        (
            {"rope_parameters": {"rope_theta": 1e6, "mrope_section": [1, 1]}},
            {"rope_type": "default", "rope_theta": 1e6},
        ),
        (  # Phi-3 in transformers 4
            {
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "long_factor": [2.0], "short_factor": [1.0]},
            },
            {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "long_factor": [2.0],
                "short_factor": [1.0],
                "original_max_position_embeddings": 4096,
            },
        ),
    ],
)
def test_rope_is_read_in_the_forms_of_transformers_4_and_5(config: dict, expected: dict) -> None:
    assert rope_parameters(config) == expected


@pytest.mark.parametrize("scaling", [{}, {"rope_type": "yarn", "factor": 4.0}])
def test_positions_are_exact_in_low_precision(scaling: dict) -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5} | scaling
    draft = Eagle3Draft(dataclasses.replace(CONFIG, rope_parameters=rope), SELECTED)
    hidden, far = torch.zeros(1, 1, HIDDEN), torch.tensor([[3001]])
    before = draft._rotary(hidden, far)
    after = draft.to(torch.bfloat16)._rotary(hidden, far)
    assert draft.fc.weight.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_target_that_says_no_heads_is_an_error() -> None:
    info = {"config": {}, "hidden_size": 16, "vocab_size": 40, "max_position_embeddings": 64}
    with pytest.raises(ValueError, match="no number of attention heads"):
        DraftConfig.from_target_info(info, 24)


def test_the_networks_are_other_networks(draft: Eagle3Draft) -> None:
    """Each switch changes what is computed, by its definition."""
    aux = batch()["aux_hidden_states"]
    parts = list(aux.chunk(3, -1))
    if draft.config.fc_norm:
        parts = [p * torch.rsqrt(p.pow(2).mean(-1, keepdim=True) + 1e-6) for p in parts]
    fused = torch.cat(parts, -1)
    if draft.config.norm_before_fc:
        fused = fused * torch.rsqrt(fused.pow(2).mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(draft.fuse(aux), fused @ draft.fc.weight.T, atol=1e-5, rtol=1e-5)
    hidden = torch.randn(1, 3, HIDDEN, dtype=torch.float64)
    _, residual = draft.midlayer.fused(hidden, hidden)
    assert torch.equal(residual, hidden) != draft.config.norm_before_residual
    assert torch.equal(draft.fed_back(hidden, hidden + 1), hidden) != draft.config.norm_output


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"hidden_size": 8}, r"hidden size \(8\) must be the target's \(16\)"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
        ({"draft_vocab_size": 41}, "has 41 tokens; it must have 1 to 40"),
        ({"draft_vocab_size": 0}, "draft_vocab_size must be a number above 0, got 0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a number above 0, got '1e-6'"),
        ({"num_attention_heads": 3}, r"hidden size \(16\) is no multiple of 3 attention heads"),
        ({"head_dim": 5}, "head_dim must be even, for RoPE; got 5"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(changes: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **changes)
