"""A Hugging Face model whose weights are cut over several processes, a GPU each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor

from worker.errors import TargetGoneError
from worker.targets.contract import HasWeight, Needs, TargetOutputs, full_tensor
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.ranks import Ranks


class ParallelTarget(HuggingFaceTarget):
    """Rank 0's part speaks to the worker; those of the others :meth:`follow`.

    Every rank makes it of its own part of the same model (``tp_plan`` of transformers), at the same
    time: the trial forward and the fingerprint are work of all. ``lowest`` loads the lowest layers
    whole, with which the canary compares what the parts give together.
    """

    def __init__(
        self,
        model: Any,
        *,
        ranks: Ranks,
        name: str,
        aux_layer_ids: Sequence[int] | None = None,
        tokenizer: str | None = None,
        lowest: Callable[[], HuggingFaceTarget] | None = None,
    ) -> None:
        super().__init__(model, name=name, aux_layer_ids=aux_layer_ids, tokenizer=tokenizer)
        self.engine += f", {ranks.size} ranks"  # which add in another order
        self.lowest = lowest
        _ = self.fingerprint  # gathers every tensor
        self._operations: dict[str, Callable[..., Any]] = {
            "forward": self._forward_part,
            "gather": self._gather_part,
        }
        self._ranks = ranks
        self._leader = None if ranks.rank else ranks.lead(name, self._operations)

    @property
    def leads(self) -> bool:
        """Whether this is the rank that a worker is made of."""
        return self._leader is not None

    def follow(self) -> None:
        """Take part in what rank 0 does, until it ends; see :meth:`Ranks.follow`."""
        self._ranks.follow(self._operations)

    @property
    def when_gone(self) -> Callable[[TargetGoneError], None]:
        """Told when another rank ends by itself."""
        return self._led.when_gone

    @when_gone.setter
    def when_gone(self, told: Callable[[TargetGoneError], None]) -> None:
        self._led.when_gone = told

    @property
    def _led(self) -> Any:
        assert self._leader is not None, "a rank that follows speaks to no worker"
        return self._leader

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor | None = None,
        needs: Needs | None = None,
    ) -> TargetOutputs:
        """That of all ranks together; see :meth:`HuggingFaceTarget.forward`."""
        del loss_mask
        ids, mask = input_ids.cpu().numpy(), attention_mask.cpu().numpy()
        made: TargetOutputs = self._led.run("forward", ids, mask, needs)
        return made

    def get_input_embeddings(self) -> HasWeight:
        """With the ``weight`` [V, H] that all ranks gather when it is used."""
        weight = self.model.get_input_embeddings().weight
        return cast(HasWeight, SimpleNamespace(weight=self._spread("input", "weight", weight)))

    def get_output_embeddings(self) -> HasWeight | None:
        """With ``weight`` and ``bias`` that all ranks gather when they are used, or None."""
        head = self.model.get_output_embeddings()
        if head is None:
            return None
        bias = getattr(head, "bias", None)
        made = SimpleNamespace(weight=self._spread("output", "weight", head.weight), bias=None)
        made.bias = None if bias is None else self._spread("output", "bias", bias)
        return cast(HasWeight, made)

    def close(self) -> None:
        """Send the other ranks home, and take the hooks off."""
        super().close()
        if self._leader is not None:
            self._leader.end()

    def _spread(self, end: str, name: str, part: Tensor) -> SpreadTensor:
        rows = min(len(part), self.vocab_size)
        return SpreadTensor(part, rows, lambda: self._led.run("gather", end, name))

    def _forward_part(self, ids: Any, mask: Any, needs: Needs | None) -> TargetOutputs:
        return super().forward(torch.from_numpy(ids), torch.from_numpy(mask), None, needs)

    @torch.no_grad()
    def _gather_part(self, end: str, name: str) -> Tensor:
        get = (
            self.model.get_input_embeddings if end == "input" else self.model.get_output_embeddings
        )
        return full_tensor(getattr(get(), name))[: self.vocab_size]


class SpreadTensor:
    """A frozen tensor of which each rank has a part; :meth:`full_tensor` is work of all ranks."""

    def __init__(self, part: Tensor, rows: int, gather: Callable[[], Tensor]) -> None:
        self.shape = torch.Size((rows, *part.shape[1:]))
        self.dtype = part.dtype
        self.device = part.device
        self.full_tensor = gather

    def detach(self) -> SpreadTensor:
        return self

    def __len__(self) -> int:
        return self.shape[0]
