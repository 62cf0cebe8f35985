"""One training run from settings to exported draft, plain or under ``torchrun``."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from broker.logs import log
from trainer_client.drafts import checkpoint
from trainer_client.drafts.export import write_draft
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.eagle3.unroll import Eagle3Unroll
from trainer_client.errors import RequestError, TrainerClientError
from trainer_client.targets.batch import Eagle3TargetBatch, TargetBackend
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.targets.wished import takes_head
from trainer_client.training import identity, metrics, validation
from trainer_client.training.data import MicroBatch, collate, in_bins, in_one_row
from trainer_client.training.place import Found, held
from trainer_client.training.plan import Plan, agreed_plan, make_draft
from trainer_client.training.prefetch import Prefetcher
from trainer_client.training.ranks import RankLostError, Ranks
from trainer_client.training.refused import PartialBatch, ask_one_by_one
from trainer_client.training.settings import TrainSettings
from trainer_client.training.stopping import Stop, Stopped
from trainer_client.training.trainer import StepMetrics, Trainer, learning_rate, make_optimizer
from trainer_client.training.verify import DisagreementError, Verifier
from trainer_client.watch.boards import Board, opened, write

_logger = logging.getLogger("draftmq.train")
#: In a run's directory: what was measured on held-out samples, a line for each checkpoint.
VALIDATION = "validation.jsonl"


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
    """Run to the end; returns what ``summary.json`` says. Only rank 0 reads and writes the run.

    Raises :class:`TrainerClientError` of all kinds; nothing is trained on partial supervision. When
    ``stop`` says so it writes a checkpoint and raises one that says how to go on.
    """
    stop, ranks = stop or Stop(), ranks or Ranks()
    with held(settings.output) if ranks.first else contextlib.nullcontext():
        found, plan = agreed_plan(settings, backend, tokenizer, ranks)
        on_plan(plan)
        run = _Run(settings, backend, plan, ranks, device or torch.device("cpu"), stop)
        run.begin(found)
        with stop.shielded():
            return run.to_the_end(on_step)


class _Run:
    """A run that is planned, on one rank."""

    def __init__(
        self,
        settings: TrainSettings,
        backend: TargetBackend,
        plan: Plan,
        ranks: Ranks,
        device: torch.device,
        stop: Stop,
    ) -> None:
        self._settings, self._backend, self._plan = settings, backend, plan
        self._ranks, self._device, self._stop = ranks, device, stop
        self._checkpoints = settings.output / "checkpoints"
        #: where rank 0's figures go beside the disk
        self._boards: list[Board] = []
        #: steps that are done, and of which there is a checkpoint
        self._done = self._saved = 0
        self._began = time.perf_counter()
        #: the step with the least held-out loss, on rank 0
        self._best: int | None = None

    def begin(self, found: Found) -> None:
        """Make the draft, or take up the newest checkpoint; the same weights on every rank."""
        settings, backend, plan = self._settings, self._backend, self._plan
        mapping = plan.mapping
        backend.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
        self.draft = make_draft(settings, backend, mapping, plan.initial).to(self._device)
        self.optimizer = make_optimizer(self.draft, settings.learning_rate, settings.weight_decay)
        if found.newest is not None and self._ranks.first:
            identity.compare(found.newest.settings, plan.identity, found.newest.directory)
            found.newest.restore(self.draft, self.optimizer)
        self._ranks.share(self.draft, self.optimizer)
        self._done = self._saved = found.step
        lm_head = backend.lm_head_rows() if takes_head(backend.encoding) else None
        if plan.held_out and found.newest is not None:
            self._best = (validation.best_step(settings.output) or (None, 0))[0]
        self._verifier = _verifier(settings, backend, self._ranks)
        self._unroll = Eagle3Unroll(self.draft, depths=settings.ttt_depths)
        self._trainer = Trainer(
            self._unroll,
            self.optimizer,
            rate=lambda step: learning_rate(
                step,
                peak=settings.learning_rate,
                warmup=max(1, int(settings.warmup_share * plan.total_steps)),
                total=plan.total_steps,
            ),
            max_grad_norm=settings.max_grad_norm,
            lm_head=lm_head,
            device=self._device,
            skip_non_finite=settings.skip_non_finite,
        )
        self._prefetcher: Prefetcher[MicroBatch] = Prefetcher(
            self._verifier or backend,
            _micro_batches(settings, plan, found.step, self._ranks),
            settings.prefetch,
            memory_bytes=settings.prefetch_mib << 20,
            failed=functools.partial(ask_one_by_one, backend),
        )

    def to_the_end(self, on_step: Callable[[StepMetrics], None]) -> dict[str, Any]:
        """Train what is left; gives the summary on rank 0, and {} on the others."""
        settings = self._settings
        if not self._ranks.first:
            self._train(on_step)
            return {}
        checkpoint.clean(self._checkpoints)
        identity.write(settings.output, self._plan.identity)
        if self._plan.held_out:
            metrics.forget_after(settings.output / VALIDATION, self._done)
        shown = opened(settings.boards, settings.output, self._done, settings.plain())
        with (
            metrics.MetricsLog(settings.output / "metrics.jsonl", self._done) as log,
            shown as self._boards,
        ):

            def written(step: StepMetrics) -> None:
                line = asdict(step) | _counted(self._backend) | self._verified()
                log.write(line)
                write(self._boards, step.step, line)
                on_step(step)

            self._train(written)
        seconds = time.perf_counter() - self._began
        waiting = self._prefetcher.waited_s / seconds
        finish = (settings, self._backend, self._plan, self.draft, seconds, waiting)
        return _finish(*finish, self._verified())

    def _verified(self) -> dict[str, int]:
        """What a second worker was asked for, of this rank's samples; {} where nothing is."""
        return dict(self._verifier.counts) if self._verifier else {}

    def _train(self, on_step: Callable[[StepMetrics], None]) -> None:
        total, stop = self._plan.total_steps, self._stop
        steps = self._trainer.run(
            _until(stop, self._prefetcher),
            first_step=self._done,
            waited_s=lambda: self._prefetcher.waited_s,
            micro_batches=lambda step: len(_mine(self._settings, self._plan, step, self._ranks)),
            total_steps=total,
            asked_to_stop=lambda: bool(stop.by),
        )
        try:
            for step in steps:
                self._done = step.step
                on_step(replace(step, prefetch=self._prefetcher.depth))
                every = self._settings.checkpoint_every
                if self._done == total or (every and self._done % every == 0):
                    self._validate()
                    self._save()
                if (stop.by or self._trainer.stopping) and self._done < total:
                    raise Stopped
            self._ranks.meet()
        except (Stopped, RankLostError) as error:
            by = stop.by or ("the end of another rank" if isinstance(error, RankLostError) else "")
            raise self._ended(f"stopped by {by or 'a signal to another rank'}") from error
        except DisagreementError as error:
            raise self._ended(f"{error}; the run ended") from error
        except RequestError as error:  # no workers for too long, or a target that fails
            raise self._ended(f"{error}; the run ended") from error

    def _validate(self) -> None:
        """Measure on what is held out; all ranks take part."""
        if not self._plan.held_out:
            return
        loss, accept = validation.measure(
            self._unroll,
            self._backend,
            self._plan.held_out,
            ranks=self._ranks,
            batch_size=self._settings.batch_size,
            lm_head=self._trainer.lm_head,
            device=self._device,
            waiting=self._stop.interruptible,
        )
        if self._ranks.first:
            self._best = validation.note(self._settings.output, self._done, loss, accept)
            fields = {"step": self._done, "loss": loss, "accept": accept, "best_step": self._best}
            log(_logger, "info", "validation", fields)
            metrics.append(self._settings.output / VALIDATION, fields)
            write(self._boards, self._done, {"loss": loss, "accept": accept}, "validation/")

    def _ended(self, why: str) -> TrainerClientError:
        """Save what was done; the error that says how to go on."""
        self._save()
        there = f"; a checkpoint of it is in {self._checkpoints}" if self._saved else ""
        return TrainerClientError(
            f"{why} after step {self._done} of {self._plan.total_steps}{there}; the same command "
            "with --resume goes on"
        )

    def _save(self) -> None:
        if not self._ranks.first or self._done == self._saved:
            return
        checkpoint.save(
            self._checkpoints,
            self._done,
            self.draft,
            self.optimizer,
            self._plan.identity,
            self._backend.model_info(),
            self._settings.keep_checkpoints,
            self._best,
        )
        self._saved = self._done
        _draw(self._settings, self._plan, self._done)


def _finish(
    settings: TrainSettings,
    backend: TargetBackend,
    plan: Plan,
    draft: Eagle3Draft,
    seconds: float,
    waiting_share: float,
    verified: Mapping[str, int],
) -> dict[str, Any]:
    lines = metrics.read(settings.output / "metrics.jsonl")
    if not (settings.output / "curves.png").exists():
        _draw(settings, plan, plan.total_steps)
    write_draft(draft, settings.output / "draft", target_info=backend.model_info())
    last = lines[-1] if lines else {}
    best = validation.best_step(settings.output) if plan.held_out else None
    summary = {
        "steps": plan.total_steps,
        "seconds": seconds,
        "loss": last.get("loss"),
        "simulated_accept_length": last.get("accept_length"),
        "waiting_share": waiting_share,
        "peak_memory_bytes": last.get("peak_memory_bytes"),
        **verified,
        "samples": len(plan.dataset.samples),
        "samples_held_out": len(plan.held_out),
        "validation_loss": best[1] if best else None,
        "best_step": best[0] if best else None,
        "samples_truncated": plan.dataset.truncated,
        "samples_without_loss": plan.dataset.without_loss,
        "samples_not_finite": [origin for line in lines for origin in line.get("left_out", ())],
        "records_left_out": dict(plan.dataset.left_out),
        "global_batch": plan.schedule.global_batch,
        "draft_vocab_size": plan.mapping.draft_vocab_size,
        "draft_vocab_coverage": plan.coverage,
        "draft_path": str(settings.output / "draft"),
        "curves_path": str(settings.output / "curves.png"),
    }
    write_summary(settings.output, summary)
    return summary


def _draw(settings: TrainSettings, plan: Plan, done: int) -> None:
    lines = metrics.read(settings.output / "metrics.jsonl")
    title = f"{settings.output.name}: draft of {plan.identity['model']}, "
    where = settings.output / "curves.png"
    metrics.draw_curves(lines, where, f"{title}step {done} of {plan.total_steps}")


def write_summary(output: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``. Raises :class:`trainer_client.training.identity.RunError`."""
    text = json.dumps(metrics.finite(dict(summary)), indent=1, allow_nan=False)
    identity.write_whole(output / "summary.json", text + "\n")


def _verifier(settings: TrainSettings, backend: TargetBackend, ranks: Ranks) -> Verifier | None:
    """What asks for a share of the samples twice, where that is wanted.

    Raises :class:`TrainerClientError` for a target that has no workers.
    """
    if not settings.verify_share:
        return None
    if not isinstance(backend, RemoteEagle3TargetModel):
        raise TrainerClientError(
            "--verify-share asks a second worker, and this target has none; leave it away"
        )
    seed = settings.seed * ranks.world_size + ranks.rank
    return Verifier(backend, settings.verify_share, settings.verify_differs, seed)


def _counted(backend: TargetBackend) -> dict[str, int]:
    """What a remote target has counted so far of this rank's requests."""
    counters: Mapping[str, int] = getattr(backend, "counters", dict)()
    return {name: counters[name] for name in ("requests", "resends") if name in counters}


def _mine(settings: TrainSettings, plan: Plan, step: int, ranks: Ranks) -> list[list[int]]:
    """The samples of each of this rank's micro-batches at a step."""
    rank, world = ranks.rank, ranks.world_size
    if settings.pack:
        return in_bins(plan.schedule.of_rank(step, rank, world), plan.lengths, settings.pack)
    return plan.schedule.micro_batches(step, rank, world, settings.batch_size)


def _micro_batches(
    settings: TrainSettings, plan: Plan, first: int, ranks: Ranks
) -> Iterator[MicroBatch]:
    together = in_one_row if settings.pack else collate
    for step in range(first, plan.total_steps):
        for numbers in _mine(settings, plan, step, ranks):
            yield together([plan.dataset.samples[number] for number in numbers])


def _until(
    stop: Stop, prefetcher: Prefetcher[MicroBatch]
) -> Iterator[Eagle3TargetBatch | PartialBatch]:
    """Batches that say where their samples come from; a signal ends the wait for the next."""
    arriving = iter(prefetcher)
    while True:
        with stop.interruptible():
            asked, batch = next(arriving, (None, None))
        if asked is None or batch is None:
            return
        if isinstance(batch, Eagle3TargetBatch):
            batch = replace(batch, origins=asked.origins)
        yield batch
