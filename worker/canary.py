"""Before a worker attaches: does its target give, for each prompt, what is that prompt's?

A few prompts, short, long and of unequal lengths, are run alone, together, and together in another
order. Where there is a reference (transformers' forward of the same weights, for targets inside an
engine or somebody's wrapper), the states are compared with its. All of it is also the warm-up: the
first request of a trainer does not wait for a kernel that is chosen.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping

import torch
from torch import Tensor

from broker.logs import log
from worker.errors import BadRequest, TargetError
from worker.targets.contract import Target, TargetOutputs, frozen, text_config
from worker.targets.foreign import ForeignTarget
from worker.targets.huggingface import HuggingFaceTarget
from worker.targets.tolerance import (
    agree,
    allowed,
    bound,
    chooses_experts,
    differ,
)

_logger = logging.getLogger("draftmq.worker")

_LENGTHS = (1, 5, 12, 33)


def prove(target: Target, *, quantised: bool = False) -> None:
    """:func:`check` against the best reference that is at hand. Raises :class:`TargetError`."""
    reference = reference_of(target)
    try:
        check(target, reference, quantised=quantised)
    finally:
        if isinstance(target, ForeignTarget) and reference is not None:
            reference.close()  # its hooks are on a model of others


def check(target: Target, reference: Target | None = None, *, quantised: bool = False) -> None:
    """Run the prompts. Raises :class:`TargetError` with both figures where something differs.

    ``reference`` is the same model by transformers, or its lowest layers; then only these are
    compared. ``quantised`` allows for an engine that rounds what transformers does not.
    """
    began = time.monotonic()
    compare = _Comparison(target, quantised)
    prompts = _prompts(target)
    alone = [_states(target, [prompt])[0] for prompt in prompts]
    compare("the same prompt twice", _states(target, [prompts[0]])[0], alone[0])
    if target.batchable:
        for how, at in (("prompts run together", [0, 1, 2, 3]), ("another order", [2, 0, 3, 1])):
            together = _states(target, [prompts[number] for number in at])
            for number, made in zip(at, together, strict=True):
                compare(how, made, alone[number])
    if reference is not None:
        whole = _depth(reference) == _depth(target)
        for prompt, made in zip(prompts, alone, strict=True):
            expected = _states(reference, [prompt])[0]
            shared = [n for n in expected if n in made and (whole or n.startswith("layer"))]
            compare("transformers' own forward", made, {name: expected[name] for name in shared})
    seconds = round(time.monotonic() - began, 1)
    log(_logger, "info", "canary_passed", {"target": target.name, "seconds": seconds})


def reference_of(target: Target) -> HuggingFaceTarget | None:
    """What a target can be compared with that is not transformers' own forward; None where nothing
    is at hand, as of a model that is not in this process.
    """
    ends = getattr(target, "ends", None)  # of a model in an engine
    if ends is not None:
        lower: HuggingFaceTarget = ends.lower
        return lower
    lowest = getattr(target, "lowest", None)  # of a model that is cut over several processes
    if lowest is not None:
        made: HuggingFaceTarget = lowest()
        return made
    if not isinstance(target, ForeignTarget) or not isinstance(target.model, torch.nn.Module):
        return None
    try:
        return HuggingFaceTarget(target.model, name=target.name, aux_layer_ids=target.aux_layer_ids)
    except Exception:  # it is no causal language model of transformers' kind
        return None


def _depth(target: Target) -> int:
    return int(text_config(target.model.config).num_hidden_layers)


def _prompts(target: Target) -> list[Tensor]:
    """Token ids [T] of unequal lengths, the same in every worker."""
    draw = torch.Generator().manual_seed(0)
    config = text_config(target.model.config)
    limit = int(getattr(config, "max_position_embeddings", 0) or 0) or max(_LENGTHS)
    return [
        torch.randint(0, target.vocab_size, (min(length, limit),), generator=draw)
        for length in _LENGTHS
    ]


def _states(target: Target, prompts: list[Tensor]) -> list[dict[str, Tensor]]:
    """For each prompt its states by layer [T, H], and what the head makes of it [T, V]."""
    longest = max(len(prompt) for prompt in prompts)
    ids = torch.zeros(len(prompts), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)], mask[row, : len(prompt)] = prompt, 1
    try:
        with frozen(target):
            outputs = target.forward(ids, mask, mask)
    except BadRequest as error:
        raise TargetError(f"target {target.name!r} refused the canary's prompts: {error}") from None
    return [_of_row(target, outputs, row, len(prompt)) for row, prompt in enumerate(prompts)]


def _of_row(target: Target, outputs: TargetOutputs, row: int, length: int) -> dict[str, Tensor]:
    # the first position is gone where outputs are shifted
    slots = slice(0, length - 1) if outputs.shifted else slice(1, length)
    states = outputs.aux_hidden_states[row, :length].unflatten(-1, (len(target.aux_layer_ids), -1))
    made = {
        f"layer {layer}": states[:, at].float().cpu()
        for at, layer in enumerate(target.aux_layer_ids)
    }
    if outputs.last_hidden_state is not None:
        made["the last hidden state"] = outputs.last_hidden_state[row, slots].float().cpu()
    if outputs.logits is not None:
        made["the logits"] = outputs.logits[row, slots].float().cpu()
    return made


class _Comparison:
    """Two ways to the same tensors: by the norm of their difference, or where experts are chosen,
    which a rounding can change, by the share of tokens whose most likely successor is the same.
    """

    def __init__(self, target: Target, quantised: bool) -> None:
        self._routed = chooses_experts(target.model.config)
        self._allowed = allowed(target.dtype, quantised=quantised)

    def __call__(
        self, how: str, made: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> None:
        for name, tensor in expected.items():
            if not tensor.numel():
                continue
            off, same = differ(made[name], tensor)
            behind = not name.startswith("layer")
            limit = bound(self._allowed, routed=self._routed, behind=behind)
            if not agree(off, same, limit, by_share=self._routed and name == "the logits"):
                raise TargetError(
                    f"the canary: {name} in {how} is off by {off:.2g} of its norm, and "
                    f"{limit:.2g} is allowed ({same:.0%} of its largest entries are where "
                    "they were). This target mixes prompts or is not what it says, and is not "
                    "served; --no-canary serves it all the same"
                )
