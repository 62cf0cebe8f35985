"""Samples that are not trained on, and what the draft is worth on them."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from broker.logs import log
from trainer_client.data.samples import records_of, taking
from trainer_client.eagle3.unroll import Eagle3Unroll, simulated_accept_length
from trainer_client.errors import DataError, TargetFailedError
from trainer_client.targets.batch import Eagle3TargetBatch, LmHeadRows, TargetBackend
from trainer_client.training.data import Dataset, MicroBatch, Sample, ask, collate
from trainer_client.training.identity import write_whole
from trainer_client.training.ranks import Ranks, added_up
from trainer_client.training.refused import PartialBatch, ask_one_by_one, rows

_logger = logging.getLogger("draftmq.train")

#: In a run's directory: the step with the least held-out loss so far.
BEST = "best.json"


def hold_out(dataset: Dataset, share: float, seed: int) -> tuple[Dataset, Sequence[Sample]]:
    """Take a share of the samples, at least one, out of a data set; the seed alone says which.

    All samples of one record stay together: the turns of a conversation repeat each other, and one
    that is measured would have been trained. Raises :class:`DataError` where nothing would be left
    to train.
    """
    samples = dataset.samples
    record = records_of(samples)
    sizes = np.bincount(record)
    if len(sizes) < 2:
        raise DataError(
            f"--validation {share:g} is a share of the records, and the data has {len(sizes)}; "
            "give more data, or a --validation file"
        )
    wanted = max(1, round(share * len(samples)))
    order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(seed)).numpy()
    taken = int(np.searchsorted(np.cumsum(sizes[order]), wanted)) + 1
    held = np.isin(record, order[: min(taken, len(order) - 1)])
    kept, measured = (taking(samples, np.flatnonzero(which)) for which in (~held, held))
    return replace(dataset, samples=kept, noted=None), measured


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

    ``waiting`` is around every wait for the target. A sample for which there are no numbers is left
    out, with a warning. Both are NaN where no slot of what is left has supervision.
    """
    sums = torch.zeros(4, unroll.depths, dtype=torch.float64, device=device)
    left_out: list[str] = []
    mine = samples[ranks.rank :: ranks.world_size]
    for at in range(0, len(mine), batch_size):
        asked = collate(mine[at : at + batch_size])
        with waiting():
            answer = _asked(backend, asked)
        left_out += answer.left_out
        for batch in answer.good:
            batch = batch.map(lambda tensor: tensor.to(device))
            found = _sums(unroll, batch, lm_head)
            if not found.isfinite().all():
                found = torch.zeros_like(found)
                for row in rows(batch):
                    of_row = _sums(unroll, row, lm_head)
                    if of_row.isfinite().all():
                        found += of_row
                    else:
                        left_out += row.origins
            sums += found
    if left_out:
        fields = {"samples": ", ".join(left_out[:8]), "left_out": len(left_out)}
        log(_logger, "warning", "held_out_left_out", fields)
    losses, counts, hits, chains = added_up(sums).cpu()
    if not counts.any():
        return math.nan, math.nan
    weights = torch.tensor(unroll.weights, dtype=torch.float64)
    loss = (losses / counts.clamp_min(1) * weights).sum() / weights.sum()
    return float(loss), simulated_accept_length(hits, chains)


def _asked(backend: TargetBackend, asked: MicroBatch) -> PartialBatch:
    """What the target says of a micro-batch, whole or sample by sample."""
    try:
        batch = ask(backend.generate_batch, asked)
    except TargetFailedError as error:
        return ask_one_by_one(backend, asked, error)
    return PartialBatch((replace(batch, origins=asked.origins),), (), "")


def _sums(unroll: Eagle3Unroll, batch: Eagle3TargetBatch, lm_head: LmHeadRows | None) -> Tensor:
    """Float64 [4, depths]: losses and the slots that have one, chains that are right, and all."""
    device = batch.input_ids.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
        output = unroll(**batch.to_trainer_inputs(), lm_head=lm_head)
    counts = unroll.counts(batch)
    losses = output.depth_losses.double() * counts
    return torch.stack([losses, counts, output.chain_hits, output.chains])


def best_step(output: Path) -> tuple[int, float] | None:
    """The step with the least held-out loss so far, and that loss."""
    try:
        said = json.loads((output / BEST).read_text())
        return int(said["step"]), float(said["loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def note(output: Path, step: int, loss: float, accept_length: float) -> int | None:
    """Write down a measurement where it is the best so far; gives the best step.

    A loss that is not finite is never the best. None where there is no best one yet.
    """
    before = best_step(output)
    if before is not None and before[0] > step:
        before = None  # the run has gone back to a checkpoint before it
    if before is not None and (before[1] <= loss or not math.isfinite(loss)):
        return before[0]
    if not math.isfinite(loss):
        return None
    said = {"step": step, "loss": loss, "simulated_accept_length": accept_length}
    write_whole(output / BEST, json.dumps(said) + "\n")
    return step
