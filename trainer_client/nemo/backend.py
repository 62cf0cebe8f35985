"""The target behind draftmq's brokers as one of NeMo AutoModel's EAGLE-3 target backends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer_client.nemo.rows import TRIMS, Rows, probs_of_hidden
from trainer_client.targets.batch import Eagle3TargetBatch
from trainer_client.targets.remote import RemoteEagle3TargetModel, RemoteHandle

try:
    from nemo_automodel.components.speculative.eagle.backend import Eagle3TargetBackend
    from nemo_automodel.components.speculative.eagle.target import Eagle3TargetBatch as NemoBatch
except ImportError as error:
    raise ImportError(
        f"trainer_client.nemo works inside NeMo AutoModel, and here is none that can be imported "
        f"({error}); install nemo-automodel, 0.7.0 is the release it was tried with"
    ) from error

#: What NeMo's trainer can learn from, made of what workers send.
ENCODINGS = ("probs", "hidden")


class BrokerTarget(RemoteEagle3TargetModel, Eagle3TargetBackend):
    """:class:`RemoteEagle3TargetModel` whose batches are NeMo's, with rows of NeMo's length.

    ``encoding`` is ``probs``, which has the bits of NeMo's own backends, or ``hidden``: a fifth of
    the bytes, and the trainer's device multiplies by the head
    (:func:`trainer_client.nemo.rows.probs_of_hidden`). ``trim`` says what becomes of padding
    (:data:`trainer_client.nemo.rows.TRIMS`). Other options are those of the base class.

    Raises ``ValueError`` for an encoding or a trim that is none of these.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        encoding: str = "probs",
        trim: str = "exact",
        **options: Any,
    ) -> None:
        for name, value, known in (("encoding", encoding, ENCODINGS), ("trim", trim, TRIMS)):
            if value not in known:
                raise ValueError(f"remote_{name} is {value!r}; choose {' or '.join(known)}")
        self._trim = trim
        super().__init__(urls, device=device, encoding=encoding, **options)

    def generate_batch(  # type: ignore[override]
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> Any:
        """NeMo's batch for ids and masks [B, T]. Waits for it."""
        return self.generate_batch_async(input_ids, attention_mask, loss_mask).result()

    def generate_batch_async(  # type: ignore[override]
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        *,
        step: int | None = None,
    ) -> RemoteHandle[Any]:
        """Ask for NeMo's batch; see the base class."""
        rows = Rows.of(input_ids, attention_mask, loss_mask, self._trim)
        handle = super().generate_batch_async(*rows.asked, step=step, slots=rows.slots)
        head = self.lm_head_rows() if self.encoding == "hidden" else None
        return handle.then(lambda batch: self._whole(batch, rows, head))

    @torch.no_grad()
    def _whole(self, batch: Eagle3TargetBatch, rows: Rows, head: Any) -> Any:
        if head is None:
            probs = batch.target_probs
        else:
            assert batch.last_hidden_state is not None  # by the encoding
            probs = probs_of_hidden(batch.last_hidden_state, head.weight, head.bias)
        assert probs is not None
        assert batch.position_mask is not None
        return NemoBatch(**rows.whole(batch.aux_hidden_states, probs, batch.position_mask))


# So that isinstance() tells of our plain client too what it is: it has all that the class asks for.
Eagle3TargetBackend.register(RemoteEagle3TargetModel)
