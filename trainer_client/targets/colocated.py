"""The target in the trainer's own process: what everything remote is compared with."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import CancelledError
from dataclasses import asdict
from typing import Any

from torch import Tensor

from broker.protocol.wish import Wish, parse_wish
from trainer_client.targets.batch import Eagle3TargetBatch, LmHeadRows
from trainer_client.targets.wished import (
    TargetSupervision,
    batch_to_send,
    check_for_training,
    in_parts,
    in_row,
    tokens_to_send,
)
from worker.supervision.mapping import VocabMapping
from worker.supervision.requests import Tokens, validate_request, validate_tokens
from worker.supervision.supervision import compute, lm_head_rows
from worker.targets import as_target
from worker.targets.contract import HasWeight, describe


class ColocatedTarget:
    """A :class:`trainer_client.targets.batch.TargetBackend` over a target in this process.

    ``target`` is a worker's target or any object with the co-located contract; the supervision is
    made by the code that workers run, and refused by the same checks (``BadRequest``).
    ``encoding`` is that of the remote target, or ``logits``, the seed's: the full vocabulary
    [B, T, V], projected by the trainer.
    Raises ``ValueError`` for an encoding that is none, or that the target does not offer.
    """

    supports_async = False

    def __init__(self, target: Any, encoding: str = "probs", *, name: str = "") -> None:
        self.target = as_target(target, name=name)
        self.facts = describe(self.target, name)
        self.encoding = encoding
        self._wish: Wish | None = None  # none says "logits"
        if encoding != "logits":
            check_for_training(encoding)
            self._wish = parse_wish(encoding)
            self.encoding = str(self._wish)
            self._refuse_unoffered(self._wish)
        self._mapping: VocabMapping | None = None

    def _refuse_unoffered(self, wish: Wish) -> None:
        wanted = wish.offered_as
        if wanted and wanted not in self.facts.encodings:
            offered = ", ".join((*self.facts.encodings, "logits"))
            why = getattr(self.target, "hidden_refused", "")
            raise ValueError(
                f"encoding {self.encoding!r} is not to be had from {self.facts.model!r}"
                f"{f': {why}' if why else ''}; choose {offered}"
            )

    def model_info(self) -> dict[str, Any]:
        """The facts of the target, as a worker would tell them."""
        facts = asdict(self.facts)
        if self._wish is not None and self._wish.layers:
            facts["aux_layer_ids"] = self._wish.layers
        return {key: list(v) if isinstance(v, tuple) else v for key, v in facts.items()}

    def get_input_embeddings(self) -> HasWeight:
        """Object with ``weight`` [V, H]."""
        return self.target.get_input_embeddings()

    def set_vocab_mapping(self, selected_token_ids: Tensor, selected_token_mask: Tensor) -> None:
        """Say which target ids the draft knows: ids int64 [D] distinct, mask bool [V].

        Raises ``ValueError`` when the two differ, or are for another vocabulary.
        """
        mapping = VocabMapping.from_mask_and_ids(selected_token_ids, selected_token_mask)
        if mapping.vocab_size != self.facts.vocab_size:
            raise ValueError(
                f"the mapping is for a vocabulary of {mapping.vocab_size}, the target "
                f"{self.facts.model!r} has {self.facts.vocab_size}"
            )
        self._mapping = mapping

    def lm_head_rows(self) -> LmHeadRows:
        """The target's ``lm_head`` rows for the draft vocab."""
        rows = lm_head_rows(self.target, self._need_mapping())
        return LmHeadRows(rows["weight"], rows.get("bias"))

    def generate_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        *,
        lengths: Sequence[int] = (),
    ) -> Eagle3TargetBatch:
        """Supervision of ids and masks [B, T], on the target's device; with ``lengths`` [1, N] of
        packed documents. Raises ``ValueError`` for those in the encoding ``logits``.
        """
        if self._wish is None:
            if lengths:
                raise ValueError("packed documents cannot be had as logits; say hidden or probs")
            limit = self.facts.max_position_embeddings
            validate_request(input_ids, attention_mask, loss_mask, self.facts.vocab_size, limit)
            batch = self.target.generate_batch(
                input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask
            )
            fields = ("aux_hidden_states", "input_ids", "attention_mask", "loss_mask", "logits")
            return Eagle3TargetBatch(**{field: getattr(batch, field) for field in fields})
        if not self._wish.name:
            tokens = batch_to_send(input_ids, attention_mask, loss_mask, lengths)
            made = TargetSupervision.of(
                self._compute(self._wish, tokens), self._wish, self.facts.dtype
            )
            return made.to_batch(input_ids, attention_mask, loss_mask, lengths)
        tokens = batch_to_send(input_ids, attention_mask, loss_mask, lengths)
        tensors: dict[str, Any] = in_row(self._compute(self._wish, tokens), lengths)
        mask = attention_mask.to(tensors["input_ids"].device)
        return Eagle3TargetBatch(attention_mask=mask, lengths=tuple(lengths) or None, **tensors)

    def supervise(
        self,
        wish: Wish | str,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
    ) -> TargetSupervision:
        """What a wish names, of rows [B, T] or packed documents [N]; see the remote target's."""
        wish = in_parts(wish)
        tokens = tokens_to_send(input_ids, attention_mask, loss_mask, lengths)
        return TargetSupervision.of(self._compute(wish, tokens), wish, self.facts.dtype)

    def _compute(self, wish: Wish, tokens: Tokens) -> dict[str, Tensor]:
        facts = self.facts
        validate_tokens(tokens, wish, facts.vocab_size, facts.max_position_embeddings)
        mapping = self._need_mapping() if wish.over_vocabulary else None
        return compute(self.target, tokens, mapping=mapping, encoding=str(wish))

    def generate_batch_async(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        *,
        lengths: Sequence[int] = (),
    ) -> LazyBatch:
        """A handle that computes when it is asked, since nothing else could compute meanwhile."""
        return LazyBatch(self, (input_ids, attention_mask, loss_mask), lengths)

    def close(self) -> None:
        """Nothing: the target belongs to the caller."""

    def _need_mapping(self) -> VocabMapping:
        if self._mapping is None:
            raise ValueError(f"call set_vocab_mapping first; {self.encoding!r} needs the mapping")
        return self._mapping

    def __repr__(self) -> str:
        return f"<ColocatedTarget {self.facts.model} {self.encoding}>"


class LazyBatch:
    """A batch that is computed by the first ``result``."""

    def __init__(
        self,
        backend: ColocatedTarget,
        tokens: tuple[Tensor, Tensor, Tensor],
        lengths: Sequence[int] = (),
    ) -> None:
        self._backend = backend
        self._lengths = lengths
        self._tokens: tuple[Tensor, Tensor, Tensor] | None = tokens
        self._batch: Eagle3TargetBatch | None = None
        self._once = threading.Lock()

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        """The batch; ``timeout`` says nothing here. Raises ``CancelledError`` after a cancel."""
        with self._once:
            if self._batch is None:
                if self._tokens is None:
                    raise CancelledError
                self._batch = self._backend.generate_batch(*self._tokens, lengths=self._lengths)
            return self._batch

    def cancel(self) -> bool:
        """True if the batch was not computed, and now never will be."""
        with self._once:
            if self._batch is None:
                self._tokens = None
            return self._batch is None

    def done(self) -> bool:
        """Whether it is computed already."""
        return self._batch is not None
