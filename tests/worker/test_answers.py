"""The real answerer with damaged and wrong requests: what is wrong is said, and to one only."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from broker.peer.tensors import to_frames
from broker.protocol import Limits, Packet, encode
from broker.protocol import messages as m
from tests.vocab import shuffled
from tests.worker.supervision.requests import generate, offer
from worker.answers import Answerer, Work
from worker.supervision.mapping import VocabMapping
from worker.targets.contract import describe
from worker.targets.stub import StubTarget

VOCAB = 64
MAPPING = VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)
IDS = torch.arange(8, 20).view(2, 6)
GOOD = generate(1, IDS, MAPPING)


@pytest.fixture
def answerer() -> Answerer:
    target = StubTarget(vocab_size=VOCAB)
    made = Answerer(target, describe(target), "w")
    made.learn(offer(MAPPING))
    return made


def failure(answerer: Answerer, packet: Packet, limits: Limits | None = None) -> str:
    answer = answerer.answer(packet, limits or Limits())[0].message
    assert isinstance(answer, m.Failure), answer
    assert answer.id == packet.message.id  # type: ignore[union-attr]
    good = answerer.answer(GOOD, Limits())[0].message
    assert isinstance(good, m.Reply)  # nothing is left of the bad one
    return f"{answer.code}: {answer.text}"


def changed(**fields: Any) -> Packet:
    """The good request, with other fields and the payload that it had."""
    message = dataclasses.replace(GOOD.message, **fields)  # type: ignore[type-var]
    return encode(message, GOOD.payload)


def with_tensors(tensors: dict[str, torch.Tensor]) -> Packet:
    manifest, payload = to_frames(tensors)
    return encode(dataclasses.replace(GOOD.message, manifest=manifest), payload)  # type: ignore[type-var]


ONES = torch.ones_like(IDS)


@pytest.mark.parametrize(
    ("packet", "says"),
    [
        (generate(2, IDS.float(), MAPPING), "bad_request: input_ids is torch.float32"),
        (generate(2, IDS[0], MAPPING), r"bad_request: input_ids must be [batch, tokens], got"),
        (generate(2, IDS + 50, MAPPING), "bad_request: input_ids[1, 0] is 64, and the target's"),
        (generate(2, IDS - 9, MAPPING), "bad_request: input_ids[0, 0] is -1"),
        (generate(2, IDS[:, :0], MAPPING), "bad_request: the batch is empty"),
        (
            generate(2, torch.ones(1, 600, dtype=torch.int64), MAPPING),
            "bad_request: the sequences have 600 tokens, the target has positions for 512",
        ),
        (
            generate(2, IDS, MAPPING, loss_mask=ONES[:, :4]),
            "bad_request: loss_mask has shape (2, 4), input_ids (2, 6)",
        ),
        (
            generate(2, IDS, VocabMapping(shuffled(torch.arange(3)), VOCAB)),
            "bad_request: no usable vocab mapping",
        ),
        (changed(encoding="smoke"), "bad_request: 'smoke' is no wish of supervision"),
        (changed(encoding="probs;rows=0-7"), "bad_request: rows=0-7 is asked for, and there are 6"),
        (changed(operation="sing"), "bad_request: unknown operation 'sing'; known are generate"),
        (with_tensors({"input_ids": IDS}), "bad_request: wants the tensors ('input_ids',"),
        (with_tensors({}), "bad_request: wants the tensors"),
        (
            with_tensors({"loss_mask": ONES, "input_ids": IDS, "attention_mask": ONES}),
            "bad_request: wants the tensors ('input_ids',",
        ),
    ],
)
def test_a_wrong_request_is_answered_with_what_is_wrong(
    answerer: Answerer, packet: Packet, says: str
) -> None:
    assert failure(answerer, packet).startswith(says)


@pytest.mark.parametrize("operation", ["lm_head_rows", "generate"])
def test_a_mapping_that_was_forgotten_is_asked_for(answerer: Answerer, operation: str) -> None:
    answerer.forget(MAPPING.id)
    answer = answerer.answer(changed(operation=operation), Limits())[0].message
    assert isinstance(answer, m.Failure)
    assert answer.text.startswith(f"no usable vocab mapping '{MAPPING.id}' came before")


@pytest.mark.parametrize("frame", [1, 2, 3])
def test_a_flipped_bit_counts_as_lost_on_the_way(answerer: Answerer, frame: int) -> None:
    damaged = bytearray(GOOD.frames[frame])
    damaged[17] ^= 4
    frames = (*GOOD.frames[:frame], bytes(damaged), *GOOD.frames[frame + 1 :])
    text = failure(answerer, dataclasses.replace(GOOD, frames=frames))
    assert text.startswith(f"damaged: payload frame {frame - 1} of Request is damaged")


def test_a_tensor_that_was_cut_off_counts_as_lost_on_the_way(answerer: Answerer) -> None:
    frames = (*GOOD.frames[:-1], bytes(GOOD.frames[-1])[:-8])
    assert failure(answerer, dataclasses.replace(GOOD, frames=frames)).startswith("damaged: ")


def test_a_reply_over_the_brokers_limit_says_both_numbers(answerer: Answerer) -> None:
    text = failure(answerer, GOOD, Limits(max_reply_bytes=1000))
    assert text.startswith("too_large: cannot send Reply: the payload has ")
    assert text.endswith("the limit is 1000")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (RuntimeError("CUDA error: out of memory"), "target_failed: RuntimeError: CUDA error"),
        (KeyError("layer"), "target_failed: KeyError: 'layer'"),
        (ValueError("x" * 10_000), "target_failed: ValueError: xxx"),
    ],
)
def test_what_the_target_raises_is_told(error: Exception, says: str) -> None:
    target = StubTarget(vocab_size=VOCAB, failures={0: error})
    answerer = Answerer(target, describe(target), "w")
    answerer.learn(offer(MAPPING))
    text = failure(answerer, generate(3, IDS, MAPPING))
    assert text.startswith(says)
    assert len(text) < 5000


def test_a_mapping_for_another_vocabulary_is_not_kept(answerer: Answerer) -> None:
    other = VocabMapping(shuffled(torch.arange(9)), 32)
    with pytest.raises(ValueError, match="for a vocabulary of 32, this target has 64"):
        answerer.learn(offer(other))
    assert other.id not in answerer.mappings


@pytest.mark.parametrize("together", [False, True])
def test_an_answer_is_of_as_many_slots_as_were_asked_for(
    answerer: Answerer, together: bool
) -> None:
    works = [Work(changed(encoding="probs;rows=0-4")), Work(changed())]
    for group in [works] if together else [[work] for work in works]:
        answerer.compute(group)
    for work, slots in zip(works, (4, 6), strict=True):
        (answer,) = answerer.finish(work, Limits())
        assert isinstance(answer.message, m.Reply), answer.message
        assert {spec.shape[1] for spec in answer.message.manifest} == {slots}
