"""A share of the samples asked for twice, of two workers, and compared; training sees the first."""

from __future__ import annotations

import logging
import random
from collections import Counter
from typing import Any

import torch
from torch import Tensor

from broker.logs import log
from trainer_client.errors import TargetFailedError, TrainerClientError
from trainer_client.targets.batch import Eagle3TargetBatch
from trainer_client.targets.remote import RemoteEagle3TargetModel, RemoteHandle
from trainer_client.training.settings import Differs
from worker.targets.tolerance import (
    agree,
    allowed,
    bound,
    chooses_experts,
    differ,
)

_logger = logging.getLogger("draftmq.train")

#: What ``generate_batch_async`` was given, by name.
Ask = dict[str, Any]
#: Of a batch: what stands before the final norm, and what behind it.
_BEFORE, _BEHIND = ("aux_hidden_states",), ("last_hidden_state", "target_probs", "topk_log_probs")
#: Times that a second worker is asked for again, when the first has answered once more.
_MORE_TRIES = 4


class DisagreementError(TrainerClientError):
    """Two workers gave for the same tokens what differs by more than rounding."""


class Verifier:
    """A remote target of which a ``share`` of the requests goes to a second worker too.

    :attr:`counts` has ``verified``, ``verify_differing`` and ``verify_alone``. Which requests are
    chosen is drawn from ``seed``, and from nothing that training draws from.
    """

    supports_async = True

    def __init__(
        self, backend: RemoteEagle3TargetModel, share: float, differs: Differs, seed: int
    ) -> None:
        self._backend = backend
        self._share = share
        self._differs = differs
        self._draw = random.Random(f"verify {seed}")
        self._info = backend.model_info()
        self.counts: Counter[str] = Counter(verified=0, verify_differing=0, verify_alone=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def generate_batch_async(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, **more: Any
    ) -> RemoteHandle[Eagle3TargetBatch] | Twice:
        """Ask once, or by chance of two workers; the batch is always the first one's."""
        masks = {"attention_mask": attention_mask, "loss_mask": loss_mask}
        ask = {"input_ids": input_ids, **masks, **more}
        first = self._backend.generate_batch_async(**ask)
        return Twice(self, first, ask) if self._draw.random() < self._share else first

    def ask_another(self, ask: Ask, worker: str) -> RemoteHandle[Eagle3TargetBatch]:
        """The same, of any worker but this one where there is another."""
        return self._backend.generate_batch_async(**ask, avoid=worker)

    def compare(
        self,
        first: RemoteHandle[Eagle3TargetBatch],
        second: RemoteHandle[Eagle3TargetBatch],
        ask: Ask,
    ) -> None:
        """Count what came of it. Raises :class:`DisagreementError` where it should."""
        try:
            one, second = first.result(), self._of_another(first, second, ask)
            other, whose = second.result(), second.worker
            if whose == first.worker:
                self.counts["verify_alone"] += 1
                if self.counts["verify_alone"] == 1:
                    log(_logger, "warning", "verify_alone", {"worker": whose})
                return
            story = self._story(one, other)
        except TargetFailedError as error:
            whose, story = "another", f"it failed there: {error}"
        self.counts["verified"] += 1
        if not story:
            return
        self.counts["verify_differing"] += 1
        fields = {"workers": f"{first.worker}, {whose}", "difference": story}
        log(_logger, "warning", "verify_differs", fields)
        if self._differs == "refuse":
            raise DisagreementError(
                f"workers {first.worker} and {whose} do not serve the same target: {story}; "
                "nothing of this sample was used; take the wrong one away (its canary may "
                "name it), or go on with --verify-differs warn"
            )

    def _of_another(
        self,
        first: RemoteHandle[Eagle3TargetBatch],
        second: RemoteHandle[Eagle3TargetBatch],
        ask: Ask,
    ) -> RemoteHandle[Eagle3TargetBatch]:
        """The second answer; asked for again where the same worker gave it, as a broker lets it
        where all others are busy just then.
        """
        alone = self.counts["verify_alone"] and not self.counts["verified"]
        for _ in range(0 if alone else _MORE_TRIES):
            if second.worker != first.worker:
                break
            second = self.ask_another(ask, first.worker)
        return second

    def _story(self, one: Eagle3TargetBatch, other: Eagle3TargetBatch) -> str:
        """In what they differ by more than rounding, with both figures, or nothing."""
        limit = allowed(getattr(torch, self._info["dtype"]), quantised=self._quantised())
        routed = chooses_experts(self._info["config"])
        for name in (*_BEFORE, *_BEHIND):
            expected, made = getattr(one, name), getattr(other, name)
            if expected is None:
                continue
            real = one.attention_mask.bool()  # others' padding is nobody's promise
            off, same = differ(made[real].float().cpu(), expected[real].float().cpu())
            behind = name in _BEHIND
            most = bound(limit, routed=routed, behind=behind)
            if not agree(off, same, most, by_share=routed and behind):
                return (
                    f"{name} is off by {off:.2g} of its norm, and {most:.2g} is allowed "
                    f"({same:.0%} of the largest entries are where they were)"
                )
        return ""

    def _quantised(self) -> bool:
        """Whether the target's or the answers' numbers are rounded to eight bits or fewer."""
        engine = str(self._info.get("engine", ""))
        in_engine = engine.startswith("vllm") and "," in engine
        in_wish = "fp8" in self._backend.encoding
        return in_engine or in_wish or "quantization_config" in self._info["config"]


class Twice:
    """A request under way, and behind it the same of another worker."""

    def __init__(
        self,
        verifier: Verifier,
        first: RemoteHandle[Eagle3TargetBatch],
        ask: Ask,
    ) -> None:
        self._verifier = verifier
        self._first = first
        self._ask = ask
        self._second: RemoteHandle[Eagle3TargetBatch] | None = None

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        """The first answer, when the second has been compared with it."""
        batch = self._first.result(timeout)
        self._verifier.compare(self._first, self._ask_again(), self._ask)
        return batch

    def done(self) -> bool:
        """Whether both are there; the second is asked for as soon as this sees the first."""
        return self._first.done() and self._ask_again().done()

    def cancel(self) -> bool:
        """Give up what is under way."""
        return (self._second or self._first).cancel()

    def _ask_again(self) -> RemoteHandle[Eagle3TargetBatch]:
        if self._second is None:
            self._second = self._verifier.ask_another(self._ask, self._first.worker)
        return self._second
