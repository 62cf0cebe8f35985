from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.vocab import shuffled
from worker.supervision.mapping import VocabMapping
from worker.supervision.projection import draft_probs
from worker.supervision.supervision import compute_supervision
from worker.targets.contract import shift_left
from worker.targets.stub import StubTarget

B, T, V, D = 2, 37, 4096, 512
SELECTED = shuffled(torch.arange(3, 3 + 7 * D, 7))


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=str)
def logits(request: pytest.FixtureRequest) -> torch.Tensor:
    draw = torch.Generator().manual_seed(0)
    return (torch.randn(B, T, V, generator=draw) * 4).to(request.param)


class Made(TorchDispatchMode):
    """Elements of each new piece of memory that operations make, by dtype; views are none."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[torch.dtype, list[int]] = defaultdict(list)
        self._known: list[torch.UntypedStorage] = []  # kept, so that no address comes twice

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            self._new(tensor)
        result = func(*args, **(kwargs or {}))
        if self._new(result):
            self.elements[result.dtype].append(result.numel())
        return result

    def _new(self, tensor: Any) -> bool:
        if not isinstance(tensor, torch.Tensor):
            return False
        storage = tensor.untyped_storage()
        known = any(storage.data_ptr() == other.data_ptr() for other in self._known)
        if not known:
            self._known.append(storage)
        return not known


@pytest.mark.parametrize("rows", [1, 2, 5, 36, 37, 1000])
def test_where_it_is_cut_changes_no_bit(logits: torch.Tensor, rows: int) -> None:
    whole = torch.softmax(shift_left(logits[..., SELECTED]).float(), dim=-1)
    assert torch.equal(
        draft_probs(logits, SELECTED, shifted=False, chunk_values=rows * D + 1), whole
    )
    moved = shift_left(logits)
    assert torch.equal(draft_probs(moved, SELECTED, shifted=True, chunk_values=rows * D), whole)


def test_a_draft_vocab_larger_than_a_chunk_goes_row_by_row(logits: torch.Tensor) -> None:
    whole = torch.softmax(shift_left(logits[..., SELECTED]).float(), dim=-1)
    assert torch.equal(draft_probs(logits, SELECTED, shifted=False, chunk_values=1), whole)


def test_one_token_has_nothing_after_it(logits: torch.Tensor) -> None:
    probs = draft_probs(logits[:, :1], SELECTED, shifted=False)
    assert torch.equal(probs, torch.softmax(torch.zeros(B, 1, D), dim=-1))


def test_beside_the_result_only_chunks_are_made(logits: torch.Tensor) -> None:
    with Made() as made:
        draft_probs(logits, SELECTED, shifted=False, chunk_values=4 * D)
    sizes = sorted(size for elements in made.elements.values() for size in elements)
    assert sizes[-1] == B * T * D
    assert sizes[-2] == 4 * D


def test_a_view_of_a_larger_batch_is_not_copied(logits: torch.Tensor) -> None:
    with Made() as made:
        draft_probs(logits[:1, :20], SELECTED, shifted=False, chunk_values=4 * D)
    assert max(max(elements) for elements in made.elements.values()) == 20 * D


@pytest.mark.parametrize("encoding", ["probs", "hidden"])
def test_no_encoding_makes_a_float32_copy_of_the_whole_vocabulary(encoding: str) -> None:
    target = StubTarget(vocab_size=V, hidden_size=8, dtype=torch.bfloat16)
    ids = torch.arange(B * T).view(B, T)
    ones = torch.ones_like(ids)
    with Made() as made:
        compute_supervision(
            target, ids, ones, ones, mapping=VocabMapping(SELECTED, V), encoding=encoding
        )
    assert max(made.elements[torch.bfloat16]) == B * T * V  # the target's own logits
    assert max(made.elements[torch.float32], default=0) <= B * T * D
