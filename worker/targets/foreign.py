"""Targets that others wrote: any object with the co-located contract, made a worker's target."""

from __future__ import annotations

import logging
import threading
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from broker.logs import log
from worker.errors import TargetError
from worker.targets.contract import (
    ColocatedContract,
    HasWeight,
    TargetOutputs,
    full_tensor,
    shift_left,
    text_config,
)
from worker.targets.fingerprint import files_fingerprint, has_files, weights_fingerprint

_logger = logging.getLogger("draftmq.worker")
#: The members of the co-located contract.
CONTRACT = ("generate_batch", "get_input_embeddings", "aux_layer_ids", "model")
#: What a worker's own targets have beside it.
OURS = (*CONTRACT, "forward", "fingerprint", "encodings", "vocab_size", "dtype")


class ForeignTarget:
    """Adds what a worker needs: a fingerprint, encodings, one call at a time, and checks.

    ``hidden`` is offered where batches have a ``last_hidden_state`` beyond the contract, and one of
    a few tokens shows that the model's head makes the logits of it. A batch that is not of the ids
    that went in (NeMo AutoModel's Hugging Face wrapper can mix up concurrent calls) is an error,
    and never someone's supervision; that states are not mixed up is what the lock is for.
    """

    def __init__(self, inner: ColocatedContract, name: str, tokenizer: str = "") -> None:
        self._inner = inner
        self._one_call = threading.Lock()
        self.name = name
        self.tokenizer = tokenizer
        self.model = inner.model
        self.aux_layer_ids = tuple(int(layer) for layer in inner.aux_layer_ids)
        #: its outputs are shifted, and what it makes of padding is not known
        self.batchable = False
        config = text_config(self.model.config)
        self.vocab_size = int(config.vocab_size)
        self._hidden_size = int(config.hidden_size)

    @cached_property
    def encodings(self) -> tuple[str, ...]:
        """What one batch of a few tokens shows that there is."""
        ids = torch.arange(min(8, self.vocab_size)).unsqueeze(0)
        ones = torch.ones_like(ids)
        batch = self.generate_batch(ids, ones, ones)
        last, head = getattr(batch, "last_hidden_state", None), self.get_output_embeddings()
        if last is None or tuple(last.shape) != (*ids.shape, self._hidden_size):
            return ("probs", "topk")
        if head is None or not _makes_logits(head, last, batch.logits):
            return ("probs", "topk")
        return ("probs", "hidden", "topk")

    @property
    def dtype(self) -> torch.dtype:
        """Of the embeddings, and so of the hidden states."""
        return self.get_input_embeddings().weight.dtype

    @cached_property
    def fingerprint(self) -> str:
        """The target's own, else of its weights, or of the files that they came from."""
        if own := getattr(self._inner, "fingerprint", None):
            return str(own)
        if hasattr(self.model, "state_dict"):
            return weights_fingerprint(self.model)
        where = str(getattr(self.model.config, "_name_or_path", "") or "")
        if has_files(where):
            return files_fingerprint(self.model.config, where)  # in an engine of its own
        why = (
            "its model has no state_dict, and its config's _name_or_path no files of weights here: "
            "a fine-tune of its inner layers would count as the same; give the wrapper a "
            "fingerprint"
        )
        log(_logger, "warning", "fingerprint_is_weak", {"target": self.name, "why": why})
        return weights_fingerprint(_Embeddings(self))

    def get_input_embeddings(self) -> HasWeight:
        """Of the inner target."""
        return self._inner.get_input_embeddings()

    def get_output_embeddings(self) -> HasWeight | None:
        """Of the inner target's model, where it has one."""
        get = getattr(self.model, "get_output_embeddings", None)
        return get() if get else None

    def generate_batch(self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor) -> Any:
        """The inner target's batch, checked. Raises :class:`TargetError`."""
        device = self.get_input_embeddings().weight.device
        ids = input_ids.to(device)
        with self._one_call, torch.no_grad():
            batch = self._inner.generate_batch(
                input_ids=ids,
                attention_mask=attention_mask.to(device),
                loss_mask=loss_mask.to(device),
            )
        self._check(batch, ids)
        return batch

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> TargetOutputs:
        """The inner target's batch as outputs that are shifted already."""
        batch = self.generate_batch(input_ids, attention_mask, loss_mask)
        aux, logits = full_tensor(batch.aux_hidden_states), full_tensor(batch.logits)
        last = full_tensor(batch.last_hidden_state) if "hidden" in self.encodings else None
        return TargetOutputs(aux, logits, last, shifted=True)

    def close(self) -> None:
        """Close the inner target, if it can be."""
        close = getattr(self._inner, "close", None)
        if close:
            close()

    def _check(self, batch: Any, ids: Tensor) -> None:
        batch_tokens = tuple(ids.shape)
        wanted = {
            "logits": (*batch_tokens, self.vocab_size),
            "aux_hidden_states": (*batch_tokens, len(self.aux_layer_ids) * self._hidden_size),
            "input_ids": batch_tokens,
            "loss_mask": batch_tokens,
        }
        for field, shape in wanted.items():
            tensor = getattr(batch, field, None)
            if tensor is None or tuple(tensor.shape) != shape:
                got = "nothing" if tensor is None else str(tuple(tensor.shape))
                raise TargetError(
                    f"the target's generate_batch gave {got} for {field}, its contract says {shape}"
                )
        if not torch.equal(full_tensor(batch.input_ids).to(ids.device), shift_left(ids)):
            raise TargetError(
                "the target's generate_batch gave a batch of other token ids than it was given "
                "(input_ids must come back moved left by one)"
            )

    def __repr__(self) -> str:
        return f"<ForeignTarget {self.name} {type(self._inner).__name__}>"


def _makes_logits(head: HasWeight, last: Tensor, logits: Tensor) -> bool:
    """Whether these shifted logits are the head's product with these shifted states."""
    weight = full_tensor(head.weight.detach())
    if tuple(weight.shape) != (logits.shape[-1], last.shape[-1]):
        return False
    bias = getattr(head, "bias", None)
    bias = None if bias is None else full_tensor(bias)
    made = F.linear(full_tensor(last).to(weight), weight, bias)[:, :-1].float()
    expected = full_tensor(logits)[:, :-1].float()
    off = (made - expected.to(made.device)).norm() / expected.norm().clamp_min(1e-12).to(
        made.device
    )
    return bool(off <= 0.02)


class _Embeddings:
    """All that a target whose model has no ``state_dict`` shows of its weights."""

    def __init__(self, target: ForeignTarget) -> None:
        self.config = target.model.config
        self._weights = {"input_embeddings": target.get_input_embeddings().weight}
        if (head := target.get_output_embeddings()) is not None:
            self._weights["output_embeddings"] = head.weight

    def state_dict(self) -> dict[str, Tensor]:
        return self._weights
