from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.integration.conftest import VOCAB, make_target
from tests.worker.targets.tiny_models import MAKERS, shared
from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import DecodeCache, Eagle3Draft
from trainer_client.errors import DataError
from trainer_client.evaluation.decoding import (
    eos_tokens,
    evaluate,
    greedy_decode,
    speculative_decode,
)
from worker.targets import load_target
from worker.targets.contract import describe
from worker.targets.huggingface import HuggingFaceTarget

PROMPTS = [[5, 6, 7, 8], [100, 3], [9] * 7]


@pytest.fixture(scope="module")
def target() -> HuggingFaceTarget:
    return make_target()


def make_draft(target: HuggingFaceTarget, size: int = 128) -> Eagle3Draft:
    facts = describe(target)
    info: dict[str, Any] = {
        "config": facts.config,
        "hidden_size": facts.hidden_size,
        "vocab_size": facts.vocab_size,
        "max_position_embeddings": facts.max_position_embeddings,
    }
    torch.manual_seed(0)
    ids = torch.arange(size)
    config = DraftConfig.from_target_info(info, size)
    return Eagle3Draft(config, ids, target.get_input_embeddings().weight)


def test_greedy_decoding_is_that_of_transformers(target: HuggingFaceTarget) -> None:
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        whole = target.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
        )
        assert greedy_decode(target, prompt, 20).tokens == whole[0, len(prompt) :].tolist()


@pytest.mark.parametrize("draft_tokens", [1, 3, 5])
def test_speculative_text_is_greedy_text(target: HuggingFaceTarget, draft_tokens: int) -> None:
    draft = make_draft(target)
    for prompt in PROMPTS:
        plain = greedy_decode(target, prompt, 24)
        fast = speculative_decode(target, draft, prompt, 24, draft_tokens)
        assert fast.tokens == plain.tokens
        assert fast.target_forwards <= plain.target_forwards


class Oracle(Eagle3Draft):
    """A draft that knows what the target will say, but for every third token."""

    def expect(self, whole: list[int]) -> None:
        self._whole = whole

    def decode(self, input_ids: torch.Tensor, hidden: torch.Tensor, cache: DecodeCache) -> Any:
        self._read = cache.length + input_ids.shape[1]
        return super().decode(input_ids, hidden, cache)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        at = self._read + 1  # the token after the last one that it has read
        token = self._whole[at] if at % 3 and at < len(self._whole) else 0
        return torch.nn.functional.one_hot(torch.tensor([[token]]), self.config.vocab_size).float()


def test_right_guesses_are_accepted_and_counted(target: HuggingFaceTarget) -> None:
    """Slot t reads token t + 1: an oracle of that alignment is right wherever it wants to be."""
    plain = make_draft(target, VOCAB)
    oracle = Oracle(plain.config, plain.selected_token_ids)
    prompt = PROMPTS[0]
    expected = greedy_decode(target, prompt, 30).tokens
    oracle.expect(prompt + expected)
    fast = speculative_decode(target, oracle, prompt, 30, 5)
    assert fast.tokens == expected
    assert fast.target_forwards < 15
    assert sum(fast.accepted) >= 30 - 1 - fast.target_forwards


def test_decoding_ends_at_the_end_of_the_text(target: HuggingFaceTarget) -> None:
    plain = greedy_decode(target, PROMPTS[0], 24)
    eos = plain.tokens[6]
    end = plain.tokens.index(eos) + 1
    assert greedy_decode(target, PROMPTS[0], 24, {eos}).tokens == plain.tokens[:end]
    fast = speculative_decode(target, make_draft(target), PROMPTS[0], 24, 5, {eos})
    assert fast.tokens == plain.tokens[:end]


def test_drafts_after_the_end_are_not_counted(target: HuggingFaceTarget) -> None:
    oracle = Oracle(make_draft(target, VOCAB).config, torch.arange(VOCAB))
    expected = greedy_decode(target, PROMPTS[0], 30).tokens
    oracle.expect(PROMPTS[0] + expected)
    for eos in set(expected):
        end = expected.index(eos) + 1
        fast = speculative_decode(target, oracle, PROMPTS[0], 30, 5, {eos})
        assert fast.tokens == expected[:end]
        assert (
            0 <= 1 + sum(count + 1 for count in fast.accepted) - end <= 1
        )  # a drafted end: no + 1


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_text_is_that_of_greedy_decoding_with_every_layout(kind: str) -> None:
    """Windows of 4 tokens (Mistral, Gemma) are shorter than what is drafted at once."""
    target = HuggingFaceTarget(shared(kind), name=kind)
    try:
        size = target.vocab_size
        oracle = Oracle(make_draft(target, size).config, torch.arange(size))
        oracle.expect([9, 10, 11, *greedy_decode(target, [9, 10, 11], 14).tokens])
        result = evaluate(target, oracle, [[9, 10, 11]], max_new_tokens=14, draft_tokens=4, eos=())
    finally:
        target.close()
    assert result.first_difference is None
    assert 1.5 < result.accept_length < 4  # some are accepted, and some not


def test_the_embedded_target_decodes_as_it_does_alone() -> None:
    target = load_target("embedded")
    draft = make_draft(target, 1024)
    result = evaluate(target, draft, [list(range(300, 320))], max_new_tokens=12)
    assert result.lossless
    assert result.accept_length < 1.5


def test_a_targets_own_end_of_text_ends_it(
    target: HuggingFaceTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = greedy_decode(target, PROMPTS[0], 24).tokens
    monkeypatch.setattr(target.model.generation_config, "eos_token_id", [plain[6], VOCAB - 1])
    assert eos_tokens(target) == (plain[6], VOCAB - 1)
    result = evaluate(target, make_draft(target), PROMPTS[:1], max_new_tokens=24)
    assert result.tokens == plain.index(plain[6])
    endless = evaluate(target, make_draft(target), PROMPTS[:1], max_new_tokens=24, eos=())
    assert endless.tokens == 23


@pytest.mark.parametrize(
    ("prompts", "match"),
    [
        ([], "there is no prompt"),
        ([[5], []], "prompt 1 is empty"),
        ([[5], [5] * 200], "prompt 1 has 200 tokens and 15 may follow, more than the target's"),
    ],
)
def test_prompts_that_cannot_be_decoded_are_errors(
    target: HuggingFaceTarget, prompts: list[list[int]], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        evaluate(target, make_draft(target), prompts, max_new_tokens=12, draft_tokens=3)
    with pytest.raises(ValueError, match="draft_tokens must be at least 1, got 0"):
        speculative_decode(target, make_draft(target), [5], 4, 0)


def test_an_evaluation_adds_it_up(target: HuggingFaceTarget) -> None:
    result = evaluate(target, make_draft(target), PROMPTS, max_new_tokens=12, draft_tokens=3)
    assert result.lossless
    assert result.first_difference is None
    assert result.accept_length == pytest.approx(1 + sum(result.depth_acceptance))
    assert (result.prompts, result.draft_tokens) == (3, 3)
    assert result.tokens == 3 * 11


def test_an_evaluation_tells_a_difference(
    target: HuggingFaceTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer_client.evaluation import decoding

    honest = decoding.speculative_decode

    def lying(*args: Any, **options: Any) -> Any:
        decoded = honest(*args, **options)
        if len(decoded.tokens) > 5:
            decoded.tokens[5] = (decoded.tokens[5] + 1) % VOCAB
        return decoded

    monkeypatch.setattr(decoding, "speculative_decode", lying)
    result = evaluate(target, make_draft(target), PROMPTS, max_new_tokens=12, draft_tokens=3)
    assert not result.lossless
    assert result.first_difference == (0, 5)
