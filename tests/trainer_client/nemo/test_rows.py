"""Rows without their padding, and what comes back as long as it was."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer_client.nemo import standin
from worker.targets.contract import shift_left


@pytest.fixture(autouse=True)
def _nemo(monkeypatch: pytest.MonkeyPatch) -> None:
    standin.install(monkeypatch)


def masks(lengths: list[int], total: int) -> torch.Tensor:
    return (torch.arange(total)[None] < torch.tensor(lengths)[:, None]).long()


@given(
    lengths=st.lists(st.integers(0, 9), min_size=1, max_size=3),
    loss=st.integers(0, 9),
    trim=st.sampled_from(["exact", "fast", "off"]),
)
def test_what_comes_back_is_as_long_as_what_was_given(
    lengths: list[int], loss: int, trim: str
) -> None:
    from trainer_client.nemo.rows import Rows

    attention, loss_mask = masks(lengths, 9), masks([loss] * len(lengths), 9)
    ids = torch.arange(attention.numel()).view_as(attention)
    rows = Rows.of(ids, attention, loss_mask, trim)
    assert not attention[:, rows.length :].any()
    assert not loss_mask[:, rows.length :].any()
    asked = rows.asked[0]
    assert torch.equal(asked, ids[:, : asked.shape[1]])
    assert asked.shape[1] == (rows.length if trim == "fast" else 9)
    slots = rows.slots or asked.shape[1]
    assert slots == rows.length
    came = torch.randn(len(lengths), slots, 6)
    probs = torch.softmax(torch.randn(len(lengths), slots, 4), -1)
    known = torch.ones(len(lengths), slots, 1, dtype=torch.bool)
    whole = rows.whole(came, probs, known)
    assert {tensor.shape[1] for tensor in whole.values()} == {9}
    assert torch.equal(whole["input_ids"], shift_left(ids))
    assert torch.equal(whole["loss_mask"], shift_left(loss_mask))
    assert torch.equal(whole["attention_mask"], attention)
    assert torch.equal(whole["aux_hidden_states"][:, :slots], came)
    assert torch.equal(whole["target_probs"][:, :slots], probs)
    assert not whole["position_mask"][:, slots:].any()
    sums = whole["target_probs"].sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums))  # also where there is padding


def test_padding_on_the_left_stays() -> None:
    from trainer_client.nemo.rows import Rows

    attention = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 1]])
    ids = torch.arange(8).view(2, 4)
    assert Rows.of(ids, attention, attention, "exact").length == 4


def test_without_nemo_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("nemo_automodel")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nemo_automodel", None)
    with pytest.raises(ImportError, match=r"works inside NeMo AutoModel.*install nemo-automodel"):
        import trainer_client.nemo  # noqa: F401
