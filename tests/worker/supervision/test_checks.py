"""No value that is no number, and no tensor of another size, leaves a worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from broker.protocol import Limits
from broker.protocol import messages as m
from tests.vocab import shuffled
from tests.worker.supervision.requests import generate, offer
from worker.answers import Answerer
from worker.supervision.checks import name_unsound, soundness
from worker.supervision.mapping import VocabMapping
from worker.targets.contract import TargetOutputs, describe
from worker.targets.stub import StubTarget

IDS = torch.arange(12).view(2, 6)
MAPPING = VocabMapping(shuffled(torch.arange(0, 64, 2)), 64)


class Spoiling(StubTarget):
    """A stub whose outputs are changed before they are used."""

    def __init__(self, spoil: Callable[[TargetOutputs], TargetOutputs]) -> None:
        super().__init__()
        self._spoil = spoil

    def forward(self, *tokens: Any, **named: Any) -> TargetOutputs:
        return self._spoil(super().forward(*tokens, **named))


def put(
    name: str, place: tuple[int, ...], value: float
) -> Callable[[TargetOutputs], TargetOutputs]:
    def spoil(outputs: TargetOutputs) -> TargetOutputs:
        changed = getattr(outputs, name).clone()
        changed[place] = value
        return replace(outputs, **{name: changed})

    return spoil


def answered(target: StubTarget, encoding: str = "probs") -> m.Message:
    answerer = Answerer(target, describe(target), "w")
    answerer.learn(offer(MAPPING))
    return answerer.answer(generate(1, IDS, MAPPING, encoding=encoding), Limits())[0].message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_no_number_is_a_failure_that_says_where(value: float) -> None:
    target = Spoiling(put("aux_hidden_states", (1, 3, 20), value))
    failure = answered(target)
    assert isinstance(failure, m.Failure)
    assert failure.code == "target_failed"
    layer = target.aux_layer_ids[1]
    assert f"{value} in aux_hidden_states at row 1, position 3, layer {layer}" in failure.text


@pytest.mark.parametrize("encoding", ["probs", "hidden", "topk"])
def test_it_is_found_wherever_it_is(encoding: str) -> None:
    name = "last_hidden_state" if encoding == "hidden" else "logits"
    target = Spoiling(put(name, (0, 2, 4), float("nan")))
    assert isinstance(answered(target, encoding), m.Failure)
    assert isinstance(answered(StubTarget(), encoding), m.Reply)


def test_states_of_another_size_are_a_failure_with_both() -> None:
    def narrow(outputs: TargetOutputs) -> TargetOutputs:
        return replace(outputs, aux_hidden_states=outputs.aux_hidden_states[..., :32])

    failure = answered(Spoiling(narrow))
    assert isinstance(failure, m.Failure)
    assert "aux_hidden_states of shape (2, 6, 32), (2, 6, 48) was expected" in failure.text


def test_an_impossible_tokens_log_probability_is_minus_infinity() -> None:
    tensors = {"topk_log_probs": torch.tensor([[0.0, float("-inf")]])}
    assert bool(soundness(tensors))
    name_unsound(tensors, 16, (1, 2, 3))
    assert not bool(soundness({"topk_log_probs": torch.tensor([float("nan")])}))
    assert bool(soundness({}))


@pytest.mark.parametrize("error", [SystemExit(3), asyncio.CancelledError(), KeyboardInterrupt()])
def test_whatever_a_target_raises_is_its_failure(error: BaseException) -> None:
    def raise_it(outputs: TargetOutputs) -> TargetOutputs:
        raise error

    failure = answered(Spoiling(raise_it))
    assert isinstance(failure, m.Failure)
    assert failure.code == "target_failed"
    assert type(error).__name__ in failure.text


def test_a_text_that_is_none_does_not_end_the_worker() -> None:
    def raise_it(outputs: TargetOutputs) -> TargetOutputs:
        raise ValueError("half of a pair: \ud800")

    failure = answered(Spoiling(raise_it))
    assert isinstance(failure, m.Failure)
    assert "half of a pair: ?" in failure.text
