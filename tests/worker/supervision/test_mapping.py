from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from worker.supervision.mapping import VocabMapping

_INTEGERS = (torch.int64, torch.int32)


def in_any_order(ids: set[int]) -> st.SearchStrategy[list[int]]:
    return st.permutations(sorted(ids))


selections = st.integers(1, 200).flatmap(
    lambda size: st.tuples(
        st.sets(st.integers(0, size - 1), min_size=1).flatmap(in_any_order), st.just(size)
    )
)


@given(selections)
def test_d2t_and_mask_give_back_the_selection(selection: tuple[list[int], int]) -> None:
    ids, vocab_size = selection
    mapping = VocabMapping(torch.tensor(ids), vocab_size)
    assert (mapping.d2t + torch.arange(len(ids))).tolist() == ids
    assert mapping.t2d.nonzero().flatten().tolist() == sorted(ids)
    assert mapping.draft_vocab_size == len(ids)
    assert VocabMapping.from_mask_and_ids(torch.tensor(ids), mapping.t2d) == mapping


@given(selections, selections)
def test_equal_ids_mean_equal_content(a: tuple[list[int], int], b: tuple[list[int], int]) -> None:
    first, second = (VocabMapping(torch.tensor(ids), size) for ids, size in (a, b))
    assert (first.id == second.id) == (a == b)


def test_id_depends_on_content_only_and_not_on_dtype() -> None:
    wide, narrow = (VocabMapping(torch.tensor([1, 5, 7], dtype=d), 10) for d in _INTEGERS)
    # written down, so that it is the same in every process and version
    assert wide.id == narrow.id == "m76c86bba0d01cca1b199a8ca73278978"


def test_later_changes_of_the_callers_tensor_do_not_reach_the_mapping() -> None:
    ids = torch.tensor([1, 5, 7])
    mapping = VocabMapping(ids, 10)
    ids[0] = 3
    assert mapping.selected_token_ids.tolist() == [1, 5, 7]


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([3, 3, 4, 4, 9], r"duplicates: \[3, 4\]"),
        ([4, 3, 9, 4], r"duplicates: \[4\]"),
        ([1, 10], "has 10, and the target's vocabulary has 10 tokens"),
        ([-1, 2], "has -1"),
        ([[1, 2]], r"one dimension, got shape \(1, 2\)"),
        ([1.0, 2.0], "must be integers, got torch.float32"),
        ([True, False], "must be integers, got torch.bool"),
    ],
)
def test_bad_ids_are_named(ids: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VocabMapping(torch.tensor(ids), 10)


def test_an_empty_selection_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        VocabMapping(torch.zeros(0, dtype=torch.int64), 10)


@pytest.mark.parametrize(
    ("selected", "message"),
    [([1, 5, 6], "of token 6 the mask selects it, the ids do not"), ([1], "the ids do$")],
)
def test_a_mask_that_disagrees_is_named(selected: list[int], message: str) -> None:
    mask = torch.zeros(10, dtype=torch.bool)
    mask[selected] = True
    with pytest.raises(ValueError, match=message):
        VocabMapping.from_mask_and_ids(torch.tensor([1, 5]), mask)
