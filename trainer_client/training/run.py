"""One training run from settings to exported draft, plain or under ``torchrun``."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from trainer_client.drafts import checkpoint
from trainer_client.drafts.export import write_draft
from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.draft import Attention, Eagle3Draft
from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.errors import TrainerClientError
from trainer_client.targets.batch import Eagle3TargetBatch, TargetBackend
from trainer_client.training import identity, metrics
from trainer_client.training.data import Dataset, MicroBatch, Schedule, collate, read_dataset
from trainer_client.training.prefetch import Depth, Prefetcher
from trainer_client.training.stopping import Stop, Stopped
from trainer_client.training.trainer import StepMetrics, Trainer, learning_rate, make_optimizer
from trainer_client.training.vocab import always_known, frequent_tokens, token_counts
from worker.supervision.mapping import VocabMapping

Turns = Literal["all", "last"]


@dataclass(frozen=True)
class TrainSettings:
    """Everything that can be set about a run; each default with its reason."""

    data: Path
    output: Path
    #: Passes over the data, unless ``max_steps`` ends the run first; SpecForge's range is 1 to 10.
    epochs: int = 1
    max_steps: int = 0
    #: Samples of one rank in one micro-batch.
    batch_size: int = 1
    #: Micro-batches of one rank for one optimizer step.
    accumulation: int = 1
    #: Samples of one optimizer step over all ranks; 0: batch size x accumulation x ranks of the
    #: first start. A resumed run keeps it on any number of ranks.
    global_batch: int = 0
    #: SpecForge's default for chat data.
    max_length: int = 2048
    #: Which assistant turns have loss: all, or the last of each conversation.
    loss_on: Turns = "all"
    #: Leave out records that cannot be used, and count them by reason; else the first is an error.
    skip_bad_lines: bool = False
    #: What EAGLE-3's authors and most published drafts use.
    draft_vocab_size: int = 32000
    #: 0: like a layer of the target.
    draft_intermediate_size: int = 0
    #: EAGLE-3's training-time test has 7 depths.
    ttt_depths: int = 7
    #: ``auto`` merges flash attention with the later depths' keys where padding is on the right.
    attention: Attention = "auto"
    #: NeMo AutoModel's and SpecForge's order of magnitude.
    learning_rate: float = 1e-4
    #: Share of the steps that warm up.
    warmup_share: float = 0.05
    weight_decay: float = 0.0
    #: What EAGLE's authors clip at; their loss is a sum over depths and ours a weighted mean, so it
    #: binds less here.
    max_grad_norm: float = 0.5
    #: Steps with a gradient that is not finite to leave out, and report; one more is an error.
    skip_non_finite: int = 0
    #: Requests under way beyond the one that is waited for; ``auto`` finds what keeps the trainer
    #: from waiting, within ``prefetch_mib`` and the brokers' windows.
    prefetch: Depth = "auto"
    #: Room for results that wait for the trainer: 32 of 2,048 tokens, ``hidden`` at H=4096.
    prefetch_mib: int = 2048
    seed: int = 0
    #: Steps between checkpoints; 0: only at the end.
    checkpoint_every: int = 500
    keep_checkpoints: int = 2
    resume: bool = False

    def __post_init__(self) -> None:
        positive = (
            "epochs batch_size accumulation max_length draft_vocab_size ttt_depths learning_rate "
            "max_grad_norm prefetch_mib keep_checkpoints"
        )
        for name in positive.split():
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        not_negative = (
            "max_steps weight_decay checkpoint_every draft_intermediate_size global_batch "
            "skip_non_finite"
        )
        for name in not_negative.split():
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.prefetch != "auto" and self.prefetch < 1:
            raise ValueError(f"prefetch must be 'auto' or at least 1, got {self.prefetch}")
        if not 0 <= self.warmup_share < 1:
            raise ValueError(
                f"warmup_share must be at least 0 and below 1, got {self.warmup_share}"
            )

    def shared(self) -> dict[str, Any]:
        """What a resumed run must have in common with the run that it goes on with."""
        return {name: _plain(v) for name, v in asdict(self).items() if name not in identity.FREE}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class Ranks:
    """Which of the training processes this is."""

    rank: int = 0
    world_size: int = 1

    @classmethod
    def from_environment(cls, timeout_s: float = 600.0) -> Ranks:
        """Join the process group of ``torchrun``, if there is one.

        Tensors on the CPU go by Gloo and, where there is a GPU, those on GPUs by NCCL: a host with
        GPUs may train on its CPU.
        """
        if "WORLD_SIZE" not in os.environ:
            return cls()
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def first(self) -> bool:
        return self.rank == 0

    def meet(self) -> None:
        """Wait for the others, before leaving in good order.

        Gloo's threads take the GIL to let go of a tensor, and the end of a group, which holds it,
        waits for them: right behind an all-reduce it would wait for ever. In a barrier they get it.
        """
        if self.world_size > 1:
            dist.barrier()

    def leave(self) -> None:
        """Leave the process group, also in the middle of things."""
        if dist.is_initialized():
            dist.destroy_process_group()


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
