"""One training run from settings to exported draft, plain or under ``torchrun``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from trainer_client.drafts import checkpoint
from trainer_client.drafts.export import write_draft
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.errors import TrainerClientError
from trainer_client.targets.batch import Eagle3TargetBatch, TargetBackend
from trainer_client.training import identity, metrics
from trainer_client.training.data import MicroBatch, collate
from trainer_client.training.plan import Plan, make_draft, make_plan
from trainer_client.training.prefetch import Prefetcher
from trainer_client.training.ranks import Ranks
from trainer_client.training.settings import TrainSettings
from trainer_client.training.stopping import Stop, Stopped
from trainer_client.training.trainer import StepMetrics, Trainer, learning_rate, make_optimizer


def train(
    settings: TrainSettings,
    backend: TargetBackend,
    tokenizer: Any,
    *,
    ranks: Ranks | None = None,
    device: torch.device | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_step: Callable[[StepMetrics], None] = lambda step: None,
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Run to the end; returns what ``summary.json`` says. Only rank 0 writes.

    Raises :class:`TrainerClientError` of all kinds; nothing is trained on partial supervision. When
    ``stop`` says so it writes a checkpoint and raises one that says how to go on.
    """
    stop = stop or Stop()
    ranks = ranks or Ranks()
    began = time.perf_counter()
    device = device or torch.device("cpu")

    def prepare() -> Plan:
        there = identity.check_place(settings.output, resume=settings.resume)
        return make_plan(settings, backend, tokenizer, ranks, there)

    plan = identity.agree(ranks.rank, ranks.world_size, prepare, lambda plan: plan.identity)
    on_plan(plan)
    backend.set_vocab_mapping(plan.mapping.selected_token_ids, plan.mapping.selected_token_mask)
    draft = make_draft(settings, backend, plan.mapping).to(device)
    optimizer = make_optimizer(draft, settings.learning_rate, settings.weight_decay)
    first = _resume(settings, plan, draft, optimizer) if settings.resume else 0
    lm_head = backend.lm_head_rows() if backend.encoding == "hidden" else None
    trainer = Trainer(
        Eagle3Unroll(draft, depths=settings.ttt_depths),
        optimizer,
        rate=lambda step: learning_rate(
            step,
            peak=settings.learning_rate,
            warmup=max(1, int(settings.warmup_share * plan.total_steps)),
            total=plan.total_steps,
        ),
        max_grad_norm=settings.max_grad_norm,
        lm_head=lm_head,
        device=device,
        skip_non_finite=settings.skip_non_finite,
    )
    samples = _micro_batches(settings, plan, first, ranks)
    prefetcher: Prefetcher[MicroBatch] = Prefetcher(
        backend, samples, settings.prefetch, memory_bytes=settings.prefetch_mib << 20
    )
    checkpoints = settings.output / "checkpoints"
    if ranks.first:
        identity.write(settings.output, plan.identity)
    log = metrics.MetricsLog(settings.output / "metrics.jsonl", first) if ranks.first else None
    last: StepMetrics | None = None

    def save(step: int) -> None:
        checkpoint.save(
            checkpoints,
            step,
            draft,
            optimizer,
            plan.identity,
            backend.model_info(),
            settings.keep_checkpoints,
        )

    steps = trainer.run(
        _until(stop, prefetcher),
        first_step=first,
        waited_s=lambda: prefetcher.waited_s,
        micro_batches=lambda step: len(_mine(settings, plan, step, ranks)),
        total_steps=plan.total_steps,
    )
    done, saved = first, first
    try:
        for step in steps:
            last = replace(step, prefetch=prefetcher.depth)
            done = last.step
            if log is not None:
                log.write(asdict(last) | _counted(backend))
            on_step(last)
            every = settings.checkpoint_every
            if ranks.first and (done == plan.total_steps or (every and done % every == 0)):
                save(done)
                saved = done
            if stop.by and done < plan.total_steps:
                raise Stopped
    except (Stopped, RuntimeError) as error:  # a rank that has stopped fails the others' sums
        if not stop.by:
            raise
        if ranks.first and done > saved:
            save(done)
        raise TrainerClientError(
            f"stopped by {stop.by} after step {done} of {plan.total_steps}"
            + (f"; a checkpoint of it is in {checkpoints}" if ranks.first and done else "")
            + "; the same command with --resume goes on"
        ) from error
    ranks.meet()
    if log is None:
        return {}
    log.__exit__(None, None, None)
    return _finish(settings, backend, plan, draft, last, prefetcher, time.perf_counter() - began)


def _finish(
    settings: TrainSettings,
    backend: TargetBackend,
    plan: Plan,
    draft: Eagle3Draft,
    last: StepMetrics | None,
    prefetcher: Prefetcher[MicroBatch],
    seconds: float,
) -> dict[str, Any]:
    lines = metrics.read(settings.output / "metrics.jsonl")
    metrics.draw_curves(lines, settings.output / "curves.png")
    write_draft(draft, settings.output / "draft", target_info=backend.model_info())
    summary = {
        "steps": plan.total_steps,
        "seconds": seconds,
        "loss": lines[-1]["loss"] if lines else None,
        "simulated_accept_length": last.accept_length if last else None,
        "waiting_share": prefetcher.waited_s / seconds,
        "peak_memory_bytes": last.peak_memory_bytes if last else None,
        "samples": len(plan.dataset.samples),
        "samples_truncated": plan.dataset.truncated,
        "samples_without_loss": plan.dataset.without_loss,
        "records_left_out": dict(plan.dataset.left_out),
        "global_batch": plan.schedule.global_batch,
        "draft_vocab_size": plan.mapping.draft_vocab_size,
        "draft_vocab_coverage": plan.coverage,
        "draft_path": str(settings.output / "draft"),
        "curves_path": str(settings.output / "curves.png"),
    }
    write_summary(settings.output, summary)
    return summary


def write_summary(output: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``."""
    text = json.dumps(metrics.finite(dict(summary)), indent=1, allow_nan=False)
    (output / "summary.json").write_text(text + "\n")


def _counted(backend: TargetBackend) -> dict[str, int]:
    """What a remote target has counted so far of this rank's requests."""
    counters: Mapping[str, int] = getattr(backend, "counters", dict)()
    return {name: counters[name] for name in ("requests", "resends") if name in counters}


def _mine(settings: TrainSettings, plan: Plan, step: int, ranks: Ranks) -> list[list[int]]:
    """The samples of each of this rank's micro-batches at a step."""
    size = settings.batch_size
    return plan.schedule.micro_batches(step, ranks.rank, ranks.world_size, size)


def _micro_batches(
    settings: TrainSettings, plan: Plan, first: int, ranks: Ranks
) -> Iterator[MicroBatch]:
    for step in range(first, plan.total_steps):
        for numbers in _mine(settings, plan, step, ranks):
            yield collate([plan.dataset.samples[number] for number in numbers])


def _until(stop: Stop, prefetcher: Prefetcher[MicroBatch]) -> Iterator[Eagle3TargetBatch]:
    """Batches that say where their samples come from; a signal ends the wait for the next."""
    arriving = iter(prefetcher)
    while True:
        with stop.interruptible():
            asked, batch = next(arriving, (None, None))
        if asked is None or batch is None:
            return
        yield replace(batch, origins=asked.origins)


def _resume(
    settings: TrainSettings, plan: Plan, draft: Eagle3Draft, optimizer: torch.optim.Optimizer
) -> int:
    """Take up the newest checkpoint of this run; its step, or 0 where there is none."""
    found = checkpoint.complete(settings.output / "checkpoints")
    if not found:
        return 0
    newest = found[-1]
    identity.compare(newest.settings, plan.identity, newest.directory)
    newest.restore(draft, optimizer)
    return newest.step
