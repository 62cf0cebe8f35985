"""Attention of the training-time test, a block of queries at a time: the reference.

EAGLE-3 (arXiv:2503.01840), figure 7: slot t attends to all slots up to t of depth 0, and to itself
at every depth since then. A block of queries needs no key behind it, which halves the work, and its
scores are made again for the gradients, so that no [B, heads, T, T] is ever kept. Any mask serves
here; :mod:`trainer_client.eagle3.merged` is faster where padding is on the right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

#: Queries at a time: enough to fill a matrix product, few enough for scores that fit a cache.
QUERY_BLOCK = 256


def unrolled_attention(
    queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], attention_mask: Tensor
) -> Tensor:
    """Queries [B, heads, T, head_dim] of the newest depth to [B, heads, T, head_dim].

    ``keys`` and ``values`` [B, kv_heads, T, head_dim] are one a depth; kv_heads divides heads.
    ``attention_mask`` [B, T] is that of the unshifted tokens.
    """
    length = queries.shape[2]
    keys, values = ([repeated(each, queries.shape[1]) for each in of] for of in (keys, values))
    real = attention_mask.bool()
    if length <= QUERY_BLOCK:  # little to keep, so nothing is made twice
        return _attend(0, real, queries, *keys, *values)
    blocks = []
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        # depth 0 is seen up to the block's end, later depths by their own slots only
        reach = [slice(0, end), *[slice(begin, end)] * (len(keys) - 1)] * 2
        seen = [each[:, :, part] for each, part in zip((*keys, *values), reach, strict=True)]
        block = checkpoint(
            _attend,
            begin,
            real[:, :end],
            queries[:, :, begin:end],
            *seen,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        blocks.append(block)
    return torch.cat(blocks, dim=2)


def repeated(heads: Tensor, count: int) -> Tensor:
    """Keys or values [B, kv_heads, T, head_dim] once for each of ``count`` heads of queries."""
    return heads.repeat_interleave(count // heads.shape[1], dim=1)


def _attend(begin: int, real: Tensor, queries: Tensor, *keys_and_values: Tensor) -> Tensor:
    """Queries of the slots from ``begin`` on; keys of each depth, then values of each depth."""
    depths = len(keys_and_values) // 2
    keys, values = keys_and_values[:depths], keys_and_values[depths:]
    scale = queries.shape[-1] ** -0.5
    wide = torch.promote_types(queries.dtype, torch.float32)
    scores = torch.matmul(queries, keys[0].transpose(2, 3)) * scale
    seen = scores.shape[-1]
    hidden = ~_visible(begin, queries.shape[2], real)
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    own = [(queries * key).sum(-1, keepdim=True) * scale for key in keys[1:]]
    weights = torch.softmax(torch.cat((scores, *own), dim=-1).to(wide), dim=-1).to(values[0].dtype)
    attended = torch.matmul(weights[..., :seen], values[0])
    for at, value in enumerate(values[1:], start=seen):
        attended = attended + weights[..., at : at + 1] * value
    return attended


def _visible(begin: int, count: int, real: Tensor) -> Tensor:
    """Bool [B, 1, count, keys]: causal from slot ``begin`` on, and not at padding."""
    keys = torch.arange(real.shape[1], device=real.device)
    queries = torch.arange(begin, begin + count, device=real.device)
    return (keys <= queries.unsqueeze(-1)) & real[:, None, None, :]
