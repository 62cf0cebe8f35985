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


class Trainer:
    """Steps an unroll. With a process group, ranks add up gradients and metrics.

    The loss of a step is the sum over its supervised slots divided by their number over all its
    micro-batches and ranks, by depth: however a global batch is cut, its gradient is the same. So a
    rank may have fewer micro-batches than another in a step, or none.
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
        #: steps with a value that is not finite that may still be left out
        self.may_skip = skip_non_finite
        self._unroll = unroll
        self._trained = [p for p in unroll.parameters() if p.requires_grad]
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1

    def run(
        self,
        batches: Iterable[Eagle3TargetBatch],
        *,
        first_step: int,
        waited_s: Callable[[], float],
        micro_batches: Callable[[int], int] | None = None,
        total_steps: int | None = None,
    ) -> Iterator[StepMetrics]:
        """Take the micro-batches of a step until ``batches`` end; yields after every step.

        ``micro_batches`` says how many this rank has in a step (default: ``accumulation``), and
        ``total_steps`` when to end where a rank may have none. ``waited_s`` is the cumulative time
        that ``batches`` has waited for supervision. Raises :class:`NonFiniteError` before a step
        with a value that is not finite, unless it may be skipped.
        """
        iterator = staged(batches, self.device)
        step = first_step
        while total_steps is None or step < total_steps:
            began, waited = time.perf_counter(), waited_s()
            wanted = self.accumulation if micro_batches is None else micro_batches(step)
            taken = list(itertools.islice(iterator, wanted))
            if len(taken) < wanted or (not wanted and total_steps is None):
                return
            counts = self._counts(taken)
            outputs = [self._backward(batch, counts) for batch in taken]
            norm = self._update(step, taken, outputs)
            seconds = time.perf_counter() - began
            share = (waited_s() - waited) / seconds
            n_tokens = [batch.attention_mask.sum() for batch in taken]
            yield self._metrics(step, outputs, norm, n_tokens, seconds, share)
            step += 1

    def _counts(self, batches: Sequence[Eagle3TargetBatch]) -> Tensor:
        """Supervised slots that each depth of this step reaches, over all ranks: int64 [depths]."""
        zeros = torch.zeros(self._unroll.depths, dtype=torch.int64, device=self.device)
        counts = sum((self._unroll.counts(batch) for batch in batches), zeros)
        if self._distributed:
            dist.all_reduce(counts)
        return counts

    def _backward(self, batch: Eagle3TargetBatch, counts: Tensor) -> UnrollOutput:
        kind = self.device.type
        with torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda"):
            output: UnrollOutput = self._unroll(
                **batch.to_trainer_inputs(), lm_head=self.lm_head, counts=counts
            )
        output.loss.backward()
        return output

    def _update(
        self, step: int, batches: Sequence[Eagle3TargetBatch], outputs: Sequence[UnrollOutput]
    ) -> float:
        if self._distributed:
            self._add_up_gradients()
        norm = float(nn.utils.clip_grad_norm_(self._trained, self.max_grad_norm))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(step)
            self.optimizer.step()
        else:
            self._skip_or_raise(step, norm, batches, outputs)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _add_up_gradients(self) -> None:
        works = []
        for parameter in self._trained:
            if parameter.grad is None:  # this rank had no sample in the step
                parameter.grad = torch.zeros_like(parameter)
            works.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in works:
            work.wait()

    def _skip_or_raise(
        self,
        step: int,
        norm: float,
        batches: Sequence[Eagle3TargetBatch],
        outputs: Sequence[UnrollOutput],
    ) -> None:
        """All ranks see the same norm, so all do the same."""
        bad = [batch for batch, output in zip(batches, outputs, strict=True) if not _finite(output)]
        origins = [origin for batch in bad or batches for origin in batch.origins]
        shown = ", ".join(origins[:8]) or "samples of another rank"
        if self.may_skip:
            self.may_skip -= 1
            fields = {"step": step + 1, "grad_norm": str(norm), "samples": shown}
            log(_logger, "warning", "step_skipped", fields)
            return
        raise NonFiniteError(
            f"step {step + 1} has a gradient of norm {norm}, from {shown}; nothing was changed, "
            "and the last checkpoint is as it was; look at these samples and the target's values "
            "there, or leave such steps out with --skip-non-finite N"
        )

    def _metrics(
        self,
        step: int,
        outputs: list[UnrollOutput],
        norm: float,
        n_tokens: list[Tensor],
        seconds: float,
        share: float,
    ) -> StepMetrics:
        zeros = torch.zeros(self._unroll.depths, dtype=torch.int64, device=self.device)
        none = torch.zeros((), dtype=torch.float64, device=self.device)
        loss, tokens, correct, supervised, hits, chains = self._over_ranks(
            sum((output.loss.detach().double() for output in outputs), none),
            sum(n_tokens, none),
            *(sum((getattr(o, name) for o in outputs), zeros) for name in _COUNTS),
        )
        return StepMetrics(
            step=step + 1,
            loss=float(loss),
            depth_accuracy=(correct / supervised.clamp_min(1)).tolist(),
            accept_length=simulated_accept_length(hits, chains),
            learning_rate=self.rate(step),
            grad_norm=norm,
            tokens_per_s=float(tokens) / seconds,
            waiting_share=share,
            seconds=seconds,
            peak_memory_bytes=peak_bytes(self.device),
        )

    def _over_ranks(self, *values: Tensor) -> list[Tensor]:
        """Each of these added up over the ranks, in float64 and in one message."""
        flat = torch.cat([value.flatten().double() for value in values])
        if self._distributed:
            dist.all_reduce(flat)
        return list(flat.split([value.numel() for value in values]))


def _finite(output: UnrollOutput) -> bool:
    return math.isfinite(float(output.loss.detach()))


_COUNTS = ("correct", "supervised", "chain_hits", "chains")
