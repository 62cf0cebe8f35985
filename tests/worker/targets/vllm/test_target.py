"""A target in vLLM, with an engine whose states transformers computes; the real one is in
``tests/engines``."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.worker.targets.tiny_models import VOCAB, make, tokens
from worker.canary import prove
from worker.errors import BadRequest, TargetError, TargetGoneError
from worker.supervision.supervision import compute_packed, compute_supervision
from worker.targets import load_vllm_target
from worker.targets.contract import describe
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.vllm.rows import IN_PROCESS
from worker.targets.vllm.target import VllmTarget


class Engine:
    """As much of ``vllm.LLM`` as is used; ``spoil`` changes what it gives."""

    def __init__(self, folder: Path, layers: tuple[int, ...]) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder)
        self._target = HuggingFaceTarget(model, name="engine")
        self._wish = f"layers={','.join(map(str, layers))};last"
        self.spoil: Any = lambda states: states
        self.error: Exception | None = None
        self.lengths: list[int] = []

    def generate(self, prompts: Any, wanted: Any, use_tqdm: bool) -> list[Any]:
        if self.error is not None:
            raise self.error
        answers, made = [], []
        for prompt in prompts:
            ids = torch.tensor([prompt["prompt_token_ids"]])
            ones = torch.ones_like(ids)
            got = compute_supervision(self._target, ids, ones, ones, encoding=self._wish)
            head: Any = self._target.get_output_embeddings()
            made.append(got["states"][0])
            self.lengths.append(ids.shape[1])
            answers.append(int(head(got["last"][0, -1]).argmax()))
        for number, states in enumerate(self.spoil(made)):
            IN_PROCESS[f"p{number}"] = states
        return [
            SimpleNamespace(
                kv_transfer_params={"draftmq_request": f"p{number}"},
                outputs=[SimpleNamespace(token_ids=[token])],
            )
            for number, token in enumerate(answers)
        ]


def served(kind: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> VllmTarget:
    """The model of that kind, as if vLLM ran it."""
    make(kind).save_pretrained(folder)

    def start(self: VllmTarget, tensor_parallel: int) -> Engine:
        return Engine(folder, self.layers)

    monkeypatch.setattr(VllmTarget, "_start", start)
    fake = SimpleNamespace(SamplingParams=lambda **_: None)
    monkeypatch.setitem(sys.modules, "vllm", fake)
    connector = SimpleNamespace(ANSWERED="draftmq_request")
    monkeypatch.setitem(sys.modules, "worker.targets.vllm.connector", connector)
    return VllmTarget(str(folder), name=kind, **options)


KINDS = ["llama", "qwen3", "gemma3_text", "gpt2", "gpt_neox", "opt", "phi"]


@pytest.mark.parametrize("kind", KINDS)
def test_norm_and_head_of_each_family_make_of_states_what_the_model_makes(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = served(kind, tmp_path, monkeypatch, layers=(0, 2))
    prove(target)
    ids, mask, _ = tokens()
    mask[1, 7:] = 0
    whole = HuggingFaceTarget(make(kind), name=kind)
    got, expected = target.forward(ids, mask), whole.forward(ids, mask)
    for name in ("aux_hidden_states", "last_hidden_state", "logits"):
        ours, theirs = (getattr(each, name)[mask.bool()] for each in (got, expected))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert target._llm.lengths[-2:] == [12, 7]  # no padding was run


@pytest.mark.parametrize("kind", ["gemma2", "granite"])
def test_a_family_that_changes_its_heads_output_is_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(TargetError, match="cannot be served from an engine's states: the model"):
        served(kind, tmp_path, monkeypatch)


@pytest.fixture
def target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmTarget:
    return served("llama", tmp_path, monkeypatch, layers=(0,))


def test_it_says_what_can_be_asked_of_it(target: VllmTarget) -> None:
    facts = describe(target)
    assert facts.layers == (0, 1, 3, 4, 7)
    assert facts.max_position_embeddings == 63  # one is for the token that vLLM writes
    assert facts.engine.startswith("vllm ")
    assert facts.fingerprint.startswith("f")
    ids, mask, _ = tokens()
    compute_supervision(target, ids, mask, mask, encoding="layers=0,7;last;states=fp8")
    with pytest.raises(BadRequest, match=r"layers 2 are asked for, .* gives 0, 1, 3, 4, 7"):
        compute_supervision(target, ids, mask, mask, encoding="layers=2")


def test_packed_documents_go_to_the_engine_at_once(target: VllmTarget) -> None:
    ids = torch.arange(20) + 5
    lengths = torch.tensor([3, 12, 5])
    made = compute_packed(target, ids, lengths, encoding="layers=1;last")
    whole = HuggingFaceTarget(make("llama"), name="llama")
    expected = compute_packed(whole, ids, lengths, encoding="layers=1;last")
    for name, tensor in expected.items():
        torch.testing.assert_close(made[name], tensor, atol=1e-5, rtol=1e-5)
    assert target._llm.lengths == [3, 12, 5]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: made[::-1],  # rows of another prompt
        lambda made: [states.flip(1) for states in made],  # layers in another order
        lambda made: [states * 3 for states in made[:1]] + [s.roll(1, 0) for s in made[1:]],
    ],
)
def test_states_that_are_not_the_prompts_fail_by_the_engines_own_token(
    target: VllmTarget, spoil: Any
) -> None:
    target._llm.spoil = spoil
    ids, mask, _ = tokens()
    with pytest.raises(TargetError, match=r"vLLM's own next token of row \d is"):
        target.forward(ids, mask)


def test_rows_of_another_length_are_an_error(target: VllmTarget) -> None:
    target._llm.spoil = lambda made: [states[:-1] for states in made]
    ids, mask, _ = tokens()
    with pytest.raises(TargetError, match=r"vLLM gave states \(11, 5, 32\) of a prompt of 12 tok"):
        target.forward(ids, mask)


def test_padding_on_the_left_is_refused(target: VllmTarget) -> None:
    ids, mask, _ = tokens()
    mask[0, :3] = 0
    with pytest.raises(BadRequest, match="padded on the right"):
        target.forward(ids, mask)


def test_an_engine_that_is_gone_ends_the_worker_and_one_that_failed_the_request(
    target: VllmTarget,
) -> None:
    ids, mask, _ = tokens()
    target._llm.error = RuntimeError("out of memory")
    with pytest.raises(TargetError, match=r"vLLM failed \(RuntimeError: out of memory\)"):
        target.forward(ids, mask)
    target._llm.error = type("EngineDeadError", (Exception,), {})("it died")
    with pytest.raises(TargetGoneError, match="engine of target 'llama' is gone"):
        target.forward(ids, mask)


def test_without_vllm_it_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import worker.targets

    monkeypatch.setattr(worker.targets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TargetError, match=r"pip install 'draftmq\[vllm\]'"):
        load_vllm_target("embedded")
    assert VOCAB  # the tiny models' own
