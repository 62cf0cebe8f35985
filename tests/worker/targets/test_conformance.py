"""What every target promises, checked on the fake, on a real model, and in a trainer's process.

A target of your own (``--target-factory``) passes too when it is added to ``SUBJECTS``.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.worker.targets.tiny_models import HAS_COMPILER, VOCAB, make, tokens
from trainer_client.targets.colocated import ColocatedTarget
from worker.targets.contract import TargetOutputs
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.stub import StubTarget


def _stub() -> StubTarget:
    return StubTarget(vocab_size=VOCAB, hidden_size=32)


def _llama() -> HuggingFaceTarget:
    return HuggingFaceTarget(make("llama"), name="tiny")


def _compiled() -> HuggingFaceTarget:
    if not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    torch.compiler.reset()  # for torch has a limit, and other tests' models count
    target = _llama()
    target.compile_forward()
    return target


SUBJECTS: dict[str, Callable[[], Any]] = {
    "StubTarget": _stub,
    "HuggingFaceTarget": _llama,
    "HuggingFaceTarget, compiled": _compiled,
    "ForeignTarget": lambda: ForeignTarget(_llama(), "theirs"),
    "ColocatedTarget over StubTarget": lambda: ColocatedTarget(_stub(), "logits"),
    "ColocatedTarget over HuggingFaceTarget": lambda: ColocatedTarget(_llama(), "logits"),
}


@pytest.fixture(scope="module", params=SUBJECTS)
def target(request: pytest.FixtureRequest) -> Any:
    return SUBJECTS[request.param]()


def generate(target: Any, seed: int = 0, **changes: torch.Tensor) -> Any:
    ids, attention_mask, loss_mask = tokens(seed=seed)
    given = {"input_ids": ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
    return target.generate_batch(**(given | changes))


def test_shapes_are_those_of_the_contract(target: Any) -> None:
    batch = generate(target)
    assert batch.aux_hidden_states.shape == (2, 12, 3 * 32)
    assert batch.logits.shape == (2, 12, VOCAB)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.loss_mask.shape == (2, 12)
    assert target.get_input_embeddings().weight.shape == (VOCAB, 32)


def test_logits_ids_and_loss_mask_are_moved_left_with_zeros_at_the_end(target: Any) -> None:
    ids, mask, loss_mask = tokens()
    loss_mask[0, :5] = 0
    batch = generate(target, loss_mask=loss_mask)
    for given, moved in ((ids, batch.input_ids), (loss_mask, batch.loss_mask)):
        assert torch.equal(moved[:, :-1], given[:, 1:])
        assert not moved[:, -1].any()
    assert not batch.logits[:, -1].any()
    assert torch.equal(batch.attention_mask, mask)
    cut = generate(target, input_ids=ids[:, 1:], attention_mask=mask[:, 1:], loss_mask=mask[:, 1:])
    assert cut.logits.shape == (2, 11, VOCAB)


def test_the_logits_at_a_slot_are_those_of_the_next_token(target: Any) -> None:
    ids, _, _ = tokens()
    changed = ids.clone()
    changed[:, 6] = 8 + (changed[:, 6] - 8 + 1) % (VOCAB - 8)
    before, after = generate(target), generate(target, input_ids=changed)
    differs = (before.logits != after.logits).any(-1)
    assert differs[:, 5].all()
    assert not differs[:, :5].any()


def test_aux_states_stay_where_their_token_is_and_see_no_later_one(target: Any) -> None:
    ids, _, _ = tokens()
    changed = ids.clone()
    changed[:, 6] = 8 + (changed[:, 6] - 8 + 1) % (VOCAB - 8)
    before, after = generate(target), generate(target, input_ids=changed)
    differs = (before.aux_hidden_states != after.aux_hidden_states).any(-1)
    assert differs[:, 6].all()
    assert not differs[:, :6].any()


def test_the_three_layers_differ(target: Any) -> None:
    low, middle, high = generate(target).aux_hidden_states.chunk(3, dim=-1)
    assert not torch.equal(low, middle)
    assert not torch.equal(middle, high)


def test_the_same_batch_gives_the_same_bits(target: Any) -> None:
    first, second = generate(target), generate(target)
    assert torch.equal(first.aux_hidden_states, second.aux_hidden_states)
    assert torch.equal(first.logits, second.logits)


def test_inputs_are_left_as_they_were(target: Any) -> None:
    given = tokens()
    kept = [tensor.clone() for tensor in given]
    target.generate_batch(input_ids=given[0], attention_mask=given[1], loss_mask=given[2])
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, kept, strict=True))


def test_nothing_given_wants_a_gradient(target: Any) -> None:
    batch = generate(target)
    assert not batch.aux_hidden_states.requires_grad
    assert not batch.logits.requires_grad


def test_threads_that_call_at_once_get_their_own_batch(target: Any) -> None:
    wanted = [generate(target, seed=seed) for seed in range(4)]
    start, wrong = threading.Barrier(4), []

    def caller(seed: int) -> None:
        start.wait(10)
        for _ in range(5):
            got = generate(target, seed=seed)
            if not (
                torch.equal(got.aux_hidden_states, wanted[seed].aux_hidden_states)
                and torch.equal(got.logits, wanted[seed].logits)
            ):
                wrong.append(seed)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_failed_call_leaves_nothing_behind(target: Any) -> None:
    wanted = generate(target, seed=1)
    with pytest.raises(Exception, match=r".+"):
        generate(target, seed=2, input_ids=torch.full((2, 12), VOCAB + 7))
    got = generate(target, seed=1)
    assert torch.equal(got.aux_hidden_states, wanted.aux_hidden_states)
    assert torch.equal(got.logits, wanted.logits)


# -- what only the stub does ------------------------------------------------------------------


def test_stub_states_are_a_function_of_the_token() -> None:
    stub = StubTarget(vocab_size=VOCAB, hidden_size=32)
    ids, mask, loss_mask = tokens()
    got: TargetOutputs = stub.forward(ids, mask, loss_mask)
    assert torch.equal(got.aux_hidden_states[1, 4, 32:64], stub.states[3, ids[1, 4]])
    assert torch.equal(got.last_hidden_state[1, 4], stub.states[-1, ids[1, 4]])


def test_stub_fails_at_the_calls_it_was_told_to() -> None:
    stub = StubTarget(failures={1: RuntimeError("out of memory")})
    ids, mask, loss_mask = (tensor % 64 for tensor in tokens())
    stub.forward(ids, mask, loss_mask)
    with pytest.raises(RuntimeError, match="out of memory"):
        stub.forward(ids, mask, loss_mask)
    stub.forward(ids, mask, loss_mask)
    assert stub.calls == 3


def test_stub_takes_as_long_as_it_was_told_to(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("worker.targets.stub.time.sleep", slept.append)
    StubTarget(vocab_size=VOCAB, delay_s=0.5, s_per_token=0.25).forward(*tokens())
    assert slept == [0.5 + 24 * 0.25]


def test_stubs_with_equal_settings_are_the_same_target() -> None:
    assert StubTarget().fingerprint == StubTarget().fingerprint
    assert StubTarget().fingerprint != StubTarget(seed=1).fingerprint
    assert torch.equal(StubTarget().lm_head, StubTarget().lm_head)
