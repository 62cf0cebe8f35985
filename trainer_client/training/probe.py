"""What a run would be, from its data and one step: ``draftmq train --dry-run``."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch

from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.targets.batch import TargetBackend
from trainer_client.targets.wished import takes_head
from trainer_client.training.data import MicroBatch, ask, collate, in_bins, in_one_row
from trainer_client.training.memory import peak_bytes
from trainer_client.training.plan import Plan, agreed_plan, make_draft
from trainer_client.training.ranks import Ranks
from trainer_client.training.settings import TrainSettings
from trainer_client.training.trainer import Trainer, make_optimizer


def probe(
    settings: TrainSettings,
    backend: TargetBackend,
    tokenizer: Any,
    *,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """Sizes of the run, and memory and time from one step; nothing is written.

    The step learns from the longest samples, one micro-batch of this rank's: no later one takes
    more memory. ``seconds`` scales its time by tokens, so it takes waiting for what it was in that
    step. A second step is measured where the first has warmed up. Raises what
    :func:`trainer_client.training.run.train` raises before its first step.
    """
    ranks, device = ranks or Ranks(), device or torch.device("cpu")
    found, plan = agreed_plan(settings, backend, tokenizer, ranks)
    mapping, samples = plan.mapping, plan.dataset.samples
    backend.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
    draft = make_draft(settings, backend, mapping, plan.initial).to(device)
    trainer = Trainer(
        Eagle3Unroll(draft, depths=settings.ttt_depths),
        make_optimizer(draft, settings.learning_rate, settings.weight_decay),
        rate=lambda step: settings.learning_rate,
        max_grad_norm=settings.max_grad_norm,
        lm_head=backend.lm_head_rows() if takes_head(backend.encoding) else None,
        device=device,
    )
    asked = _largest(plan, settings)

    waited = [0.0]

    def batches() -> Any:
        for _ in range(2):
            began = time.perf_counter()
            batch = ask(backend.generate_batch, asked)
            waited[0] += time.perf_counter() - began
            yield batch

    *_, step = trainer.run(batches(), first_step=0, waited_s=lambda: waited[0])
    ranks.meet()
    n_tokens = plan.dataset.n_tokens
    epochs = (plan.total_steps - found.step) / plan.schedule.steps_per_epoch
    info = backend.model_info()
    trained = sum(p.numel() for p in draft.parameters() if p.requires_grad)
    return {
        "target": info["model"],
        "encoding": backend.encoding,
        "samples": len(samples),
        "tokens": n_tokens,
        "longest_sample_tokens": int(plan.lengths.max()),
        "samples_truncated": plan.dataset.truncated,
        "samples_without_loss": plan.dataset.without_loss,
        "records_left_out": dict(plan.dataset.left_out),
        "global_batch": plan.schedule.global_batch,
        "steps": plan.total_steps,
        "steps_done": found.step,
        "hidden_size": draft.config.hidden_size,
        "intermediate_size": draft.config.intermediate_size,
        "draft_vocab_size": mapping.draft_vocab_size,
        "draft_vocab_coverage": plan.coverage,
        "trained_parameters": trained,
        "probe_tokens": int(asked.attention_mask.sum()),
        "probe_seconds": step.seconds,
        "probe_waiting_share": step.waiting_share,
        "peak_memory_bytes": peak_bytes(device),
        "seconds": n_tokens * epochs / step.tokens_per_s,
    }


def _largest(plan: Plan, settings: TrainSettings) -> MicroBatch:
    """The micro-batch of the longest samples."""
    order = np.argsort(-plan.lengths, kind="stable")
    samples = plan.dataset.samples
    if not settings.pack:
        return collate([samples[int(number)] for number in order[: settings.batch_size]])
    enough = 1 + int(np.searchsorted(np.cumsum(plan.lengths[order]), settings.pack))
    first = in_bins(order[:enough].tolist(), plan.lengths, settings.pack)[0]
    return in_one_row([samples[number] for number in first])
