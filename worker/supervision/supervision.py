"""From a wish and token ids to what a draft learns from, by one forward of a target."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from broker.protocol.wish import Wish, WishError, parse_wish
from worker.errors import BadRequest, TargetError
from worker.supervision.eagle3 import named
from worker.supervision.mapping import VocabMapping
from worker.supervision.requests import Tokens
from worker.supervision.unshifted import OF_ALL_POSITIONS, unshifted
from worker.targets.contract import (
    Needs,
    Target,
    TargetOutputs,
    full_tensor,
    layers_of,
    text_config,
)


@torch.no_grad()
def compute_supervision(
    target: Target,
    input_ids: Tensor,
    attention_mask: Tensor,
    loss_mask: Tensor,
    *,
    mapping: VocabMapping | None = None,
    encoding: str,
) -> dict[str, Tensor]:
    """Run the target on ids and masks [B, T] and give what the wish ``encoding`` asks for.

    The tensors are those of :func:`worker.supervision.eagle3.named` for the names ``probs``,
    ``hidden`` and ``topk``, else those of :func:`worker.supervision.unshifted.unshifted`.
    Raises :class:`BadRequest` for a wish or a mapping that does not suit the target.
    """
    tokens = {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
    wish = suited(target, mapping, encoding)
    return supervision(run(target, tokens, wish), tokens, wish, mapping)


@torch.no_grad()
def compute_packed(
    target: Target,
    input_ids: Tensor,
    lengths: Tensor,
    loss_mask: Tensor | None = None,
    *,
    mapping: VocabMapping | None = None,
    encoding: str,
) -> dict[str, Tensor]:
    """The same for documents that follow one another: ids [N], lengths [documents], mask [N].

    Where the tensors of rows have [B, T, ...], these have [N, ...]. Each document is run alone, and
    has the bits that it has in a request of its own; one outside of ``rows`` is not run. Only a
    target for which unequal rows cost no padding (``ragged``) runs them in one forward.
    """
    wish = suited(target, mapping, encoding)
    documents = list(_documents(input_ids, lengths, loss_mask, wish))
    if getattr(target, "ragged", False):
        outputs = run_together(target, [tokens for tokens, _ in documents], wish)
    else:
        outputs = (run(target, tokens, of_it) for tokens, of_it in documents)
    made = [
        supervision(each, tokens, of_it, mapping)
        for each, (tokens, of_it) in zip(outputs, documents, strict=True)
    ]
    return {name: torch.cat([_flat(each[name], name, wish) for each in made]) for name in made[0]}


def compute(
    target: Target, tokens: Tokens, *, mapping: VocabMapping | None, encoding: str
) -> dict[str, Tensor]:
    """:func:`compute_packed` of tokens that are packed, else :func:`compute_supervision`."""
    made = compute_packed if "lengths" in tokens else compute_supervision
    return made(target, **tokens, mapping=mapping, encoding=encoding)


def _documents(
    input_ids: Tensor, lengths: Tensor, loss_mask: Tensor | None, wish: Wish
) -> Iterator[tuple[Tokens, Wish]]:
    """Each document that has some of the wanted rows, as one row [1, T], and the wish for it."""
    mask = torch.zeros_like(input_ids) if loss_mask is None else loss_mask
    first, end = wish.rows or (0, input_ids.numel())
    at = 0
    for length in lengths.tolist():
        kept = max(first - at, 0), min(end - at, length)
        if kept[0] < kept[1]:
            ids = input_ids[at : at + length].unsqueeze(0)
            tokens = {
                "input_ids": ids,
                "attention_mask": torch.ones_like(ids),
                "loss_mask": mask[at : at + length].unsqueeze(0),
            }
            yield tokens, wish.within(*kept) if wish.rows else wish
        at += length


def run_together(target: Target, requests: Sequence[Tokens], wish: Wish) -> Iterator[TargetOutputs]:
    """:func:`run` of several at once, cut apart. Raises :class:`TargetError` for shifted outputs,
    which would end in what belongs to the padding.
    """
    outputs = run(target, padded(requests), wish)
    if outputs.shifted:
        raise TargetError(
            f"target {target.name!r} says that it is batchable and gives shifted outputs; cut "
            "apart, they would end in what belongs to the padding"
        )
    first = 0
    for tokens in requests:
        rows, length = tokens["input_ids"].shape
        yield outputs.cut(slice(first, first + rows), slice(0, length))
        first += rows


def padded(requests: Sequence[Tokens]) -> dict[str, Tensor]:
    """All rows [sum of B, longest T]; zeros on the right of the shorter ones."""
    longest = max(tokens["input_ids"].shape[1] for tokens in requests)
    return {
        name: torch.cat([_widened(tokens[name], longest) for tokens in requests])
        for name in requests[0]
    }


def _widened(tensor: Tensor, length: int) -> Tensor:
    return F.pad(tensor, (0, length - tensor.shape[1]))


def _flat(tensor: Tensor, name: str, wish: Wish) -> Tensor:
    """Of one document: [1, T, ...] as [T, ...]; chosen positions [M, ...] as they are."""
    return tensor if wish.at_loss and name not in OF_ALL_POSITIONS else tensor.flatten(0, 1)


def supervision(
    outputs: TargetOutputs, tokens: Tokens, wish: Wish, mapping: VocabMapping | None
) -> dict[str, Tensor]:
    """:func:`compute_supervision` of a forward that has run."""
    if not wish.name:
        return unshifted(outputs, tokens["loss_mask"], wish, mapping)
    assert mapping is not None  # a name is over the vocabulary
    return named(outputs, tokens["input_ids"], tokens["loss_mask"], wish, mapping)


def run(target: Target, tokens: Tokens, wish: Wish) -> TargetOutputs:
    """The forward of rows [B, T] that a wish takes, and no more of it than it needs."""
    rows = (tokens["input_ids"], tokens["attention_mask"], tokens["loss_mask"])
    if wish.name:
        return target.forward(*rows)
    if hasattr(target, "layers"):
        needs = Needs(wish.layers, wish.last, wish.over_vocabulary)
        return target.forward(*rows, needs)  # type: ignore[call-arg]
    outputs = target.forward(*rows)  # it gives its own layers, whatever is needed
    own = list(target.aux_layer_ids)
    states = outputs.aux_hidden_states.unflatten(-1, (len(own), -1))
    wanted = states[..., [own.index(layer) for layer in wish.layers], :].flatten(-2)
    return TargetOutputs(wanted, outputs.logits, outputs.last_hidden_state, outputs.shifted)


def suited(target: Target, mapping: VocabMapping | None, encoding: str) -> Wish:
    """The wish that a text says. Raises :class:`BadRequest` where the target cannot fulfil it."""
    try:
        wish = parse_wish(encoding)
    except WishError as error:
        raise BadRequest(str(error)) from None
    offered = ", ".join(target.encodings)
    wanted = wish.offered_as
    if wanted and wanted not in target.encodings:
        why = getattr(target, "hidden_refused", "") if wanted == "hidden" else ""
        raise BadRequest(
            f"target {target.name!r} does not offer {encoding!r}"
            f"{f' because {why}' if why else ''}; it offers {offered}"
        )
    check_layers(
        wish.layers,
        layers_of(target),
        int(text_config(target.model.config).num_hidden_layers),
        target.name,
    )
    if wish.over_vocabulary:
        if mapping is None:
            raise BadRequest(f"the wish {encoding!r} is over a vocab mapping, and none was named")
        _same_vocabulary(target, mapping)
    return wish


def check_layers(wanted: tuple[int, ...], had: tuple[int, ...], num_layers: int, name: str) -> None:
    """Raise :class:`BadRequest` for layers that a target does not have or give (``had``; empty:
    it gives all).
    """
    missing = [
        layer for layer in wanted if (layer not in had if had else not -1 <= layer < num_layers)
    ]
    if missing:
        can = ", ".join(map(str, had)) if had else f"-1 to {num_layers - 1}"
        raise BadRequest(
            f"layers {','.join(map(str, missing))} are asked for, and target {name!r} with its "
            f"{num_layers} layers gives {can}"
        )


def lm_head_rows(target: Target, mapping: VocabMapping) -> dict[str, Tensor]:
    """The rows of the target's head for the draft vocab: weight [D, H] and, if any, bias [D].

    Raises :class:`BadRequest` where the target has no head to show, or for another vocabulary.
    """
    _same_vocabulary(target, mapping)
    head = target.get_output_embeddings()
    if head is None:
        raise BadRequest(f"target {target.name!r} has no lm_head to send rows of; use 'probs'")
    weight, bias = full_tensor(head.weight.detach()), getattr(head, "bias", None)
    selected_token_ids, _ = mapping.on(weight.device)
    rows = {"weight": weight.index_select(0, selected_token_ids)}
    if bias is not None:
        rows["bias"] = full_tensor(bias.detach()).index_select(0, selected_token_ids)
    return rows


def input_embeddings(target: Target) -> dict[str, Tensor]:
    """The target's input embeddings: weight [V, H]."""
    return {"weight": full_tensor(target.get_input_embeddings().weight.detach())}


def _same_vocabulary(target: Target, mapping: VocabMapping) -> None:
    if mapping.vocab_size != target.vocab_size:
        raise BadRequest(
            f"the vocab mapping is for {mapping.vocab_size} target tokens, target "
            f"{target.name!r} has {target.vocab_size}"
        )
