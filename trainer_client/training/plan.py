"""What is known of a training run before its first step, and the draft that it begins with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.targets.batch import TargetBackend
from trainer_client.training import identity
from trainer_client.training.data import Dataset, Schedule, read_dataset
from trainer_client.training.ranks import Ranks
from trainer_client.training.settings import TrainSettings
from trainer_client.training.vocab import always_known, frequent_tokens, token_counts
from worker.supervision.mapping import VocabMapping


@dataclass(frozen=True)
class Plan:
    """What is known before the first step: data, vocabulary, schedule."""

    dataset: Dataset
    mapping: VocabMapping
    coverage: float
    schedule: Schedule
    total_steps: int
    #: what ``run.json`` says of the run
    identity: Mapping[str, Any]


def make_plan(
    settings: TrainSettings,
    backend: TargetBackend,
    tokenizer: Any,
    ranks: Ranks,
    there: Mapping[str, Any] | None = None,
) -> Plan:
    """Read the data and decide. ``there`` is the identity of the run that is resumed.

    Raises :class:`DataError` for data that cannot be trained on, and
    :class:`trainer_client.training.identity.RunError` where ``there`` is another run.
    """
    info = backend.model_info()
    limit = info["max_position_embeddings"] or settings.max_length
    dataset = read_dataset(
        settings.data,
        tokenizer,
        min(settings.max_length, limit),
        skip_bad_lines=settings.skip_bad_lines,
        loss_on=settings.loss_on,
    )
    counts = token_counts(dataset.samples, info["vocab_size"])
    mapping, coverage = frequent_tokens(
        counts, settings.draft_vocab_size, always_known(tokenizer, info["vocab_size"])
    )
    began = settings.batch_size * settings.accumulation * ranks.world_size
    if there is not None:
        began = there.get("global_batch", began)
    schedule = Schedule(len(dataset.samples), settings.global_batch or began, settings.seed)
    total = settings.epochs * schedule.steps_per_epoch
    here = {
        **settings.shared(),
        "global_batch": schedule.global_batch,
        "samples": len(dataset.samples),
        "data_content": dataset.digest,
        "mapping": mapping.id,
        "model": info["model"],
        "target": info.get("offer") or info["fingerprint"],
        "encoding": backend.encoding,
        "versions": identity.versions(),
        "ranks": ranks.world_size,
        "files": {str(settings.data): identity.content_hash(settings.data)},
    }
    if there is not None:
        identity.compare(there, here, settings.output)
    steps = min(settings.max_steps or total, total)
    return Plan(dataset, mapping, coverage, schedule, steps, here)


def make_draft(
    settings: TrainSettings, backend: TargetBackend, mapping: VocabMapping
) -> Eagle3Draft:
    """A fresh draft; the same seed gives the same weights.

    It starts from the target's head where that is a plain matrix, which is where ``hidden`` is
    offered.
    """
    info = backend.model_info()
    sizes = (
        {"intermediate_size": settings.draft_intermediate_size}
        if settings.draft_intermediate_size
        else {}
    )
    config = DraftConfig.from_target_info(info, mapping.draft_vocab_size, **sizes)
    torch.manual_seed(settings.seed)
    draft = Eagle3Draft(config, mapping.selected_token_ids, backend.get_input_embeddings().weight)
    if "hidden" in info["encodings"]:
        draft.start_from_target(backend.lm_head_rows().weight)
    draft.attention = settings.attention
    return draft
