"""The target in the trainer's own process: what everything remote is compared with."""

from __future__ import annotations

import threading
from concurrent.futures import CancelledError
from dataclasses import asdict
from typing import Any

from torch import Tensor

from trainer_client.targets.batch import Eagle3TargetBatch, HasWeight, LmHeadRows
from worker.supervision.mapping import VocabMapping
from worker.supervision.supervision import compute_supervision, lm_head_rows, validate_request
from worker.targets import as_target
from worker.targets.contract import describe

#: ``logits`` is the seed's: the full vocabulary [B, T, V], projected by the trainer.
ENCODINGS = ("probs", "hidden", "topk", "logits")


class ColocatedTarget:
    """A :class:`trainer_client.targets.batch.TargetBackend` over a target in this process.

    ``target`` is a worker's target or any object with the co-located contract; the supervision is
    made by the code that workers run, and refused by the same checks (``BadRequest``).
    Raises ``ValueError`` for an encoding that is none, or that the target does not offer.
    """

    supports_async = False

    def __init__(self, target: Any, encoding: str = "probs", *, name: str = "") -> None:
        self.target = as_target(target, name=name)
        self.facts = describe(self.target, name)
        self.encoding = encoding
        if encoding not in ("logits", *self.facts.encodings):
            offered = ", ".join((*self.facts.encodings, "logits"))
            why = getattr(self.target, "hidden_refused", "") if encoding in ENCODINGS else ""
            raise ValueError(
                f"encoding {encoding!r} is not to be had from {self.facts.model!r}"
                f"{f': {why}' if why else ''}; choose {offered}"
            )
        self._mapping: VocabMapping | None = None

    def model_info(self) -> dict[str, Any]:
        """The facts of the target, as a worker would tell them."""
        facts = asdict(self.facts)
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
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> Eagle3TargetBatch:
        """Supervision of ids and masks [B, T], on the target's device."""
        limit = self.facts.max_position_embeddings
        validate_request(input_ids, attention_mask, loss_mask, self.facts.vocab_size, limit)
        if self.encoding == "logits":
            batch = self.target.generate_batch(
                input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask
            )
            fields = ("aux_hidden_states", "input_ids", "attention_mask", "loss_mask", "logits")
            return Eagle3TargetBatch(**{field: getattr(batch, field) for field in fields})
        tensors = compute_supervision(
            self.target,
            input_ids,
            attention_mask,
            loss_mask,
            mapping=self._need_mapping(),
            encoding=self.encoding,
        )
        mask = attention_mask.to(tensors["input_ids"].device)
        return Eagle3TargetBatch(attention_mask=mask, **dict[str, Any](tensors))

    def generate_batch_async(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> LazyBatch:
        """A handle that computes when it is asked, since nothing else could compute meanwhile."""
        return LazyBatch(self, (input_ids, attention_mask, loss_mask))

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

    def __init__(self, backend: ColocatedTarget, tokens: tuple[Tensor, Tensor, Tensor]) -> None:
        self._backend = backend
        self._tokens: tuple[Tensor, Tensor, Tensor] | None = tokens
        self._batch: Eagle3TargetBatch | None = None
        self._once = threading.Lock()

    def result(self, timeout: float | None = None) -> Eagle3TargetBatch:
        """The batch; ``timeout`` says nothing here. Raises ``CancelledError`` after a cancel."""
        with self._once:
            if self._batch is None:
                if self._tokens is None:
                    raise CancelledError
                self._batch = self._backend.generate_batch(*self._tokens)
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
