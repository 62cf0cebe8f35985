"""What may be asked of a target, looked at before it runs; on a GPU a bad id ends the process."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from broker.protocol.wish import Wish
from worker.errors import BadRequest

#: Token ids and masks by name: ``input_ids``, ``attention_mask``, ``loss_mask``, each [B, T]; or
#: packed ``input_ids`` [N], ``lengths`` [documents] and, where the wish needs one, ``loss_mask``.
Tokens = Mapping[str, Tensor]

IN_ROWS = ("input_ids", "attention_mask", "loss_mask")
PACKED = (("input_ids", "lengths"), ("input_ids", "lengths", "loss_mask"))

_INTEGERS = (torch.int64, torch.int32)
_MASKS = (torch.bool, torch.int64, torch.int32, torch.uint8)


def validate_tokens(tokens: Tokens, wish: Wish, vocab_size: int, max_tokens: int = 0) -> None:
    """Check what a wish is made of: rows or packed documents, by the names of the tensors.

    ``max_tokens`` is the longest sequence that the target has positions for (0: it does not say).
    Raises :class:`BadRequest` with both numbers.
    """
    names = tuple(tokens)
    if names == IN_ROWS:
        validate_request(**tokens, vocab_size=vocab_size, max_tokens=max_tokens)
    elif names in PACKED:
        _validate_packed(tokens, vocab_size, max_tokens)
    else:
        raise BadRequest(f"wants the tensors {IN_ROWS}, or packed {PACKED[-1]}, got {names}")
    if "loss_mask" not in tokens and (wish.name or wish.at_loss):
        raise BadRequest(f"the wish {str(wish)!r} needs a loss_mask, and none came")
    positions = tokens["input_ids"].shape[-1]
    if wish.rows is not None and wish.rows[1] > positions:
        raise BadRequest(
            f"rows={wish.rows[0]}-{wish.rows[1]} is asked for, and there are {positions} positions"
        )


def validate_request(
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    vocab_size: int,
    max_tokens: int | None = None,
) -> None:
    """Check ids and masks [B, T]; see :func:`validate_tokens`."""
    tensors = {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
    for name, tensor in tensors.items():
        _check_dtype(name, tensor, _INTEGERS if name == "input_ids" else _MASKS)
        if tensor.ndim != 2:
            raise BadRequest(f"{name} must be [batch, tokens], got shape {tuple(tensor.shape)}")
        _check_equal(name, tensor, input_ids)
    if not input_ids.numel():
        raise BadRequest(f"the batch is empty: input_ids has shape {tuple(input_ids.shape)}")
    _check_length(input_ids.shape[1], max_tokens)
    _check_ids(input_ids, vocab_size)


def _validate_packed(tokens: Tokens, vocab_size: int, max_tokens: int) -> None:
    input_ids, lengths = tokens["input_ids"], tokens["lengths"]
    for name, tensor in tokens.items():
        _check_dtype(name, tensor, _MASKS if name == "loss_mask" else _INTEGERS)
        if tensor.ndim != 1:
            raise BadRequest(
                f"{name} of packed documents must be [tokens] or [documents], got shape "
                f"{tuple(tensor.shape)}"
            )
    if "loss_mask" in tokens:
        _check_equal("loss_mask", tokens["loss_mask"], input_ids)
    if not lengths.numel():
        raise BadRequest("there are no documents: lengths is empty")
    if int(lengths.min()) < 1:
        raise BadRequest(f"a document has {int(lengths.min())} tokens; each needs at least 1")
    if int(lengths.sum()) != input_ids.numel():
        raise BadRequest(
            f"the lengths add up to {int(lengths.sum())}, and there are {input_ids.numel()} tokens"
        )
    _check_length(int(lengths.max()), max_tokens)
    _check_ids(input_ids, vocab_size)


def _check_dtype(name: str, tensor: Tensor, allowed: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in allowed:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise BadRequest(f"{name} is {tensor.dtype}; it must be one of {names}")


def _check_equal(name: str, tensor: Tensor, input_ids: Tensor) -> None:
    if tensor.shape != input_ids.shape:
        raise BadRequest(
            f"{name} has shape {tuple(tensor.shape)}, input_ids {tuple(input_ids.shape)}; "
            "they must be equal"
        )


def _check_length(tokens: int, max_tokens: int | None) -> None:
    if max_tokens and tokens > max_tokens:
        raise BadRequest(
            f"the sequences have {tokens} tokens, the target has positions for "
            f"{max_tokens}; cut the data to that"
        )


def _check_ids(input_ids: Tensor, vocab_size: int) -> None:
    lowest, highest = (int(bound) for bound in input_ids.aminmax())
    if lowest >= 0 and highest < vocab_size:
        return
    place = ((input_ids < 0) | (input_ids >= vocab_size)).nonzero()[0].tolist()
    raise BadRequest(
        f"input_ids{place} is {int(input_ids[tuple(place)])}, and the target's vocabulary "
        f"has {vocab_size} tokens (valid: 0 to {vocab_size - 1}); was the data tokenized with the "
        "target's tokenizer?"
    )
