"""What is known of a training run before its first step, and the draft that it begins with."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from broker.logs import log
from trainer_client.data.cache import known_contents
from trainer_client.data.samples import lengths_of
from trainer_client.data.sources import files_of
from trainer_client.drafts.initial import Initial, begin_from, read_initial
from trainer_client.eagle3.config import FAMILIES, DraftConfig
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.targets.batch import TargetBackend
from trainer_client.training import identity
from trainer_client.training.data import Dataset, Sample, Schedule, stored_dataset
from trainer_client.training.place import Found, look
from trainer_client.training.ranks import Ranks
from trainer_client.training.settings import TrainSettings
from trainer_client.training.stopping import Stopped
from trainer_client.training.validation import hold_out
from trainer_client.training.vocab import always_known, frequent_tokens, token_counts
from worker.supervision.mapping import VocabMapping

_logger = logging.getLogger("draftmq.train")


@dataclass(frozen=True)
class Plan:
    """What is known before the first step: data, vocabulary, schedule."""

    dataset: Dataset
    mapping: VocabMapping
    coverage: float
    schedule: Schedule
    total_steps: int
    #: samples that are measured on, and not trained
    held_out: Sequence[Sample]
    #: what the draft begins from, where it does
    initial: Initial | None
    #: what ``run.json`` says of the run
    identity: Mapping[str, Any]

    @functools.cached_property
    def lengths(self) -> Any:
        """Tokens of each sample, int64 [samples]."""
        return lengths_of(self.dataset.samples)


def make_plan(
    settings: TrainSettings,
    backend: TargetBackend,
    tokenizer: Any,
    ranks: Ranks,
    there: Mapping[str, Any] | None = None,
    *,
    selected_token_ids: Tensor | None = None,
    done: int = 0,
) -> Plan:
    """Read the data and decide.

    ``there`` is the identity of the run that is resumed after ``done`` steps, and
    ``selected_token_ids`` int64 [D] the vocabulary of its checkpoint, which it keeps. Raises
    :class:`DataError` for data that cannot be trained on,
    :class:`trainer_client.errors.ExportError` for a draft that a run cannot begin from, and
    :class:`trainer_client.training.identity.RunError` where ``there`` is another run, or has gone
    on for longer than is wanted now.
    """
    info = backend.model_info()
    options = settings.reading(info["max_position_embeddings"])
    dataset = stored_dataset(settings.data, tokenizer, options)
    held_out: Sequence[Sample] = []
    if settings.validation_share is not None:
        dataset, held_out = hold_out(dataset, settings.validation_share, settings.seed)
    elif settings.validation:
        held_out = stored_dataset(settings.validation, tokenizer, options).samples
    initial = None
    if settings.init_from:
        embeddings = backend.get_input_embeddings().weight
        initial = read_initial(Path(settings.init_from), info, embeddings)
        if selected_token_ids is None and settings.init_vocab == "keep":
            selected_token_ids = initial.draft.selected_token_ids
    mapping, coverage = _vocabulary(settings, info, tokenizer, dataset, selected_token_ids)
    began = settings.batch_size * settings.accumulation * ranks.world_size
    if there is not None:
        began = there.get("global_batch", began)
    schedule = Schedule(len(dataset.samples), settings.global_batch or began, settings.seed)
    whole = settings.epochs * schedule.steps_per_epoch
    total_steps = min(settings.max_steps or whole, whole)
    contents = known_contents()
    here = {
        **settings.shared(),
        "global_batch": schedule.global_batch,
        "samples": len(dataset.samples),
        "data_content": dataset.digest,
        "validation_content": Dataset(held_out, 0, 0).digest,
        "tokenizer": identity.tokenizer_hash(tokenizer),
        "mapping": mapping.id,
        "initial_draft": initial.content if initial else "",
        "model": info["model"],
        "target": info.get("offer") or info["fingerprint"],
        "encoding": backend.encoding,
        "skip_non_finite": settings.skip_non_finite,
        "checkpoint_every": settings.checkpoint_every,
        "total_steps": total_steps,
        "versions": identity.versions(),
        "ranks": ranks.world_size,
        "files": {str(file): contents.hash(file) for file in files_of(settings.data)},
        "settings": settings.plain(),
    }
    if there is not None:
        identity.compare(there, here, settings.output)
    if done > total_steps:
        raise identity.RunError(
            f"{settings.output} has {done} steps behind it, and {total_steps} are wanted now; say "
            "more --epochs or --max-steps, or take the draft of an earlier checkpoint (draftmq "
            "export)"
        )
    return Plan(dataset, mapping, coverage, schedule, total_steps, held_out, initial, here)


def agreed_plan(
    settings: TrainSettings, backend: TargetBackend, tokenizer: Any, ranks: Ranks
) -> tuple[Found, Plan]:
    """What rank 0 finds in the run's directory, and the plan that every rank has made alike.

    Raises what :func:`trainer_client.training.place.look` and :func:`make_plan` raise, and
    :class:`trainer_client.training.identity.RunError` where ranks differ.
    """
    found = ranks.told_by_first(lambda: look(settings.output, resume=settings.resume))

    def make() -> Plan:
        try:
            return make_plan(
                settings,
                backend,
                tokenizer,
                ranks,
                found.identity,
                selected_token_ids=found.selected_token_ids,
                done=found.step,
            )
        finally:
            if not isinstance(sys.exception(), Stopped):
                ranks.wait_for_slow()

    plan = identity.agree(ranks.rank, ranks.world_size, make, lambda plan: plan.identity)
    return found, plan


def _vocabulary(
    settings: TrainSettings,
    info: Mapping[str, Any],
    tokenizer: Any,
    dataset: Dataset,
    selected_token_ids: Tensor | None,
) -> tuple[VocabMapping, float]:
    """The draft's vocabulary, and the share of the data's tokens that it covers."""
    size = info["vocab_size"]
    counts = token_counts(dataset, size)
    known = always_known(tokenizer, size)
    mapping, coverage = frequent_tokens(counts, settings.draft_vocab_size, known)
    if selected_token_ids is None or int(selected_token_ids.max()) >= size:
        return mapping, coverage  # ids beyond the target's are of another run, which is refused
    kept = VocabMapping(selected_token_ids, size)
    covered = counts[kept.selected_token_ids].sum() / counts.sum().clamp_min(1)
    return kept, float(covered)


def make_draft(
    settings: TrainSettings,
    backend: TargetBackend,
    mapping: VocabMapping,
    initial: Initial | None = None,
) -> Eagle3Draft:
    """A draft before its first step; the same seed gives the same weights.

    It starts from the target's head where that is a plain matrix, which is where ``hidden`` is
    offered, and then from ``initial``, whose network it has. Raises
    :class:`trainer_client.training.identity.RunError` where what it starts from is not finite.
    """
    info = backend.model_info()
    sizes: dict[str, Any] = dict(FAMILIES[settings.draft])
    if settings.draft_intermediate_size:
        sizes["intermediate_size"] = settings.draft_intermediate_size
    if initial is None:
        config = DraftConfig.from_target_info(info, mapping.draft_vocab_size, **sizes)
    else:
        config = replace(initial.draft.config, draft_vocab_size=mapping.draft_vocab_size)
    torch.manual_seed(settings.seed)
    embeddings = _finite("input embeddings", backend.get_input_embeddings().weight)
    draft = Eagle3Draft(config, mapping.selected_token_ids, embeddings)
    if "hidden" in info["encodings"]:
        draft.start_from_target(_finite("head for the draft vocab", backend.lm_head_rows().weight))
    if initial is not None:
        kept = begin_from(draft, initial.draft)
        fields = {"path": settings.init_from, "tokens": mapping.draft_vocab_size, "known": kept}
        log(_logger, "info", "initial_draft", fields)
    draft.attention = settings.attention
    return draft


def _finite(what: str, weight: Tensor) -> Tensor:
    """``weight`` [rows, H] as it is. Raises :class:`RunError` where it has NaN or infinity."""
    largest = torch.linalg.vector_norm(weight, ord=torch.inf, dim=-1)  # no copy of [rows, H]
    bad = (~largest.isfinite()).nonzero().flatten()
    if bad.numel():
        raise identity.RunError(
            f"the target's {what} has values that are not finite in {bad.numel()} of "
            f"{weight.shape[0]} rows, the first is row {int(bad[0])}; is its checkpoint whole?"
        )
    return weight
