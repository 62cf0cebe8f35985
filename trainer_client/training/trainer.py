"""The training loop: micro-batches with their supervision in, optimizer steps out."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from broker.logs import log
from trainer_client.eagle3.unroll import Eagle3Unroll, UnrollOutput, simulated_accept_length
from trainer_client.errors import TrainerClientError
from trainer_client.targets.batch import Eagle3TargetBatch, LmHeadRows
from trainer_client.training.memory import peak_bytes
from trainer_client.training.ranks import added_up, summing
from trainer_client.training.refused import PartialBatch, rows
from trainer_client.training.staging import staged

_logger = logging.getLogger("draftmq.train")


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, over all ranks."""

    step: int
    loss: float
    depth_accuracy: list[float]
    accept_length: float
    learning_rate: float
    grad_norm: float
    tokens_per_s: float
    waiting_share: float  # of this rank's time
    seconds: float
    peak_memory_bytes: int = 0  # this rank's so far: of a GPU's memory, else of RAM
    prefetch: int = 0  # requests kept ahead of this rank
    left_out: tuple[str, ...] = ()  # samples without numbers, which were not trained on


def learning_rate(step: int, *, peak: float, warmup: int, total: int, floor: float = 0.1) -> float:
    """Linear warm-up to ``peak``, then a cosine to ``floor`` of it; a pure function of the step."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup))
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(module: nn.Module, lr: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW (betas as EAGLE-3) on all that trains; norms are not decayed."""
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)


class NonFiniteError(TrainerClientError):
    """A loss or a gradient is not a number; the step was not taken. Names the samples."""


@dataclass(frozen=True)
class _Gradient:
    """The gradient of one step over all ranks, before the optimizer uses it."""

    norm: float  # before it was clipped
    loss: float
    n_tokens: float
    depth_accuracy: list[float]
    accept_length: float

    @property
    def finite(self) -> bool:
        return math.isfinite(self.norm) and math.isfinite(self.loss)


class Trainer:
    """Steps an unroll. With a process group, ranks add up gradients and metrics.

    The loss of a step is the sum over its supervised slots divided by their number over all its
    micro-batches and ranks, by depth: however a global batch is cut, its gradient is the same. So a
    rank may have fewer micro-batches than another in a step, or none.

    All that ranks do together in a step comes before its optimizer step: where it fails, because
    another rank has gone, the weights are those of the step before.
    """

    def __init__(
        self,
        unroll: Eagle3Unroll,
        optimizer: torch.optim.Optimizer,
        *,
        rate: Callable[[int], float],
        accumulation: int = 1,
        max_grad_norm: float,
        lm_head: LmHeadRows | None = None,
        device: torch.device | None = None,
        skip_non_finite: int = 0,
    ) -> None:
        self.optimizer = optimizer
        self.rate = rate
        self.accumulation = accumulation
        self.max_grad_norm = max_grad_norm
        self.lm_head = lm_head
        self.device = device or torch.device("cpu")
        #: samples with a value that is not finite that may still be left out
        self.may_skip = skip_non_finite
        #: some rank was asked to stop; all know it after the same step
        self.stopping = False
        self._unroll = unroll
        self._trained = [p for p in unroll.parameters() if p.requires_grad]
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1

    def run(
        self,
        batches: Iterable[Eagle3TargetBatch | PartialBatch],
        *,
        first_step: int,
        waited_s: Callable[[], float],
        micro_batches: Callable[[int], int] | None = None,
        total_steps: int | None = None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> Iterator[StepMetrics]:
        """Take the micro-batches of a step until ``batches`` end; yields after every step.

        ``micro_batches`` says how many this rank has in a step (default: ``accumulation``), and
        ``total_steps`` when to end where a rank may have none. ``waited_s`` is the cumulative time
        that ``batches`` has waited for supervision. Raises :class:`NonFiniteError` before a step
        with a value that is not finite, unless its samples may be left out, and
        :class:`trainer_client.training.ranks.RankLostError`.
        """
        iterator = staged(batches, self.device)
        step = first_step
        while total_steps is None or step < total_steps:
            began, waited = time.perf_counter(), waited_s()
            wanted = self.accumulation if micro_batches is None else micro_batches(step)
            taken = list(itertools.islice(iterator, wanted))
            if total_steps is None and (len(taken) < wanted or not wanted):
                return
            if len(taken) < wanted:
                raise TrainerClientError(
                    f"step {step + 1} of {total_steps} has {len(taken)} micro-batches and wants "
                    f"{wanted}; the data ended early, and nothing of the step was trained"
                )
            gradient, left_out = self._step(step, taken, asked_to_stop)
            seconds = time.perf_counter() - began
            yield StepMetrics(
                step=step + 1,
                loss=gradient.loss,
                depth_accuracy=gradient.depth_accuracy,
                accept_length=gradient.accept_length,
                learning_rate=self.rate(step),
                grad_norm=gradient.norm,
                tokens_per_s=gradient.n_tokens / seconds,
                waiting_share=(waited_s() - waited) / seconds,
                seconds=seconds,
                peak_memory_bytes=peak_bytes(self.device),
                left_out=left_out,
            )
            step += 1

    def _step(
        self,
        step: int,
        taken: Sequence[Eagle3TargetBatch | PartialBatch],
        asked_to_stop: Callable[[], bool],
    ) -> tuple[_Gradient, tuple[str, ...]]:
        """Learn from a step's micro-batches; also which samples of any rank were left out."""
        batches, refused, story = _split(taken)
        counts = self._counts(batches, len(refused))
        left_out: tuple[str, ...] = ()
        if counts[-1]:
            left_out = self._leave_out(step, "values that are no numbers", refused, story)
        gradient = self._gradient(batches, counts, asked_to_stop)
        if not gradient.finite:
            problem = f"a gradient of norm {gradient.norm}"
            batches, bad = self._finite_samples(batches, counts)
            left_out += self._leave_out(step, problem, bad)
            counts = self._counts(batches)
            gradient = self._gradient(batches, counts, asked_to_stop)
            if not gradient.finite:
                raise NonFiniteError(_said(step, problem, ["all its samples together"]))
        if gradient.n_tokens:  # else nothing is left to learn from
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return gradient, left_out

    def _counts(self, batches: Sequence[Eagle3TargetBatch], n_refused: int = 0) -> Tensor:
        """Over all ranks: supervised slots that each depth of the step reaches, and behind them how
        many of its samples the target refused; int64 [depths + 1].
        """
        zeros = torch.zeros(self._unroll.depths, dtype=torch.int64, device=self.device)
        counts = sum((self._unroll.counts(batch) for batch in batches), zeros)
        return added_up(torch.cat((counts, torch.tensor([n_refused], device=self.device))))

    def _gradient(
        self,
        batches: Sequence[Eagle3TargetBatch],
        counts: Tensor,
        asked_to_stop: Callable[[], bool],
    ) -> _Gradient:
        """The clipped gradient of all ranks' batches, in the parameters, and what there was."""
        self.optimizer.zero_grad(set_to_none=True)
        outputs = [self._backward(batch, counts) for batch in batches]
        if self._distributed:
            self._add_up_gradients()
        zeros = torch.zeros(self._unroll.depths, dtype=torch.int64, device=self.device)
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        loss, n_tokens, stopping, correct, supervised, hits, chains = self._over_ranks(
            sum((output.loss.detach().double() for output in outputs), none),
            sum((batch.attention_mask.sum() for batch in batches), none),
            none + asked_to_stop(),
            *(sum((getattr(o, name) for o in outputs), zeros) for name in _COUNTS),
        )
        self.stopping = bool(stopping)
        return _Gradient(
            norm=float(nn.utils.clip_grad_norm_(self._trained, self.max_grad_norm)),
            loss=float(loss),
            n_tokens=float(n_tokens),
            depth_accuracy=(correct / supervised.clamp_min(1)).tolist(),
            accept_length=simulated_accept_length(hits, chains),
        )

    def _backward(self, batch: Eagle3TargetBatch, counts: Tensor) -> UnrollOutput:
        kind = self.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            output: UnrollOutput = self._unroll(
                **batch.to_trainer_inputs(), lm_head=self.lm_head, counts=counts
            )
        output.loss.backward()
        return output

    def _add_up_gradients(self) -> None:
        works = []
        with summing():
            for parameter in self._trained:
                if parameter.grad is None:  # this rank had no sample in the step
                    parameter.grad = torch.zeros_like(parameter)
                works.append(dist.all_reduce(parameter.grad, async_op=True))
            for work in works:
                work.wait()

    def _finite_samples(
        self, batches: Sequence[Eagle3TargetBatch], counts: Tensor
    ) -> tuple[list[Eagle3TargetBatch], list[str]]:
        """This rank's samples one by one: those with a finite loss and gradient, the others' names.

        A second forward and backward, which only a step with a bad sample costs.
        """
        good: list[Eagle3TargetBatch] = []
        bad: list[str] = []
        for sample in (row for batch in batches for row in rows(batch)):
            self.optimizer.zero_grad(set_to_none=True)
            loss = float(self._backward(sample, counts).loss.detach())
            norm = float(
                nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
            )
            if math.isfinite(loss) and math.isfinite(norm):
                good.append(sample)
            else:
                bad += sample.origins
        return good, bad

    def _leave_out(
        self, step: int, problem: str, mine: Sequence[str], story: str = ""
    ) -> tuple[str, ...]:
        """All ranks' bad samples, where they may be left out. All ranks do the same.

        Raises :class:`NonFiniteError` where they are too many, or none.
        """
        everyone: list[tuple[list[str], str]] = [(list(mine), story)]
        if self._distributed:
            everyone *= dist.get_world_size()
            with summing():
                dist.all_gather_object(everyone, (list(mine), story))
        bad = tuple(origin for theirs, _ in everyone for origin in theirs)
        story = next((text for _, text in everyone if text), "")
        if not bad or len(bad) > self.may_skip:
            raise NonFiniteError(_said(step, problem, bad or ["all its samples together"], story))
        self.may_skip -= len(bad)
        fields = {"step": step + 1, "problem": problem, "samples": ", ".join(bad)}
        log(_logger, "warning", "samples_left_out", fields)
        return bad

    def _over_ranks(self, *values: Tensor) -> list[Tensor]:
        """Each of these added up over the ranks, in float64 and in one message."""
        flat = added_up(torch.cat([value.flatten().double() for value in values]))
        return list(flat.split([value.numel() for value in values]))


def _split(
    taken: Sequence[Eagle3TargetBatch | PartialBatch],
) -> tuple[list[Eagle3TargetBatch], list[str], str]:
    """What there is to learn from, which samples the target refused, and what it said of them."""
    batches: list[Eagle3TargetBatch] = []
    refused: list[str] = []
    story = ""
    for each in taken:
        if isinstance(each, PartialBatch):
            batches += each.good
            refused += each.left_out
            story = story or each.story
        else:
            batches.append(each)
    return batches, refused, story


def _said(step: int, problem: str, samples: Sequence[str], story: str = "") -> str:
    names = ", ".join(samples[:8]) + (f" and {len(samples) - 8} more" if samples[8:] else "")
    return (
        f"step {step + 1} has {problem}, from {names}; nothing was changed, and the last "
        "checkpoint is as it was; look at these samples and the target's values there, or leave "
        f"such samples out with --skip-non-finite N{f' ({story})' if story else ''}"
    )


_COUNTS = ("correct", "supervised", "chain_hits", "chains")
