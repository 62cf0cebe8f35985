"""What a target gives for one training batch, and the contract of every target backend.

The field names and ``to_trainer_inputs`` follow NeMo AutoModel's ``Eagle3TargetBatch``; the
encodings ``hidden`` (``last_hidden_state``) and ``topk`` are ours and move a fifth of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from worker.targets.contract import HasWeight


@dataclass(frozen=True)
class LmHeadRows:
    """The target's ``lm_head`` restricted to the draft vocab, fetched once for a mapping."""

    weight: Tensor  # [D, H], the target's dtype
    bias: Tensor | None = None  # [D]


#: What a batch has beside the tokens and the aux states, but for logits.
_SUPERVISION = (
    "target_probs",
    "last_hidden_state",
    "topk_log_probs",
    "topk_ids",
    "rest_mass",
    "position_mask",
)


@dataclass(frozen=True)
class Eagle3TargetBatch:
    """Supervision for one batch: exactly one of logits, target_probs, last_hidden_state, topk.

    B batch, T tokens, H target hidden size, V target vocabulary, D draft vocabulary. *Shifted*
    means moved left by one with zeros at the end, so that slot t speaks of token t + 1.

    Raises ``ValueError`` when it does not carry exactly one source of supervision.
    """

    aux_hidden_states: Tensor  # [B, T, 3H], the target's dtype, not shifted
    input_ids: Tensor  # [B, T] int64, shifted
    attention_mask: Tensor  # [B, T], not shifted
    loss_mask: Tensor  # [B, T], shifted
    logits: Tensor | None = None  # [B, T, V], shifted
    target_probs: Tensor | None = None  # [B, T, D] float32, shifted
    position_mask: Tensor | None = None  # [B, T, 1] bool: target's argmax is in the draft vocab
    last_hidden_state: Tensor | None = None  # [B, T, H] after the final norm, shifted
    topk_log_probs: Tensor | None = None  # [B, T, K] float32 over the draft vocab, shifted
    topk_ids: Tensor | None = None  # [B, T, K] draft ids, int16 or int32
    rest_mass: Tensor | None = None  # [B, T, 1] float32: the probability of all other draft ids
    origins: tuple[str, ...] = ()  # where each sample came from, for errors
    #: of the documents that are packed in one row, B = 1: none sees another, each is shifted alone
    lengths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sources = {
            "logits": self.logits is not None,
            "target_probs with position_mask": self.target_probs is not None
            and self.position_mask is not None,
            "last_hidden_state with position_mask": self.last_hidden_state is not None
            and self.position_mask is not None
            and self.logits is None,
            "topk_log_probs, topk_ids and rest_mass with position_mask": all(
                tensor is not None
                for tensor in (
                    self.topk_log_probs,
                    self.topk_ids,
                    self.rest_mass,
                    self.position_mask,
                )
            ),
        }
        if sum(sources.values()) != 1:
            given = [name for name, there in sources.items() if there]
            raise ValueError(
                f"a batch carries exactly one source of supervision, got {given or 'none'}; "
                f"give one of {list(sources)}"
            )

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def map(self, change: Callable[[Tensor], Tensor]) -> Eagle3TargetBatch:
        """The same batch with each of its tensors changed."""
        changed = {name: change(tensor) for name, tensor in self._tensors().items()}
        return Eagle3TargetBatch(**changed, origins=self.origins, lengths=self.lengths)

    def _tensors(self) -> dict[str, Tensor]:
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        del named["origins"], named["lengths"]
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def to_trainer_inputs(self) -> dict[str, Any]:
        """Keyword arguments for :class:`trainer_client.eagle3.unroll.Eagle3Unroll`."""
        inputs: dict[str, Any] = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "loss_mask": self.loss_mask,
            "aux_hidden_states": self.aux_hidden_states,
        }
        if self.lengths:
            inputs["lengths"] = self.lengths
        if self.logits is not None:
            return inputs | {"target_logits": self.logits}
        return inputs | {n: t for n, t in self._tensors().items() if n in _SUPERVISION}


class BatchHandle(Protocol):
    """A batch on its way."""

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch: ...

    def cancel(self) -> bool: ...

    def done(self) -> bool:
        """Whether ``result`` would come at once."""


class TargetBackend(Protocol):
    """The trainer's view of a target, co-located or remote (NeMo's ``Eagle3TargetBackend``)."""

    @property
    def supports_async(self) -> bool: ...

    @property
    def encoding(self) -> str:
        """What batches carry: ``logits``, ``probs``, ``hidden`` or ``topk``."""

    def model_info(self) -> Mapping[str, Any]: ...

    def get_input_embeddings(self) -> HasWeight: ...

    def set_vocab_mapping(self, selected_token_ids: Tensor, selected_token_mask: Tensor) -> None:
        """Say which target ids the draft knows: ids int64 [D] distinct, mask bool [V]."""

    def lm_head_rows(self) -> LmHeadRows: ...

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> Eagle3TargetBatch: ...

    def generate_batch_async(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> BatchHandle: ...

    def close(self) -> None: ...
