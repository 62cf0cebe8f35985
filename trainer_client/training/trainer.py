"""The training loop: micro-batches with their supervision in, optimizer steps out."""

from __future__ import annotations

import contextlib
import inspect
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from trainer_client.eagle3.unroll import Eagle3Unroll, UnrollOutput, simulated_accept_length
from trainer_client.targets.batch import Eagle3TargetBatch, LmHeadRows
from trainer_client.training.memory import peak_bytes
from trainer_client.training.staging import staged


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


class Trainer:
    """Steps an unroll. With a process group, ranks average gradients (DDP) and metrics."""

    def __init__(
        self,
        unroll: Eagle3Unroll,
        optimizer: torch.optim.Optimizer,
        *,
        rate: Callable[[int], float],
        accumulation: int,
        max_grad_norm: float,
        lm_head: LmHeadRows | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.rate = rate
        self.accumulation = accumulation
        self.max_grad_norm = max_grad_norm
        self.lm_head = lm_head
        self.device = device or torch.device("cpu")
        self._trained = [p for p in unroll.parameters() if p.requires_grad]
        self._distributed = dist.is_initialized() and dist.get_world_size() > 1
        self._module: nn.Module = unroll
        if self._distributed:
            self._module = DistributedDataParallel(
                unroll, gradient_as_bucket_view=True, **_BUFFERS_STAY
            )

    def run(
        self,
        batches: Iterable[Eagle3TargetBatch],
        *,
        first_step: int,
        waited_s: Callable[[], float],
    ) -> Iterator[StepMetrics]:
        """Take ``accumulation`` batches a step until they end; yields after every step.

        ``waited_s`` is the cumulative time that ``batches`` has waited for supervision.
        """
        iterator = staged(batches, self.device)
        step = first_step
        while True:
            began, waited = time.perf_counter(), waited_s()
            outputs, n_tokens = [], []
            for number in range(self.accumulation):
                batch = next(iterator, None)
                if batch is None:
                    return
                last = number + 1 == self.accumulation
                outputs.append(self._backward(batch, synchronise=last))
                n_tokens.append(batch.attention_mask.sum())
            norm = self._update(step)
            seconds = time.perf_counter() - began
            share = (waited_s() - waited) / seconds
            yield self._metrics(step, outputs, norm, n_tokens, seconds, share)
            step += 1

    def _backward(self, batch: Eagle3TargetBatch, *, synchronise: bool) -> UnrollOutput:
        quiet = (
            self._module.no_sync()
            if isinstance(self._module, DistributedDataParallel) and not synchronise
            else contextlib.nullcontext()
        )
        with quiet:
            with torch.autocast(
                self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda"
            ):
                output: UnrollOutput = self._module(
                    **batch.to_trainer_inputs(), lm_head=self.lm_head
                )
            (output.loss / self.accumulation).backward()
        return output

    def _update(self, step: int) -> float:
        norm = nn.utils.clip_grad_norm_(self._trained, self.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate(step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return float(norm)

    def _metrics(
        self,
        step: int,
        outputs: list[UnrollOutput],
        norm: float,
        n_tokens: list[Tensor],
        seconds: float,
        share: float,
    ) -> StepMetrics:
        loss, tokens, correct, supervised, hits, chains = self._over_ranks(
            torch.stack([output.loss.detach() for output in outputs]).double().mean(),
            torch.stack(n_tokens).sum(),
            *(torch.stack([getattr(o, name) for o in outputs]).sum(0) for name in _COUNTS),
        )
        return StepMetrics(
            step=step + 1,
            loss=float(loss) / (dist.get_world_size() if self._distributed else 1),
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


_COUNTS = ("correct", "supervised", "chain_hits", "chains")

#: No buffer of a draft ever changes, so none need be told again at every step; torch 2.13 renamed
#: the option.
_BUFFERS_STAY: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)
