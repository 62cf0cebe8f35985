"""How far a run is: a bar where somebody looks at a terminal, lines in the log elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from broker.logs import log
from trainer_client.training.plan import Plan
from trainer_client.training.ranks import Ranks
from trainer_client.training.trainer import StepMetrics

_logger = logging.getLogger("draftmq.train")
#: Between two lines of a log: a day of training is some thousands of them.
_EVERY_S = 30.0


class Progress:
    """Of rank 0; the other ranks say nothing. ``quiet`` is for output that a program reads."""

    def __init__(
        self, ranks: Ranks, *, quiet: bool, clock: Callable[[], float] = time.monotonic
    ) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        self._first, self._quiet, self._clock = ranks.first, quiet, clock
        columns = [TextColumn("training"), BarColumn(), MofNCompleteColumn()]
        more = [TimeRemainingColumn(), TextColumn("{task.fields[shown]}")]
        self._bar = Bar(*columns, *more)
        self._bar.disable = quiet or not ranks.first or not self._bar.console.is_terminal
        self._began: tuple[float, int] | None = None
        self._logged_at = -_EVERY_S
        self._total = 0

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def plan(self, plan: Plan) -> None:
        """The data is read: what there is to train."""
        self._total = plan.total_steps
        self._task = self._bar.add_task("", total=plan.total_steps, shown="")
        dataset, mapping = plan.dataset, plan.mapping
        left_out = "".join(f", {count} {reason}" for reason, count in dataset.left_out.items())
        if self._first and not self._quiet:
            self._bar.console.print(
                f"{len(dataset.samples)} samples, {dataset.n_tokens} tokens "
                f"({dataset.truncated} samples cut, {dataset.without_loss} without loss left out"
                f"{left_out}); {plan.schedule.global_batch} a step, {plan.total_steps} steps; "
                f"draft vocab {mapping.draft_vocab_size} covers {plan.coverage:.1%}"
            )

    def step(self, step: StepMetrics) -> None:
        """An optimizer step is done."""
        shown = (
            f"loss {step.loss:.3f}  accept {step.accept_length:.2f}  "
            f"{step.tokens_per_s:.0f} tokens/s  waiting {step.waiting_share:.0%} "
            f"(prefetch {step.prefetch})"
        )
        if not self._bar.disable:
            self._bar.update(self._task, completed=step.step, shown=shown)
        elif self._first:
            self._log(step)

    def _log(self, step: StepMetrics) -> None:
        now = self._clock()
        self._began = self._began or (now, step.step)
        if now < self._logged_at + _EVERY_S and step.step != self._total:
            return
        self._logged_at = now
        since, first = self._began
        done = step.step - first
        left_s = (now - since) / done * (self._total - step.step) if done else None
        fields = {
            "step": f"{step.step}/{self._total}",
            "loss": round(step.loss, 4),
            "accept": round(step.accept_length, 3),
            "tokens_per_s": round(step.tokens_per_s),
            "waiting": f"{step.waiting_share:.0%}",
            "left_s": None if left_s is None else round(left_s),
        }
        log(_logger, "info", "step", fields)
