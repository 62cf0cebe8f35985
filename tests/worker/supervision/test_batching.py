from __future__ import annotations

from typing import Any

import pytest
import torch

from broker.peer.tensors import from_packet
from broker.protocol import Limits, Packet
from broker.protocol import messages as m
from tests.vocab import shuffled
from tests.worker.supervision.requests import generate, offer
from tests.worker.targets.tiny_models import VOCAB, make, shared
from worker.answers import Answerer, Work
from worker.errors import TargetError
from worker.supervision.batching import compute_together
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_supervision, padded
from worker.targets.contract import describe
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.stub import StubTarget

MAPPING = VocabMapping(shuffled(torch.arange(1, VOCAB, 3)), VOCAB)
SHAPES = [(2, 12), (1, 5), (3, 30), (1, 1)]


def requests(seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Token ids and masks of several shapes; the first has padding of its own, on the right."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for shape in SHAPES:
        ids = torch.randint(8, VOCAB, shape, generator=draw)
        loss_mask = torch.randint(0, 2, shape, generator=draw)
        made.append(
            {"input_ids": ids, "attention_mask": torch.ones_like(ids), "loss_mask": loss_mask}
        )
    made[0]["input_ids"][1, 7:] = 0
    made[0]["attention_mask"][1, 7:] = 0
    made[0]["loss_mask"][1, 7:] = 0
    return made


def test_padding_is_on_the_right_and_not_attended_to() -> None:
    given = requests()
    batch = padded(given)
    assert {name: tuple(tensor.shape) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "loss_mask"), (7, 30)
    )
    assert torch.equal(batch["input_ids"][:2, :12], given[0]["input_ids"])
    assert not batch["attention_mask"][:2, 12:].any()
    assert torch.equal(batch["attention_mask"][3:6], given[2]["attention_mask"])


KINDS = ["llama", "qwen3", "mistral", "gemma2", "phi3", "gpt2", "gpt_neox", "opt"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_gets_what_it_gets_alone_to_the_last_bits(kind: str) -> None:
    target = HuggingFaceTarget(shared(kind), name=kind)
    assert target.batchable
    given = requests()
    for encoding in set(target.encodings) & {"probs", "hidden"}:
        made = compute_together(target, given, mapping=MAPPING, encodings=[encoding] * len(given))
        for tokens, got in zip(given, made, strict=True):
            alone = compute_supervision(target, **tokens, mapping=MAPPING, encoding=encoding)
            assert list(got) == list(alone)
            seen = tokens["attention_mask"].bool()  # what padding gets is nobody's
            for name in ("input_ids", "loss_mask"):
                assert torch.equal(got[name], alone[name])
            for name in ("aux_hidden_states", "target_probs", "last_hidden_state"):
                if name in got:
                    kept = seen if name == "aux_hidden_states" else seen.roll(-1, 1) & seen
                    torch.testing.assert_close(
                        got[name][kept], alone[name][kept], rtol=1e-4, atol=2e-5
                    )


def test_what_a_request_gets_is_not_changed_by_who_is_beside_it() -> None:
    target = StubTarget(vocab_size=VOCAB)
    given = requests()
    made = compute_together(target, given, mapping=MAPPING, encodings=["hidden"] * len(given))
    for tokens, got in zip(given, made, strict=True):
        alone = compute_supervision(target, **tokens, mapping=MAPPING, encoding="hidden")
        for name, tensor in alone.items():
            assert torch.equal(got[name], tensor), name
    assert target.calls == 1 + len(SHAPES)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_rope_that_looks_at_the_longest_row_is_not_batchable(kind: str) -> None:
    model = make("llama")
    target = HuggingFaceTarget(model, name="plain")
    assert target.batchable
    target.close()
    model.config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    assert not HuggingFaceTarget(model, name="by length").batchable
    model.config.rope_parameters = {"full_attention": {"rope_type": kind}, "sliding": {}}
    assert not HuggingFaceTarget(model, name="by length, in some layers").batchable


def test_shifted_outputs_are_not_cut_apart() -> None:
    foreign = ForeignTarget(StubTarget(vocab_size=VOCAB), "theirs")
    assert not foreign.batchable
    with pytest.raises(TargetError, match="gives shifted outputs"):
        compute_together(
            foreign, requests(), mapping=MAPPING, encodings=["probs"] * len(requests())
        )


class Picky(StubTarget):
    """Fails for a batch with a certain token, and remembers the shapes that it saw."""

    def __init__(self, poison: int = -1) -> None:
        super().__init__(vocab_size=VOCAB)
        self.poison = poison
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.shapes.append(tuple(input_ids.shape))
        if (input_ids == self.poison).any():
            raise RuntimeError("poisoned")
        return super().forward(input_ids, *args, **kwargs)


def answers(target: StubTarget, packets: list[Packet]) -> list[Packet]:
    answerer = Answerer(target, describe(target), "w")
    answerer.learn(offer(MAPPING))
    works = [Work(packet) for packet in packets]
    answerer.compute(works)
    return [answerer.finish(work, Limits())[0] for work in works]


def said(answer: Packet) -> str:
    message = answer.message
    return f"{message.code}: {message.text}" if isinstance(message, m.Failure) else "reply"


IDS = torch.arange(8, 20).view(2, 6)


def test_requests_in_one_forward_are_answered_each_by_itself() -> None:
    target = Picky()
    packets = [generate(1, IDS, MAPPING), generate(2, IDS[:1, :3] + 40, MAPPING)]
    together = answers(target, packets)
    assert target.shapes == [(3, 6)]
    for packet, answer in zip(packets, together, strict=True):
        (alone,) = answers(target, [packet])
        assert isinstance(answer.message, m.Reply)
        assert isinstance(alone.message, m.Reply)
        assert answer.message.id == packet.message.id  # type: ignore[union-attr]
        assert answer.message.tokens_hash == alone.message.tokens_hash
        assert answer.message.manifest == alone.message.manifest
        got = from_packet(answer)
        for name, tensor in from_packet(alone).items():
            torch.testing.assert_close(got[name], tensor)


def test_the_time_of_a_forward_is_shared_by_tokens() -> None:
    target = StubTarget(vocab_size=VOCAB)
    packets = [generate(1, IDS, MAPPING), generate(2, IDS[:1, :4], MAPPING)]
    first, second = (answer.message.compute_s for answer in answers(target, packets))  # type: ignore[union-attr]
    assert first == pytest.approx(3 * second)


def test_one_bad_request_does_not_fail_those_it_came_with() -> None:
    target = Picky()
    packets = [
        generate(1, IDS, MAPPING),
        generate(2, IDS + VOCAB, MAPPING),
        generate(3, IDS, MAPPING, loss_mask=torch.ones(2, 6)),
        generate(4, IDS, MAPPING),
    ]
    found = [said(answer) for answer in answers(target, packets)]
    assert (found[0], found[3]) == ("reply", "reply")
    assert found[1].startswith(f"bad_request: input_ids[0, 0] is {8 + VOCAB}")
    assert found[2].startswith("bad_request: loss_mask is torch.float32")
    assert target.shapes == [(4, 6)]


def test_when_the_forward_of_several_fails_only_the_one_that_is_to_blame_does() -> None:
    target = Picky(poison=99)
    poisoned = IDS.clone()
    poisoned[1, 1] = 99
    packets = [generate(1, IDS, MAPPING), generate(2, poisoned, MAPPING)]
    found = [said(answer) for answer in answers(target, packets)]
    assert found == ["reply", "target_failed: RuntimeError: poisoned"]
    assert target.shapes == [(4, 6), (2, 6), (2, 6)]
