"""Attention of the training-time test as one flash attention, and a few keys beside it.

Slot t of a later depth sees all slots up to t of depth 0, and one key more for each depth since
then. The first part is what flash attention computes, and it tells the log-sum-exp of its scores;
so the few other scores are merged with it exactly: every part weighs the exponential of its own
log-sum-exp less that of all. The backward of flash attention with the merged log-sum-exp is the
gradient of its part. Merging partial attentions so is the idea of Ring Attention (Liu et al.,
arXiv:2310.01889) and of FlashAttention's split keys (Dao et al., arXiv:2205.14135).

torch has the operators with a log-sum-exp as private ones; :func:`usable` says where they serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten
#: Of fewer tokens the blocks of :mod:`trainer_client.eagle3.attention` are as fast.
MIN_TOKENS = 257


def usable(queries: Tensor, attention_mask: Tensor | None) -> bool:
    """Whether queries [B, heads, T, head_dim] of this dtype and device can be attended so.

    ``attention_mask`` [B, T] must have its padding on the right, for a slot sees all before it;
    None says that it has, or that there is none.
    """
    if queries.shape[2] < MIN_TOKENS or not _has_operators(queries.device.type):
        return False
    if queries.is_cuda:
        half = queries.dtype in (torch.bfloat16, torch.float16)
        if not half or queries.shape[3] % 8 or queries.shape[3] > 256:
            return False
    elif queries.device.type != "cpu" or queries.dtype not in (torch.float32, torch.bfloat16):
        return False
    if attention_mask is None:
        return True
    real = attention_mask.bool()
    return bool((real[:, 1:] <= real[:, :-1]).all())


def _has_operators(kind: str) -> bool:
    name = "_scaled_dot_product_flash_attention" + ("_for_cpu" if kind == "cpu" else "")
    return hasattr(_aten, name) and hasattr(_aten, f"{name}_backward")


def merged_attention(queries: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor]) -> Tensor:
    """Queries [B, heads, T, head_dim] of the newest depth to [B, heads, T, head_dim].

    ``keys`` and ``values`` [B, kv_heads, T, head_dim] are one a depth; kv_heads divides heads.
    """
    merged: Tensor = _Merged.apply(queries.contiguous(), keys[0], values[0], *keys[1:], *values[1:])
    return merged


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, queries: Tensor, key: Tensor, value: Tensor, *own: Tensor) -> Tensor:
        depths, scale = len(own) // 2, queries.shape[-1] ** -0.5
        first, first_lse, kept = _flash(queries, key, value, scale)
        grouped = _grouped(queries, key.shape[1])  # [B, kv_heads, group, T, head_dim]
        scores = [_dot(grouped, each.unsqueeze(2)) * scale for each in own[:depths]]
        lse = _grouped(first_lse.unsqueeze(-1), key.shape[1]).float()  # [B, kv_heads, group, T, 1]
        total = torch.logsumexp(torch.stack([lse, *scores]), 0)
        out = _grouped(first, key.shape[1]) * (lse - total).exp()
        for score, each in zip(scores, own[depths:], strict=True):
            out = out + (score - total).exp() * each.unsqueeze(2)
        out = out.to(queries.dtype).view(queries.shape)
        ctx.save_for_backward(queries, key, value, out, total, *own)
        ctx.kept, ctx.scale = kept, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        queries, key, value, out, total, *own = ctx.saved_tensors
        depths, scale = len(own) // 2, ctx.scale
        grad = grad.to(queries.dtype).contiguous()
        lse = total.reshape(queries.shape[:3])
        of_queries, of_key, of_value = _flash_backward(
            grad, queries, key, value, out, lse, ctx.kept, scale
        )
        if not depths:
            return of_queries, of_key, of_value
        grouped, grouped_grad = (_grouped(each, key.shape[1]) for each in (queries, grad))
        mean = _dot(grouped_grad, _grouped(out, key.shape[1]))
        more = _grouped(of_queries, key.shape[1]).float()
        of_keys, of_values = [], []
        for own_key, own_value in zip(own[:depths], own[depths:], strict=True):
            weights = (_dot(grouped, own_key.unsqueeze(2)) * scale - total).exp()
            wrong = weights * (_dot(grouped_grad, own_value.unsqueeze(2)) - mean) * scale
            of_values.append((weights * grouped_grad).sum(2).to(own_value.dtype))
            of_keys.append((wrong * grouped).sum(2).to(own_key.dtype))
            more = more + wrong * own_key.unsqueeze(2)
        of_queries = more.to(queries.dtype).view(queries.shape)
        return of_queries, of_key, of_value, *of_keys, *of_values


def _grouped(tensor: Tensor, kv_heads: int) -> Tensor:
    """[B, heads, ...] to [B, kv_heads, group, ...]: what shares a key stands together."""
    return tensor.unflatten(1, (kv_heads, -1))


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Products of the last dimension, added up in float32: [..., 1]."""
    return (one * other).sum(-1, keepdim=True, dtype=torch.float32)


def _flash(
    queries: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
    """Causal attention, the natural log-sum-exp of its scaled scores [B, heads, T], and the rest
    that the backward wants.
    """
    if queries.is_cuda:
        out, lse, *kept, _ = _aten._scaled_dot_product_flash_attention(
            queries, key, value, 0.0, True, False, scale=scale
        )
        return out, lse, tuple(kept)
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
        queries, key, value, 0.0, True, scale=scale
    )
    # some versions lay it out as [B, T, heads]
    return out, lse if lse.shape[1] == queries.shape[1] else lse.transpose(1, 2), ()


def _flash_backward(
    grad: Tensor,
    queries: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    kept: tuple[Any, ...],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    flash = (grad, queries, key, value, out, lse.contiguous())
    if queries.is_cuda:
        *lengths, seed, offset = kept
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            *flash, *lengths, 0.0, True, seed, offset, scale=scale
        )
    else:
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *flash, 0.0, True, scale=scale
        )
    of_queries, of_key, of_value = gradients
    return of_queries, of_key, of_value
