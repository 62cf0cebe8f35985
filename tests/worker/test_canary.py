"""A target that mixes prompts, or is not what it says, is refused before it attaches."""

from __future__ import annotations

from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.worker.targets.tiny_models import MAKERS, make, shared
from worker.canary import check, prove
from worker.errors import TargetError
from worker.targets.contract import TargetBatch, TargetOutputs
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.stub import StubTarget


@pytest.mark.parametrize("kind", MAKERS)
def test_a_sound_target_passes(kind: str) -> None:
    target = HuggingFaceTarget(shared(kind), name=kind)
    prove(target)
    prove(ForeignTarget(target, kind))
    target.close()


class Mixing(StubTarget):
    """Gives the rows of its batch in another order."""

    def forward(self, *args: Any, **more: Any) -> TargetOutputs:
        made = super().forward(*args, **more)
        return replace(made, aux_hidden_states=made.aux_hidden_states.flip(0))


class Remembering(StubTarget):
    """Gives the states of the prompt before."""

    before: Tensor | None = None

    def forward(self, input_ids: Tensor, *args: Any, **more: Any) -> TargetOutputs:
        previous, self.before = self.before, input_ids
        same = previous is not None and previous.shape == input_ids.shape
        return super().forward(previous if same else input_ids, *args, **more)


@pytest.mark.parametrize("kind", [Mixing, Remembering])
def test_rows_of_another_prompt_are_refused(kind: type[StubTarget]) -> None:
    with pytest.raises(TargetError, match=r"the canary: .* is off by .* and 0.0001 is allowed"):
        prove(kind())


class Wrapper:
    """The co-located contract over a model, with one thing that is wrong."""

    def __init__(self, fault: str) -> None:
        self._right = HuggingFaceTarget(make("llama"), name="llama")
        self._fault = fault
        self.model = self._right.model
        self.aux_layer_ids = self._right.aux_layer_ids

    def get_input_embeddings(self) -> Any:
        return self._right.get_input_embeddings()

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> TargetBatch:
        made = self._right.generate_batch(input_ids, attention_mask, loss_mask)
        if self._fault == "swapped layers":
            low, middle, high = made.aux_hidden_states.chunk(3, -1)
            return replace(made, aux_hidden_states=torch.cat((middle, low, high), -1))
        last = self._right.forward(input_ids, attention_mask).last_hidden_state
        assert last is not None
        norm = {"no final norm": 0.25, "another norm": 1.5}.get(self._fault, 1.0)
        logits = self.model.lm_head(last * norm)
        return replace(made, logits=torch.cat((logits[:, 1:], logits[:, :1] * 0), dim=1))


def test_a_wrapper_is_compared_with_its_model_by_transformers() -> None:
    prove(ForeignTarget(Wrapper(""), "right"))


@pytest.mark.parametrize(
    ("fault", "where"),
    [
        ("swapped layers", "layer 1 in transformers' own forward"),
        ("no final norm", "the logits in transformers' own forward"),
        ("another norm", "the logits in transformers' own forward"),
    ],
)
def test_a_wrapper_that_is_wrong_is_refused(fault: str, where: str) -> None:
    with pytest.raises(TargetError, match=where):
        prove(ForeignTarget(Wrapper(fault), "wrong"))


def test_lowest_layers_alone_can_be_the_reference() -> None:
    target = HuggingFaceTarget(make("llama"), name="llama")
    deeper = HuggingFaceTarget(make("llama"), name="llama", aux_layer_ids=(0, 1, 2))
    check(target, deeper)
    other = make("llama")
    torch.nn.init.normal_(other.model.layers[1].mlp.up_proj.weight)
    with pytest.raises(TargetError, match="layer 1 in transformers'"):
        check(target, HuggingFaceTarget(other, name="llama", aux_layer_ids=(0, 1, 2)))


class Routed(StubTarget):
    """Says that it chooses experts, and gives states that are off by a part of their norm in every
    second forward.
    """

    def __init__(self, off: float) -> None:
        super().__init__()
        config = SimpleNamespace(**asdict(self.model.config), num_experts=4)
        self.model = SimpleNamespace(config=config)
        self._off, self._calls = off, 0

    def forward(self, *args: Any, **more: Any) -> TargetOutputs:
        made = super().forward(*args, **more)
        self._calls += 1
        factor = 1 + self._off * (self._calls % 2)
        return replace(made, aux_hidden_states=made.aux_hidden_states * factor)


def test_where_experts_are_chosen_roundings_are_allowed_and_other_states_are_not() -> None:
    prove(Routed(0.1))
    for off in (0.6, float("nan")):
        with pytest.raises(TargetError, match=r"off by .* and 0.3 is allowed|off by nan"):
            prove(Routed(off))
