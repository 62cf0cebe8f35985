"""The training loop: what it takes, copies, reduces over ranks, and says of itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import fields, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.targets.batch import Eagle3TargetBatch
from trainer_client.training import data
from trainer_client.training.data import Schedule
from trainer_client.training.memory import peak_bytes
from trainer_client.training.ranks import Ranks
from trainer_client.training.staging import staged
from trainer_client.training.trainer import NonFiniteError, StepMetrics, Trainer, make_optimizer

D, H, T = 24, 16, 9
CPU = torch.device("cpu")


def batch(seed: int) -> Eagle3TargetBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 40, (1, T), generator=generator)
    return Eagle3TargetBatch(
        aux_hidden_states=torch.randn(1, T, 3 * H, generator=generator),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        loss_mask=torch.ones_like(ids),
        target_probs=torch.softmax(torch.randn(1, T, D, generator=generator), -1),
        position_mask=torch.ones(1, T, 1, dtype=torch.bool),
    )


def make_trainer(accumulation: int = 1) -> Trainer:
    config = DraftConfig(
        vocab_size=40,
        draft_vocab_size=D,
        target_hidden_size=H,
        hidden_size=H,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    )
    torch.manual_seed(0)
    draft = Eagle3Draft(config, torch.arange(D))
    return Trainer(
        Eagle3Unroll(draft, depths=2),
        make_optimizer(draft, 1e-3, 0.0),
        rate=lambda step: 1e-3,
        accumulation=accumulation,
        max_grad_norm=0.5,
    )


def train(trainer: Trainer, batches: Any) -> list[StepMetrics]:
    return list(trainer.run(batches, first_step=0, waited_s=lambda: 0.0))


def test_on_a_cpu_nothing_is_taken_ahead_or_copied() -> None:
    taken = []

    def batches() -> Iterator[Eagle3TargetBatch]:
        for seed in range(3):
            taken.append(seed)
            yield batch(seed)

    given = batch(0)
    (same,) = staged([given], CPU)
    assert same.aux_hidden_states is given.aux_hidden_states
    for number, _ in enumerate(staged(batches(), CPU)):
        assert taken == list(range(number + 1))


def test_each_step_says_its_peak_of_memory() -> None:
    before = peak_bytes(CPU)
    held = torch.ones(64 << 20, dtype=torch.uint8)
    steps = train(make_trainer(), [batch(0), batch(1)])
    assert held.all()
    assert before <= steps[0].peak_memory_bytes <= steps[1].peak_memory_bytes <= peak_bytes(CPU)
    assert peak_bytes(CPU) >= 64 << 20


def test_accumulated_batches_are_one_step_with_the_mean_of_their_losses() -> None:
    alone = [train(make_trainer(), [batch(seed)])[0] for seed in (0, 1)]
    (both,) = train(make_trainer(accumulation=2), [batch(0), batch(1)])
    assert both.loss == pytest.approx(sum(step.loss for step in alone) / 2)  # as many slots each
    assert both.tokens_per_s * both.seconds == pytest.approx(2 * T)


def test_the_order_of_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    permute = torch.randperm

    def randperm(*args: Any, **options: Any) -> torch.Tensor:
        made.append(args)
        return permute(*args, **options)

    data._order.cache_clear()
    monkeypatch.setattr(torch, "randperm", randperm)
    schedule = Schedule(n_samples=40, global_batch=4, seed=3)
    seen = [n for step in range(10) for part in schedule.micro_batches(step, 0, 1, 2) for n in part]
    assert sorted(seen) == list(range(40))
    assert len(made) == 1


# -- several ranks --------------------------------------------------------------------------------

STEPS, ACCUMULATION = 3, 4


def _rank(rank: int, store: str, results: str) -> None:
    """Trains on this rank's batches; writes its weights, and how often gradients were reduced."""
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    trainer = make_trainer(ACCUMULATION)
    messages: list[int] = []
    all_reduce = dist.all_reduce

    def counted(tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        messages.append(tensor.numel())
        return all_reduce(tensor, *args, **options)

    dist.all_reduce = counted
    mine = [batch(2 * number + rank) for number in range(STEPS * ACCUMULATION)]
    steps = train(trainer, mine)
    torch.save(
        {
            "weights": [p.detach() for p in trainer._trained],
            "messages": messages,
            "losses": [step.loss for step in steps],
        },
        os.path.join(results, f"{rank}.pt"),
    )
    ranks = Ranks(rank, 2)
    ranks.meet()
    ranks.leave()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    place: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, (str(place / "store"), str(place)), nprocs=2)
    return [torch.load(place / f"{rank}.pt") for rank in range(2)]


def test_gradients_are_reduced_once_a_step_not_once_a_micro_batch(
    two_ranks: list[dict[str, Any]],
) -> None:
    for rank in two_ranks:
        gradients = len(rank["weights"])
        assert len(rank["messages"]) == STEPS * (
            1 + gradients + 1
        )  # what is to be learned; metrics


def test_two_ranks_learn_what_one_learns_from_their_batches(
    two_ranks: list[dict[str, Any]],
) -> None:
    trainer = make_trainer(2 * ACCUMULATION)
    steps = train(trainer, [batch(number) for number in range(2 * STEPS * ACCUMULATION)])
    one, other = two_ranks
    assert one["losses"] == other["losses"]
    assert one["losses"] == pytest.approx([step.loss for step in steps], rel=1e-5)
    for mine, theirs, alone in zip(one["weights"], other["weights"], trainer._trained, strict=True):
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, alone.detach(), atol=2e-5, rtol=1e-4)


# -- however a global batch is cut -----------------------------------------------------------------


def with_loss_on(seed: int, slots: int) -> Eagle3TargetBatch:
    """A batch with supervision in so many of its slots."""
    whole = batch(seed)
    assert whole.position_mask is not None
    mask = torch.arange(T).view(1, T, 1) < slots
    return replace(whole, position_mask=mask, loss_mask=mask.squeeze(-1).long())


def gradients(trainer: Trainer, parts: list[list[Eagle3TargetBatch]]) -> torch.Tensor:
    """Of one global batch cut into ranks and micro-batches, as ranks would add them up."""
    counts = sum(trainer._counts(mine) for mine in parts)
    for mine in parts:
        for each in mine:
            trainer._backward(each, counts)
    return torch.cat([p.grad.flatten() for p in trainer._trained if p.grad is not None])


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_any_cut_of_a_global_batch_has_its_gradient(dtype: torch.dtype, close: float) -> None:
    samples = [with_loss_on(seed, slots) for seed, slots in enumerate([2, 9, 1, 7, 0, 5])]

    def joined(some: list[Eagle3TargetBatch]) -> Eagle3TargetBatch:
        names = [f.name for f in fields(some[0]) if getattr(some[0], f.name) is not None]
        tensors = {n: torch.cat([getattr(s, n) for s in some]) for n in names if n != "origins"}
        return Eagle3TargetBatch(**tensors)

    def of(parts: list[list[list[Eagle3TargetBatch]]]) -> torch.Tensor:
        trainer = make_trainer()
        trainer._unroll.to(dtype)
        return gradients(trainer, [[joined(micro) for micro in mine] for mine in parts])

    whole = of([[samples]])
    cuts = [
        [[samples[:1], samples[1:]]],
        [[samples[:2]], [samples[2:]]],
        [[[one] for one in samples]],
        [[samples[0::3]], [samples[1::3]], [samples[2::3]]],
        [[samples], []],
    ]
    for cut in cuts:
        assert float((of(cut) - whole).norm() / whole.norm()) < close


def test_a_value_that_is_not_finite_stops_before_the_step_and_names_the_sample() -> None:
    bad = batch(1)
    bad.aux_hidden_states[0, 3, 0] = torch.inf
    bad = replace(bad, origins=("chat.jsonl:7",))
    trainer = make_trainer()
    before = [p.detach().clone() for p in trainer._trained]
    steps = trainer.run([bad], first_step=0, waited_s=lambda: 0.0)
    with pytest.raises(
        NonFiniteError, match=r"step 1 has a gradient of norm nan, from chat.jsonl:7"
    ):
        next(steps)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer._trained, strict=True))


def test_so_many_samples_may_be_left_out_and_no_more(caplog: pytest.LogCaptureFixture) -> None:
    bad = batch(1)
    bad.aux_hidden_states[0, 3, 0] = torch.nan
    trainer = make_trainer()
    trainer.may_skip = 1
    steps = trainer.run([batch(0), bad, batch(2), bad], first_step=0, waited_s=lambda: 0.0)
    assert [next(steps).step for _ in range(3)] == [1, 2, 3]
    assert all(p.isfinite().all() for p in trainer._trained)
    assert caplog.messages == ["samples_left_out"]
    with pytest.raises(NonFiniteError):
        next(steps)
