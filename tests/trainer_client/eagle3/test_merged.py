"""Merged attention against the reference: the same numbers, and the reference where it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.trainer_client.eagle3.test_draft import CONFIG
from trainer_client.eagle3 import merged
from trainer_client.eagle3.attention import unrolled_attention
from trainer_client.eagle3.draft import Eagle3Draft, TTTCache
from trainer_client.eagle3.merged import merged_attention, usable

B, HEADS, T, SIZE = 2, 4, 300, 16


def drawn(depths: int, kv_heads: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Queries, then keys of each depth, then values of each depth."""
    torch.manual_seed(0)
    shapes = [(B, HEADS, T, SIZE)] + [(B, kv_heads, T, SIZE)] * (2 * depths)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("depths", [1, 2, 7])
def test_outputs_and_gradients_are_the_references(depths: int, kv_heads: int) -> None:
    tensors = drawn(depths, kv_heads)
    queries, keys, values = tensors[0], tensors[1 : 1 + depths], tensors[1 + depths :]
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 280:] = 0  # on the right: no real slot sees it
    ours = merged_attention(queries, keys, values)
    wanted = unrolled_attention(queries, keys, values, mask)
    real = mask.bool()[:, None, :, None]
    torch.testing.assert_close(ours * real, wanted * real, atol=1.5e-6, rtol=0)
    pull = torch.randn_like(wanted) * real
    for mine, theirs in zip(
        torch.autograd.grad((ours * pull).sum(), tensors),
        torch.autograd.grad((wanted * pull).sum(), tensors),
        strict=True,
    ):
        assert float((mine - theirs).abs().max()) < 1.5e-6 * max(1.0, float(theirs.abs().max()))


def test_repeated_runs_have_equal_bits() -> None:
    tensors = drawn(3, 2)
    runs = []
    for _ in range(2):
        out = merged_attention(tensors[0], tensors[1:4], tensors[4:])
        runs.append([out, *torch.autograd.grad(out.square().sum(), tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def masks() -> list[tuple[str, Tensor, bool]]:
    right = torch.ones(B, T, dtype=torch.int64)
    right[0, 200:] = 0
    return [
        ("none", torch.ones(B, T, dtype=torch.bool), True),
        ("right", right, True),
        ("left", right.flip(1), False),
        ("within", torch.cat((right[:, 150:], right[:, :150]), 1), False),
    ]


@pytest.mark.parametrize(("where", "mask", "serves"), masks(), ids=lambda value: str(value)[:6])
def test_padding_must_be_on_the_right(where: str, mask: Tensor, serves: bool) -> None:
    assert usable(torch.empty(B, HEADS, T, SIZE), mask) == serves


def test_what_it_does_not_serve() -> None:
    mask = torch.ones(B, T)
    assert not usable(torch.empty(B, HEADS, 256, SIZE), torch.ones(B, 256))
    assert not usable(torch.empty(B, HEADS, T, SIZE, dtype=torch.float64), mask)
    assert not usable(torch.empty(B, HEADS, T, SIZE, device="meta"), mask)


def test_a_torch_without_the_private_operators_takes_the_reference(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(merged, "_aten", object())
    assert not usable(torch.empty(B, HEADS, T, SIZE), torch.ones(B, T))


@pytest.mark.parametrize("attention", ["auto", "reference"])
def test_a_draft_chooses_once_for_all_depths(attention: str) -> None:
    torch.manual_seed(0)
    draft = Eagle3Draft(CONFIG, torch.arange(CONFIG.draft_vocab_size))
    draft.attention = attention
    ids = torch.randint(0, CONFIG.vocab_size, (1, T))
    hidden, cache = torch.randn(1, T, CONFIG.hidden_size), TTTCache()
    for _ in range(2):
        hidden = draft.step(ids, hidden, cache, torch.ones_like(ids))
    assert cache.merged == (attention == "auto")
