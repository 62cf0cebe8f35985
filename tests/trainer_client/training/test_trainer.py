"""The training loop: what it takes, copies, reduces over ranks, and says of itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.targets.batch import Eagle3TargetBatch
from trainer_client.training import data
from trainer_client.training.data import Schedule
from trainer_client.training.memory import peak_bytes
from trainer_client.training.run import Ranks
from trainer_client.training.staging import staged
from trainer_client.training.trainer import StepMetrics, Trainer, make_optimizer

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
    assert both.loss == pytest.approx(sum(step.loss for step in alone) / 2)
    assert both.tokens_per_s * both.seconds == pytest.approx(2 * T)


def test_the_order_of_an_epoch_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    permute = torch.randperm

    def randperm(*args: Any, **options: Any) -> torch.Tensor:
        made.append(args)
        return permute(*args, **options)

    data._order.cache_clear()
    monkeypatch.setattr(torch, "randperm", randperm)
    schedule = Schedule(n_samples=40, batch_size=2, accumulation=2, world_size=1, seed=3)
    seen = [n for step in range(10) for part in schedule.micro_batches(step, 0) for n in part]
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
    reduced: list[int] = []

    def count(group, bucket):  # type: ignore[no-untyped-def]  # torch reads the annotations
        reduced.append(bucket.index())
        return allreduce_hook(group, bucket)

    module = trainer._module
    assert isinstance(module, DistributedDataParallel)
    module.register_comm_hook(None, count)
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
            "buckets": reduced,
            "messages": len(messages),
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
        buckets = 1 + max(rank["buckets"])
        assert len(rank["buckets"]) == STEPS * buckets
        assert rank["messages"] == len(rank["buckets"]) + STEPS  # the metrics are one a step


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
