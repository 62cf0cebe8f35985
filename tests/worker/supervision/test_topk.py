from __future__ import annotations

import pytest
import torch

from tests.vocab import shuffled
from trainer_client.eagle3.supervision import of_topk
from worker.supervision import topk
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_supervision
from worker.supervision.topk import top_probs
from worker.targets.stub import StubTarget

B, T, V, D = 2, 5, 60, 20
SELECTED = shuffled(torch.arange(1, 1 + 2 * D, 2))


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(B, T, V, generator=torch.Generator().manual_seed(0)) * 2


def dense(top: dict[str, torch.Tensor], size: int = D) -> torch.Tensor:
    known = torch.ones(B, T, dtype=torch.bool)
    whole = of_topk(top["topk_log_probs"], top["topk_ids"], top["rest_mass"], known, size)
    return whole.probs(torch.arange(B * T)).view(B, T, size)


@pytest.mark.parametrize("slots", [1, 3, 512])
def test_the_largest_are_exact_and_the_rest_is_spread(
    logits: torch.Tensor, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(topk, "_SLOTS", slots)
    probs = torch.softmax(logits[..., SELECTED], -1)
    top = top_probs(logits, SELECTED, k=6)
    assert top["topk_ids"].dtype == torch.int16
    assert top["topk_log_probs"].shape == (B, T, 6)
    found = dense(top)
    torch.testing.assert_close(found.sum(-1), torch.ones(B, T))
    kept = probs.topk(6, dim=-1)
    torch.testing.assert_close(found.gather(-1, kept.indices), kept.values)
    torch.testing.assert_close(top["rest_mass"][..., 0], 1 - kept.values.sum(-1))
    # never further off than the mass that was left out
    assert ((found - probs).abs().sum(-1) / 2 <= top["rest_mass"][..., 0] + 1e-6).all()


def test_with_as_many_as_the_draft_vocab_has_it_is_exact(logits: torch.Tensor) -> None:
    top = top_probs(logits, SELECTED, k=1000)
    torch.testing.assert_close(dense(top), torch.softmax(logits[..., SELECTED], -1))


def test_ids_of_a_large_draft_vocab_are_not_cut() -> None:
    size = 2**15 + 10
    logits = torch.zeros(1, 1, size)
    logits[..., -1] = 9.0
    top = top_probs(logits, torch.arange(size), k=2)
    assert int(top["topk_ids"][0, 0, 0]) == size - 1


def test_the_most_likely_are_those_of_probs_in_the_same_slots() -> None:
    target = StubTarget(vocab_size=V)
    ids = torch.arange(B * T).view(B, T)
    mapping = VocabMapping(SELECTED, V)
    probs, top = (
        compute_supervision(
            target, ids, torch.ones_like(ids), torch.ones_like(ids), mapping=mapping, encoding=e
        )
        for e in ("probs", "topk")
    )
    for name in ("aux_hidden_states", "position_mask", "input_ids", "loss_mask"):
        assert torch.equal(top[name], probs[name]), name
    known = top["position_mask"].squeeze(-1)
    best = probs["target_probs"].max(-1)
    assert torch.equal(top["topk_ids"][..., 0].long()[known], best.indices[known])
    torch.testing.assert_close(top["topk_log_probs"][..., 0].exp()[known], best.values[known])
