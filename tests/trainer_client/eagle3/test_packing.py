"""Documents that follow one another in one row are learned as each is alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from tests.trainer_client.eagle3.test_draft import CONFIG, DRAFT, HIDDEN, SELECTED, VOCAB
from tests.trainer_client.eagle3.test_draft import draft as draft
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.eagle3.packing import positions, shifted
from trainer_client.eagle3.unroll import Eagle3Unroll, UnrollOutput
from trainer_client.targets.batch import Eagle3TargetBatch

DEPTHS = 4


def documents(lengths: list[int], dtype: torch.dtype = torch.float64) -> list[dict[str, Any]]:
    """What a target gives for each of them, [1, T] each."""
    torch.manual_seed(sum(lengths))
    made = []
    for length in lengths:
        probs = torch.softmax(torch.randn(1, length, DRAFT), -1)
        made.append(
            {
                "input_ids": torch.randint(0, VOCAB, (1, length)),
                "attention_mask": torch.ones(1, length, dtype=torch.int64),
                "loss_mask": torch.rand(1, length) > 0.2,
                "aux_hidden_states": torch.randn(1, length, 3 * HIDDEN, dtype=dtype),
                "target_probs": probs,
                "position_mask": torch.rand(1, length, 1) > 0.3,
            }
        )
    return made


def packed(parts: list[dict[str, Any]]) -> Eagle3TargetBatch:
    lengths = tuple(part["input_ids"].shape[1] for part in parts)
    joined = {name: torch.cat([part[name] for part in parts], dim=1) for name in parts[0]}
    return Eagle3TargetBatch(**joined, lengths=lengths)


def unrolled(
    unroll: Eagle3Unroll, batches: list[Eagle3TargetBatch]
) -> tuple[list[UnrollOutput], torch.Tensor]:
    """What a step learns from them together, and its gradient."""
    counts = sum((unroll.counts(each) for each in batches), torch.zeros(unroll.depths).long())
    unroll.zero_grad()
    made = [unroll(**each.to_trainer_inputs(), counts=counts) for each in batches]
    sum(each.loss for each in made).backward()  # type: ignore[union-attr]
    grads = [p.grad.flatten() for p in unroll.parameters() if p.grad is not None]
    return made, torch.cat(grads)


@pytest.mark.parametrize("lengths", [[9], [9, 5], [3, 11, 1, 7], [1, 1], [2, 1, 2]])
def test_packed_documents_are_learned_as_each_is_alone(
    draft: Eagle3Draft, lengths: list[int]
) -> None:
    unroll, parts = Eagle3Unroll(draft, depths=DEPTHS), documents(lengths)
    alone, right = unrolled(unroll, [Eagle3TargetBatch(**part) for part in parts])
    (together,), gradient = unrolled(unroll, [packed(parts)])
    torch.testing.assert_close(gradient, right)
    torch.testing.assert_close(together.loss, sum(each.loss for each in alone))
    for name in ("correct", "supervised", "chain_hits", "chains"):
        assert getattr(together, name).tolist() == sum(getattr(e, name) for e in alone).tolist()


@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_long_ones_beside_short_ones_are_attended_each_as_it_suits(attention: Any) -> None:
    """Merged from 257 tokens on, in blocks of queries below."""
    torch.manual_seed(0)
    draft = Eagle3Draft(CONFIG, SELECTED, torch.randn(VOCAB, HIDDEN))
    draft.attention = attention
    unroll, parts = Eagle3Unroll(draft, depths=DEPTHS), documents([300, 40, 260], torch.float32)
    _, right = unrolled(unroll, [Eagle3TargetBatch(**part) for part in parts])
    _, gradient = unrolled(unroll, [packed(parts)])
    torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-6)


def test_no_document_knows_what_lies_beside_it(draft: Eagle3Draft) -> None:
    unroll = Eagle3Unroll(draft, depths=DEPTHS)
    one, other, another = documents([6, 8, 8])
    first = unroll._guesses(*states(packed([one, other])))
    second = unroll._guesses(*states(packed([one, another])))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a[:, :6], b[:, :6])
        assert not torch.equal(a[:, 6:], b[:, 6:])


def states(batch: Eagle3TargetBatch) -> tuple[Any, ...]:
    return batch.input_ids, batch.attention_mask, batch.aux_hidden_states, batch.lengths


def test_positions_restart_and_nothing_is_read_across_an_end() -> None:
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    assert positions(ids, (2, 3, 1)).tolist() == [[0, 1, 0, 1, 2, 0]]
    assert positions(ids.view(2, 3), ()).tolist() == [[0, 1, 2]] * 2
    assert shifted(ids, (2, 3, 1)).tolist() == [[2, 0, 4, 5, 0, 0]]
    assert shifted(ids.view(2, 3), ()).tolist() == [[2, 3, 0], [5, 6, 0]]


def test_any_cut_in_bins_has_all_and_none_is_too_full() -> None:
    from trainer_client.training.data import in_bins

    draw = random.Random(0)
    for _ in range(50):
        lengths = [draw.randint(1, 100) for _ in range(draw.randint(1, 40))]
        numbers = draw.sample(range(len(lengths)), draw.randint(0, len(lengths)))
        bins = in_bins(numbers, lengths, 100)
        assert sorted(number for each in bins for number in each) == sorted(numbers)
        full = [sum(lengths[number] for number in each) for each in bins]
        assert all(0 < each <= 100 for each in full)
        assert sum(each <= 50 for each in full) <= 1  # else two would have been one
