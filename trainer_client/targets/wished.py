"""Wishes on the trainer's side: what is sent for one, and what its reply is for a trainer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from broker.protocol.wish import Wish, parse_wish
from trainer_client.eagle3.packing import shifted
from trainer_client.targets.batch import Eagle3TargetBatch
from worker.errors import BadRequest
from worker.supervision.fp8 import from_fp8
from worker.supervision.requests import Tokens, validate_tokens
from worker.supervision.supervision import check_layers

_OF_TOPK = ("topk_log_probs", "topk_ids", "rest_mass")


@dataclass(frozen=True)
class TargetSupervision:
    """What a wish asked for, and nothing else. Nothing is shifted: slot t is of token t.

    R positions were wanted of each of B rows, [B, R, ...]; or of packed documents, [R, ...]; where
    the wish says ``at=loss``, all but the states have [M, ...] for the M positions with loss.
    """

    wish: Wish
    states: Tensor | None = None  # [B, R, L, H], the target's dtype: outputs of the L layers
    last: Tensor | None = None  # [B, R, H], the target's dtype: what its head multiplies
    probs: Tensor | None = None  # [B, R, D] float32: the law of token t + 1 over the draft vocab
    topk_log_probs: Tensor | None = None  # [B, R, K] float32, largest first
    topk_ids: Tensor | None = None  # [B, R, K] draft ids, int16 or int32
    rest_mass: Tensor | None = None  # [B, R, 1] float32: the probability of all other draft ids

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], wish: Wish, dtype: str) -> TargetSupervision:
        """From the tensors of a reply; what came as fp8 becomes the target's ``dtype`` again."""
        made = {name: t for name, t in tensors.items() if not name.endswith("_scale")}
        for name, tensor in made.items():
            if tensor.dtype == torch.float8_e4m3fn:
                scale = tensors[f"{name}_scale"]
                made[name] = from_fp8(tensor, scale, getattr(torch, dtype))
        return cls(wish, **made)

    @property
    def nbytes(self) -> int:
        """Bytes of all its tensors, as they are here."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def map(self, change: Callable[[Tensor], Tensor]) -> TargetSupervision:
        """The same with each of its tensors changed."""
        return TargetSupervision(self.wish, **{n: change(t) for n, t in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def to_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        lengths: Sequence[int] = (),
    ) -> Eagle3TargetBatch:
        """EAGLE-3's batch of the ids and masks [B, T] that were asked about; with ``lengths`` they
        are [1, N], of packed documents.

        What counts is what the loss mask says, also where the target's own token is not in the
        draft vocabulary: to know that takes the whole head, which the wish did not ask for.
        """
        assert self.states is not None  # by check_for_training
        device = self.states.device
        mask = loss_mask.to(device)
        shifted_mask = shifted(mask, lengths)
        names = {"last": "last_hidden_state", "probs": "target_probs"} | {n: n for n in _OF_TOPK}
        supervision: dict[str, Any] = {
            names[name]: shifted(self._everywhere(tensor, mask.bool()), lengths)
            for name, tensor in self._tensors().items()
            if name != "states"
        }
        return Eagle3TargetBatch(
            aux_hidden_states=self.states.flatten(-2).reshape(*mask.shape, -1),
            input_ids=shifted(input_ids.to(device, torch.int64), lengths),
            attention_mask=attention_mask.to(device),
            loss_mask=shifted_mask,
            position_mask=shifted_mask.bool().unsqueeze(-1),
            lengths=tuple(lengths) or None,
            **supervision,
        )

    def _everywhere(self, tensor: Tensor, mask: Tensor) -> Tensor:
        """[B, T, ...], with zeros where ``at=loss`` left a position out."""
        if not self.wish.at_loss:
            return tensor.reshape(*mask.shape, tensor.shape[-1])
        whole = tensor.new_zeros(*mask.shape, *tensor.shape[1:])
        whole[mask] = tensor
        return whole


def check_for_training(encoding: str) -> None:
    """Raise ``ValueError`` for a text that is no wish, or not what an EAGLE-3 draft learns from."""
    wish = parse_wish(encoding)
    if wish.name:
        return
    sources = sum((wish.last, wish.probs, bool(wish.topk)))
    if not wish.layers or sources != 1 or wish.rows is not None:
        raise ValueError(
            f"an EAGLE-3 draft cannot be trained with {encoding!r}: it learns from layers and one "
            "of last, probs=all or topk=K, at all positions; say for example "
            "layers=1,17,32;last;states=fp8"
        )


def in_parts(wish: Wish | str) -> Wish:
    """A wish that names its parts. Raises ``ValueError`` for a text that is none, or a name."""
    wish = parse_wish(wish) if isinstance(wish, str) else wish
    if wish.name:
        raise ValueError(f"{wish.name!r} is supervision for EAGLE-3; ask generate_batch for it")
    return wish


def takes_head(encoding: str) -> bool:
    """Whether batches of an encoding have what the trainer itself multiplies by the head."""
    return encoding != "logits" and parse_wish(encoding).has_last


def check_wish(tokens: Tokens, wish: Wish, info: Mapping[str, Any]) -> None:
    """Refuse here what workers that say ``info`` of themselves would refuse.

    Raises :class:`worker.errors.BadRequest`.
    """
    wanted = wish.offered_as
    if wanted and wanted not in info["encodings"]:
        raise BadRequest(
            f"the model {info['model']!r} is served with {', '.join(info['encodings'])}; "
            f"{str(wish)!r} needs {wanted!r}"
        )
    check_layers(wish.layers, tuple(info["layers"]), info["num_hidden_layers"], info["model"])
    validate_tokens(tokens, wish, info["vocab_size"], info["max_position_embeddings"])


def in_row(tensors: Mapping[str, Tensor], lengths: Sequence[int]) -> dict[str, Tensor]:
    """What came for packed documents, [N, ...], as the one row [1, N, ...] that was asked about."""
    return {name: tensor.unsqueeze(0) if lengths else tensor for name, tensor in tensors.items()}


def batch_to_send(
    input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, lengths: Sequence[int]
) -> dict[str, Tensor]:
    """The tensors of a request for a batch: rows [B, T]; or a row [1, N] of packed documents."""
    if not lengths:
        return tokens_to_send(input_ids, attention_mask, loss_mask, None)
    return tokens_to_send(input_ids[0], None, loss_mask[0], torch.tensor(lengths))


def tokens_to_send(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    loss_mask: Tensor | None,
    lengths: Tensor | None,
) -> dict[str, Tensor]:
    """The tensors of a request: rows [B, T], masks of ones where none are given; or packed [N]."""
    if lengths is None:
        ones = torch.ones_like(input_ids)
        return {
            "input_ids": input_ids,
            "attention_mask": ones if attention_mask is None else attention_mask,
            "loss_mask": ones if loss_mask is None else loss_mask,
        }
    if attention_mask is not None:
        raise BadRequest("packed documents have lengths and no padding; leave attention_mask away")
    packed = {"input_ids": input_ids, "lengths": lengths}
    return packed if loss_mask is None else packed | {"loss_mask": loss_mask}
