"""Several requests in one forward: padded on the right, and cut apart again."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.supervision.mapping import VocabMapping
from worker.supervision.requests import Tokens
from worker.supervision.supervision import run_together, suited, supervision
from worker.targets.contract import Target


@torch.no_grad()
def compute_together(
    target: Target,
    requests: Sequence[Tokens],
    *,
    mapping: VocabMapping | None,
    encodings: Sequence[str],
) -> list[dict[str, Tensor]]:
    """What :func:`worker.supervision.compute_supervision` gives for each, from one forward.

    The wishes (``encodings``) differ in their ``rows`` at the most.

    The target sees [sum of B, longest T]; padding has token 0, behind what is attended to, so
    that positions stay what they were. A product of other sizes may be summed in another order:
    the last bits can differ from those that each request gets alone.

    Raises :class:`worker.errors.BadRequest` where the wish or the mapping does not suit.
    """
    wishes = [suited(target, mapping, encoding) for encoding in encodings]
    parts = zip(run_together(target, requests, wishes[0]), requests, wishes, strict=True)
    return [supervision(part, tokens, wish, mapping) for part, tokens, wish in parts]
