"""From logits over the whole vocabulary to probabilities over the draft's, in small parts."""

from __future__ import annotations

import torch
from torch import Tensor

#: Values that are float32 beside the result at a time: 16 MiB, which a CPU's cache still helps
#: with and which keeps a GPU's kernels large enough.
CHUNK_VALUES = 1 << 22


def draft_probs(
    logits: Tensor,
    selected_token_ids: Tensor,
    *,
    shifted: bool,
    chunk_values: int = CHUNK_VALUES,
) -> Tensor:
    """Softmax over the selected of logits [B, T, V], at ids int64 [D]: [B, T, D] float32.

    Slot t speaks of token t + 1: ``shifted`` logits do already, others are read one further on,
    and the last slot is then the softmax of zeros. The bits are those of one softmax over
    everything, since each row is summed on its own. Beside the result it takes at most
    ``chunk_values`` (or one row, D) in the logits' dtype and twice that in float32; nothing of
    [B, T, V] is copied.
    """
    rows, tokens = logits.shape[:2]
    size = selected_token_ids.numel()
    probs = torch.empty(rows, tokens, size, dtype=torch.float32, device=logits.device)
    said = tokens if shifted else tokens - 1
    step = max(1, chunk_values // size)
    for row in range(rows):
        source = logits[row, tokens - said :]
        for at in range(0, said, step):
            selected = source[at : at + step].index_select(-1, selected_token_ids)
            probs[row, at : min(at + step, said)] = torch.softmax(selected.float(), dim=-1)
    if not shifted:
        probs[:, -1] = torch.softmax(torch.zeros(size, device=logits.device), dim=-1)
    return probs
