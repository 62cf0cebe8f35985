"""The chunked loss and attention against their plain definitions, and what memory they take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer_client.eagle3 import attention, loss
from trainer_client.eagle3.attention import unrolled_attention
from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.eagle3.loss import head_loss
from trainer_client.eagle3.supervision import of_logits, of_probs
from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.targets.batch import LmHeadRows
from worker.supervision.topk import top_probs

B, T, H, D, V, DEPTHS = 2, 11, 8, 24, 40, 4
SELECTED = torch.arange(0, 3 * D // 2).masked_select(torch.arange(3 * D // 2) % 3 != 2)
WEIGHTS = [0.8**depth for depth in range(DEPTHS)]


def known(seed: int = 1) -> Tensor:
    return torch.rand(B, T, generator=torch.Generator().manual_seed(seed)) > 0.4


def guesses_and_head(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    guesses = [torch.randn(B, T, H, dtype=dtype, requires_grad=True) for _ in range(DEPTHS)]
    return guesses, torch.randn(D, H, dtype=dtype, requires_grad=True)


def plain_loss(guesses: list[Tensor], head: Tensor, probs: Tensor, known: Tensor) -> Tensor:
    """The definition, with everything whole."""
    total = torch.zeros(())
    for depth, guess in enumerate(guesses):
        logits = (guess[:, : T - depth] @ head.T).float()
        entropy = -(probs[:, depth:] * torch.log_softmax(logits, -1)).sum(-1)
        there = known[:, depth:]
        total = total + WEIGHTS[depth] * (entropy * there).sum() / there.sum().clamp_min(1)
    return total / sum(WEIGHTS)


@pytest.fixture(params=[1, 5, 10_000])
def chunk_slots(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", request.param * 4 * D)
    return int(request.param)


@pytest.mark.usefixtures("chunk_slots")
def test_loss_and_gradients_are_those_of_the_definition() -> None:
    probs = torch.softmax(torch.randn(B, T, D), -1)
    guesses, head = guesses_and_head()
    ours = head_loss(guesses, head, of_probs(probs, known()), WEIGHTS).loss
    wanted = plain_loss(guesses, head, probs, known())
    torch.testing.assert_close(ours, wanted)
    variables = (*guesses, head)
    for mine, theirs in zip(
        torch.autograd.grad(3 * ours, variables),
        torch.autograd.grad(3 * wanted, variables),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)


def test_the_size_of_chunks_changes_the_loss_by_rounding_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    probs = torch.softmax(torch.randn(B, T, D), -1)
    guesses, head = guesses_and_head()
    found = []
    for slots in (1, 7, 1000):
        monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", slots * 4 * D)
        found.append(head_loss(guesses, head, of_probs(probs, known()), WEIGHTS))
    for one in found[1:]:
        torch.testing.assert_close(one.depth_losses, found[0].depth_losses, rtol=1e-6, atol=0)
        assert torch.equal(one.correct, found[0].correct)


def test_slots_without_supervision_have_no_gradient() -> None:
    guesses, head = guesses_and_head()
    probs = torch.softmax(torch.randn(B, T, D), -1)
    head_loss(guesses, head, of_probs(probs, known()), WEIGHTS).loss.backward()
    for depth, guess in enumerate(guesses):
        there = torch.zeros(B, T, dtype=torch.bool)
        there[:, : T - depth] = known()[:, depth:]
        assert guess.grad is not None
        assert torch.equal(guess.grad.abs().sum(-1) > 0, there)


def test_a_batch_without_supervision_has_no_loss_and_no_gradient() -> None:
    guesses, head = guesses_and_head()
    nothing = of_probs(torch.softmax(torch.randn(B, T, D), -1), torch.zeros(B, T, dtype=torch.bool))
    found = head_loss(guesses, head, nothing, WEIGHTS)
    found.loss.backward()
    assert float(found.loss.detach()) == 0
    assert head.grad is not None
    assert not head.grad.any()


def test_without_gradients_none_are_taken() -> None:
    guesses, head = guesses_and_head()
    probs = torch.softmax(torch.randn(B, T, D), -1)
    with torch.no_grad():
        found = head_loss(guesses, head, of_probs(probs, known()), WEIGHTS)
    assert not found.loss.requires_grad
    torch.testing.assert_close(found.loss, plain_loss(guesses, head, probs, known()).detach())


def test_gradients_are_given_once_and_a_second_time_is_an_error() -> None:
    guesses, head = guesses_and_head()
    probs = torch.softmax(torch.randn(B, T, D), -1)
    found = head_loss(guesses, head, of_probs(probs, known()), WEIGHTS)
    found.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="taken once; run the forward again"):
        found.loss.backward()


def test_low_precision_is_that_of_autocast() -> None:
    probs = torch.softmax(torch.randn(B, T, D), -1)
    guesses, head = guesses_and_head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = head_loss(guesses, head, of_probs(probs, known()), WEIGHTS).loss
        wanted = plain_loss(guesses, head, probs, known())
    variables = (*guesses, head)
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(ours, variables), torch.autograd.grad(wanted, variables), strict=True
    ):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, atol=2e-3, rtol=2e-2)


def test_probs_of_logits_have_the_bits_of_the_workers_softmax() -> None:
    logits = torch.randn(B, T, V)
    whole = torch.softmax(logits[..., SELECTED].float(), -1)
    supervision = of_logits(logits, known(), SELECTED)
    for slots in supervision.slots.split(3):
        assert torch.equal(supervision.probs(slots), whole.flatten(0, 1)[slots])


# -- attention ------------------------------------------------------------------------------------


def plain_attention(
    queries: Tensor, keys: list[Tensor], values: list[Tensor], mask: Tensor
) -> Tensor:
    """Slot by slot: all real slots up to it at depth 0, then itself at every depth."""
    batch, _, length, size = queries.shape
    out = torch.zeros_like(queries)
    for row in range(batch):
        for slot in range(length):
            seen = [at for at in range(slot + 1) if mask[row, at]]
            k = torch.cat([keys[0][row][:, seen], *[key[row][:, [slot]] for key in keys[1:]]], 1)
            v = torch.cat([values[0][row][:, seen], *[v[row][:, [slot]] for v in values[1:]]], 1)
            scores = torch.einsum("hd,hkd->hk", queries[row, :, slot], k) * size**-0.5
            out[row, :, slot] = torch.einsum("hk,hkd->hd", torch.softmax(scores, -1), v)
    return out


@pytest.mark.parametrize("block", [3, 4, 11, 64])
@pytest.mark.parametrize("depths", [1, 3])
def test_attention_is_the_papers_whatever_the_block(
    block: int, depths: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERY_BLOCK", block)
    torch.manual_seed(0)
    queries, *rest = [torch.randn(B, 2, T, 4, requires_grad=True) for _ in range(1 + 2 * depths)]
    keys, values = rest[:depths], rest[depths:]
    mask = torch.ones(B, T, dtype=torch.int64)
    mask[1, 8:] = 0
    ours = unrolled_attention(queries, keys, values, mask)
    wanted = plain_attention(queries, keys, values, mask)
    torch.testing.assert_close(ours, wanted)
    pull = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad((ours * pull).sum(), (queries, *rest)),
        torch.autograd.grad((wanted * pull).sum(), (queries, *rest)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


# -- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made, in elements; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0
        self.made_by = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(t.untyped_storage()) for t in tree_leaves(args) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        for each in made:
            if id(each.untyped_storage()) not in given and each.numel() > self.elements:
                self.elements, self.made_by = each.numel(), f"{func} {tuple(each.shape)}"
        return out


LONG, WIDE = 512, 640  # [T, D] is far beyond all else that a small draft makes


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch) -> Eagle3Unroll:
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", 32 * 4 * WIDE)
    monkeypatch.setattr(attention, "QUERY_BLOCK", 64)
    config = DraftConfig(
        vocab_size=2 * WIDE,
        draft_vocab_size=WIDE,
        target_hidden_size=16,
        hidden_size=16,
        intermediate_size=16,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=2 * LONG,
    )
    torch.manual_seed(0)
    return Eagle3Unroll(Eagle3Draft(config, torch.arange(WIDE)), depths=2)


def wide_inputs(encoding: str) -> dict[str, Any]:
    ids = torch.randint(0, 2 * WIDE, (1, LONG))
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "loss_mask": torch.ones_like(ids),
        "aux_hidden_states": torch.randn(1, LONG, 48),
    }
    if encoding == "logits":
        return inputs | {"target_logits": torch.randn(1, LONG, 2 * WIDE)}
    inputs["position_mask"] = torch.ones(1, LONG, 1, dtype=torch.bool)
    if encoding == "probs":
        return inputs | {"target_probs": torch.softmax(torch.randn(1, LONG, WIDE), -1)}
    if encoding == "topk":
        return inputs | top_probs(torch.randn(1, LONG, WIDE), torch.arange(WIDE), k=8)
    head = LmHeadRows(torch.randn(WIDE, 16))
    return inputs | {"last_hidden_state": torch.randn(1, LONG, 16), "lm_head": head}


@pytest.mark.parametrize("encoding", ["probs", "hidden", "topk", "logits"])
def test_a_step_makes_nothing_as_large_as_tokens_times_draft_vocab(
    encoding: str, wide: Eagle3Unroll
) -> None:
    inputs = wide_inputs(encoding)
    with Largest() as largest:
        wide(**inputs).loss.backward()
    # a chunk of logits of the whole vocabulary, or a block of scores, is the largest there is
    assert largest.elements <= max(32 * 2 * WIDE, 2 * 64 * (LONG + 1)), largest.made_by
    assert largest.elements < LONG * WIDE / 4


def test_the_recorder_sees_a_step_that_is_not_chunked(
    wide: Eagle3Unroll, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loss.CHUNK_BYTES, "cpu", LONG * 4 * WIDE)
    inputs = wide_inputs("hidden")
    with Largest() as largest:
        wide(**inputs).loss.backward()
    assert largest.elements >= LONG * WIDE
