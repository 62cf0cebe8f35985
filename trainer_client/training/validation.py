"""Samples that are not trained on, and what the draft is worth on them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from trainer_client.data.samples import taking
from trainer_client.eagle3.unroll import Eagle3Unroll, simulated_accept_length
from trainer_client.targets.batch import LmHeadRows, TargetBackend
from trainer_client.training.data import Dataset, Sample, collate
from trainer_client.training.identity import write_whole
from trainer_client.training.ranks import Ranks, added_up

#: In a run's directory: the step with the least held-out loss so far.
BEST = "best.json"


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Sequence[Sample]]:
    """Take a share of the samples, one at least, out of a data set; seed alone says which."""
    count = min(len(dataset.samples) - 1, max(1, round(share * len(dataset.samples))))
    order = torch.randperm(len(dataset.samples), generator=torch.Generator().manual_seed(seed))
    held = order[:count].sort().values.numpy()
    kept = np.setdiff1d(np.arange(len(dataset.samples)), held, assume_unique=True)
    return replace(dataset, samples=taking(dataset.samples, kept), noted=None), taking(
        dataset.samples, held
    )


@torch.no_grad()
def measure(
    unroll: Eagle3Unroll,
    backend: TargetBackend,
    samples: Sequence[Sample],
    *,
    ranks: Ranks,
    batch_size: int,
    lm_head: LmHeadRows | None,
    device: torch.device,
    waiting: Callable[[], AbstractContextManager[None]],
) -> tuple[float, float]:
    """Loss and simulated accept length over all samples, which are dealt round to the ranks.

    ``waiting`` is around every wait for the target.
    """
    sums = torch.zeros(4, unroll.depths, dtype=torch.float64, device=device)
    mine = samples[ranks.rank :: ranks.world_size]
    for at in range(0, len(mine), batch_size):
        asked = collate(mine[at : at + batch_size])
        with waiting():
            batch = backend.generate_batch(asked.input_ids, asked.attention_mask, asked.loss_mask)
        batch = batch.map(lambda tensor: tensor.to(device))
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            output = unroll(**batch.to_trainer_inputs(), lm_head=lm_head)
        counts = unroll.counts(batch)
        losses = output.depth_losses.double() * counts
        sums += torch.stack([losses, counts, output.chain_hits, output.chains])
    losses, counts, hits, chains = added_up(sums).cpu()
    weights = torch.tensor(unroll.weights, dtype=torch.float64)
    loss = (losses / counts.clamp_min(1) * weights).sum() / weights.sum()
    return float(loss), simulated_accept_length(hits, chains)


def best_step(output: Path) -> tuple[int, float] | None:
    """The step with the least held-out loss so far, and that loss."""
    try:
        said = json.loads((output / BEST).read_text())
        return int(said["step"]), float(said["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note(output: Path, step: int, loss: float, accept_length: float) -> int:
    """Write down a measurement where it is the best so far; gives the best step."""
    before = best_step(output)
    if before is not None and before[0] <= step and before[1] <= loss:
        return before[0]
    said = {"step": step, "loss": loss, "simulated_accept_length": accept_length}
    write_whole(output / BEST, json.dumps(said) + "\n")
    return step
