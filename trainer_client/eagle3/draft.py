"""The EAGLE-3 draft: one Llama layer over [embedding, hidden], fed by L aux hidden states.

After Li et al., "EAGLE-3" (arXiv:2503.01840), section 3, and with the norms of EAGLE-3.1 (vLLM's
speculators, pull request 610) where the config switches them on; parameters have the names that
vLLM's and SGLang's ``llama_eagle3.py`` load. B batch, T tokens, H hidden size, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from trainer_client.eagle3.attention import repeated, unrolled_attention
from trainer_client.eagle3.config import DraftConfig
from trainer_client.eagle3.merged import merged_attention, usable
from trainer_client.eagle3.packing import Parts, positions

#: How the training-time test attends: ``auto`` merges where it can, ``reference`` never does.
Attention = Literal["auto", "reference"]


@dataclass
class TTTCache:
    """Keys and values [B, kv_heads, T, head_dim] of every unroll depth so far."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    #: whether these sequences are attended by merging; known with the first depth
    merged: bool | None = None


class PackedCache:
    """A :class:`TTTCache` of each part of a row of packed documents."""

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        self.lengths = lengths
        self.parts = Parts(lengths, device)
        self.caches = [TTTCache() for _ in self.parts.rows]


@dataclass
class DecodeCache:
    """Keys and values [1, kv_heads, length, head_dim] of the tokens decoded so far."""

    keys: Tensor | None = None
    values: Tensor | None = None

    @property
    def length(self) -> int:
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = keys, values
        else:
            self.keys = torch.cat((self.keys, keys), dim=2)
            self.values = torch.cat((self.values, values), dim=2)
        return self.keys, self.values

    def crop(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]


class _Rotary(LlamaRotaryEmbedding):
    """Llama's, in float32 whatever the weights are: bfloat16 would shift far positions."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Rotary:
        exact = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            setattr(self, name, buffer.to(getattr(self, name).device))
        return self


class _Attention(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, config.hidden_size, bias=False)

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, T, 2H] to queries [B, heads, T, head_dim], keys and values [B, kv_heads, ...]."""
        batch, length, _ = x.shape
        shape = (batch, length, -1, self.head_dim)
        queries = self.q_proj(x).view(shape).transpose(1, 2)
        keys = self.k_proj(x).view(shape).transpose(1, 2)
        values = self.v_proj(x).view(shape).transpose(1, 2)
        queries, keys = apply_rotary_pos_emb(queries, keys, *rotary)
        return queries.to(values.dtype), keys.to(values.dtype), values  # rotated in float32

    def merge(self, attended: Tensor) -> Tensor:
        return self.o_proj(attended.transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Norm(nn.RMSNorm):
    """RMSNorm in float32 whatever comes in; torch's own is that in some versions' autocast only."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        cast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if cast else x.dtype
        with torch.autocast(kind, enabled=False):
            wide = torch.promote_types(x.dtype, torch.float32)
            normed = F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps)
        return normed.to(dtype)


class _Layer(nn.Module):
    """The fused layer: attention reads [embedding, hidden], the residual is the hidden state."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.norm_before_residual = config.norm_before_residual
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = _Norm(size, eps=eps)
        self.hidden_norm = _Norm(size, eps=eps)
        self.post_attention_layernorm = _Norm(size, eps=eps)
        self.self_attn = _Attention(config)
        self.mlp = _Mlp(config)

    def fused(self, embedded: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """What attention reads [B, T, 2H], and the residual [B, T, H]."""
        normed = self.hidden_norm(hidden)
        x = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        return x, normed if self.norm_before_residual else hidden

    def finish(self, residual: Tensor, attended: Tensor) -> Tensor:
        hidden = residual + self.self_attn.merge(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Eagle3Draft(nn.Module):
    """A draft for one target. ``selected_token_ids`` int64 [D] is its vocabulary, in any order.

    Fresh weights come from torch's default generator; the embeddings are the target's and frozen.
    """

    d2t: Tensor
    t2d: Tensor

    def __init__(
        self, config: DraftConfig, selected_token_ids: Tensor, embeddings: Tensor | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.attention: Attention = "auto"
        if selected_token_ids.numel() != config.draft_vocab_size:
            raise ValueError(
                f"{selected_token_ids.numel()} token ids are selected, the draft vocab has "
                f"{config.draft_vocab_size}"
            )
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        width, count = config.target_hidden_size, config.num_aux_hidden_states
        self.fc = nn.Linear(count * width, size, bias=False)
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(_Norm(width, config.rms_norm_eps) for _ in range(count))
        if config.norm_before_fc:
            self.input_norm = _Norm(count * width, config.rms_norm_eps)
        self.midlayer = _Layer(config)
        self.norm = _Norm(size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(size, config.draft_vocab_size, bias=False)
        ids = selected_token_ids.detach().cpu().long()
        #: int64 [D]: target id minus draft id; bool [V]: the draft knows this target id
        self.register_buffer("d2t", ids - torch.arange(config.draft_vocab_size))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.t2d[ids] = True
        self._rotary = _Rotary(config.to_llama())
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)  # Llama's
        if embeddings is not None:
            self.embed_tokens.weight.data.copy_(embeddings)
        self.embed_tokens.weight.requires_grad_(False)

    @torch.no_grad()
    def start_from_target(self, lm_head: Tensor) -> None:
        """Begin as a blurred view of what the target knows, instead of as noise.

        ``lm_head`` [D, H] are the target's selected rows; ``fc`` becomes the identity on the
        highest aux state, and a tenth of its random self beside it.
        """
        self.lm_head.weight.copy_(lm_head)
        self.fc.weight.mul_(0.1)
        size = self.config.target_hidden_size
        self.fc.weight[:, -size:] += torch.eye(size, device=self.fc.weight.device)

    @property
    def selected_token_ids(self) -> Tensor:
        """Int64 [D]: the target id of each draft id."""
        return self.d2t + torch.arange(self.d2t.numel(), device=self.d2t.device)

    def fuse(self, aux_hidden_states: Tensor) -> Tensor:
        """Aux hidden states [B, T, L * H] of the target to the draft's [B, T, H]."""
        if self.config.fc_norm:
            parts = aux_hidden_states.chunk(self.config.num_aux_hidden_states, dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            aux_hidden_states = torch.cat(normed, dim=-1)
        elif self.config.norm_before_fc:
            aux_hidden_states = self.input_norm(aux_hidden_states)
        if torch.is_autocast_enabled(aux_hidden_states.device.type):
            return self.fc(aux_hidden_states)  # which casts them once, to what it computes in
        return self.fc(aux_hidden_states.to(self.fc.weight.dtype))

    def fed_back(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """What the next token reads of this one's output, whose norm is ``normed``."""
        return normed if self.config.norm_output else hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] to logits [..., D] over the draft vocabulary."""
        return self.lm_head(self.norm(hidden))

    def step(
        self,
        input_ids: Tensor,
        hidden: Tensor,
        cache: TTTCache | PackedCache,
        attention_mask: Tensor,
    ) -> Tensor:
        """One depth of the training-time test over whole sequences [B, T]: hidden [B, T, H].

        Slot t attends to all slots up to t of depth 0, and to itself at every depth since then:
        what it will have seen when it drafts (EAGLE-3, figure 7). At depth i all positions are i
        further on. ``attention_mask`` [B, T] is that of the unshifted tokens.
        """
        packed = cache if isinstance(cache, PackedCache) else None
        caches = packed.caches if packed else [cast(TTTCache, cache)]
        x, residual = self.midlayer.fused(self.embed_tokens(input_ids), hidden)
        at = positions(input_ids[:1], packed.lengths if packed else ()) + len(caches[0].keys)
        projected = self.midlayer.self_attn.project(x, self._rotary(x, at))
        if packed is None:
            attended = self._attended(caches[0], projected, attention_mask)
        else:
            of_each = zip(*map(packed.parts.of, projected), strict=True)
            attended = packed.parts.whole(
                [
                    self._attended(part, one, rows.mask, padded_on_the_right=True)
                    for part, one, rows in zip(caches, of_each, packed.parts.rows, strict=True)
                ]
            )
        return self.midlayer.finish(residual, attended)

    def _attended(
        self,
        cache: TTTCache,
        projected: tuple[Tensor, Tensor, Tensor],
        attention_mask: Tensor,
        *,
        padded_on_the_right: bool = False,
    ) -> Tensor:
        queries, keys, values = projected
        cache.keys.append(keys)
        cache.values.append(values)
        if cache.merged is None:  # the same at every depth
            looked_at = None if padded_on_the_right else attention_mask
            cache.merged = self.attention != "reference" and usable(queries, looked_at)
        if cache.merged:
            return merged_attention(queries, cache.keys, cache.values)
        return unrolled_attention(queries, cache.keys, cache.values, attention_mask)

    def decode(self, input_ids: Tensor, hidden: Tensor, cache: DecodeCache) -> Tensor:
        """Ordinary incremental decoding of n more tokens [1, n]: hidden [1, n, H]."""
        begin, count = cache.length, input_ids.shape[1]
        x, residual = self.midlayer.fused(self.embed_tokens(input_ids), hidden)
        positions = torch.arange(begin, begin + count, device=x.device).unsqueeze(0)
        queries, keys, values = self.midlayer.self_attn.project(x, self._rotary(x, positions))
        keys, values = cache.append(keys, values)
        seen = torch.ones(count, begin + count, dtype=torch.bool, device=x.device).tril(begin)
        keys, values = (repeated(each, queries.shape[1]) for each in (keys, values))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=seen)
        return self.midlayer.finish(residual, attended)
