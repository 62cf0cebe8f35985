"""Really decoding: a draft's greedy chain, checked by the target, with K/V caches on both sides.

Leviathan et al. (arXiv:2211.17192) for the check, EAGLE-3 (arXiv:2503.01840) for the draft's input:
at slot t it reads the embedding of token t + 1 together with the fused aux states of slot t.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from trainer_client.eagle3.draft import DecodeCache, Eagle3Draft
from trainer_client.errors import DataError
from worker.targets.contract import text_config
from worker.targets.huggingface import HuggingFaceTarget, decoder_layers


@dataclass(frozen=True)
class Decoded:
    """The new tokens of one prompt, and the target forwards that it took after the prompt's own."""

    tokens: list[int]
    target_forwards: int
    #: drafted tokens that were accepted, for each forward
    accepted: list[int]
    seconds: float


@dataclass(frozen=True)
class EvalResult:
    """What ``draftmq eval`` reports."""

    #: new tokens for one target forward: 1 + accepted drafts, the prompt's forward not counted
    accept_length: float
    #: share of the checks in which at least k drafted tokens were accepted, k from 1
    depth_acceptance: list[float]
    #: median over prompts of plain greedy time / speculative time, both with K/V caches
    speedup: float
    #: every token of every prompt is that of plain greedy decoding
    lossless: bool
    #: prompt and position of the first token that is not, if any
    first_difference: tuple[int, int] | None
    prompts: int
    tokens: int
    draft_tokens: int


class _Target:
    """The target with a K/V cache.

    The recurrent state of a hybrid (Qwen3-Next, Falcon-H1, Bamba, LFM2) cannot be cut back to an
    earlier token: of such a cache a copy is kept, and what was accepted is read again from there.
    """

    def __init__(self, target: HuggingFaceTarget) -> None:
        self._model = target.model
        self._layers = decoder_layers(target.model)
        self._ids = target.aux_layer_ids
        self.device = target.device
        self._crops = self._can_crop()
        self.cache: Any = DynamicCache() if self._crops else None

    def _can_crop(self) -> bool:
        """Whether the cache that the model makes of one token holds keys and values alone."""
        ids = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        cache = self._model(input_ids=ids, use_cache=True).past_key_values
        # a state that is recurrent is a LinearAttention...Layer, or, before transformers 5, in a
        # cache of the model's own
        kinds = [type(layer).__name__ for layer in getattr(cache, "layers", ())]
        return isinstance(cache, DynamicCache) and not any("Linear" in kind for kind in kinds)

    def copy(self) -> Any:
        """What :meth:`take_back` needs of the state before a forward; None where it can crop."""
        return None if self._crops else copy.deepcopy(self.cache)

    def take_back(self, before: Any, tokens: Sequence[int], kept: int) -> None:
        """Forget all but the first ``kept`` of the tokens that were read since ``before``."""
        if kept == len(tokens):
            return
        if self._crops:
            self.cache.crop(kept - len(tokens))
        else:
            self.cache = before
            self.forward(tokens[:kept])

    def forward(self, tokens: Sequence[int]) -> Tensor:
        """Logits [n, V] of n more tokens."""
        ids = torch.tensor([list(tokens)], device=self.device)
        output = self._model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        self.cache = output.past_key_values
        logits: Tensor = output.logits
        return logits[0]

    def forward_with_aux(self, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """``(aux hidden states [1, n, L * H], logits [n, V])`` of n more tokens."""
        with self._captured() as states:
            logits = self.forward(tokens)
        return torch.cat([states[layer].to(logits.device) for layer in self._ids], -1), logits

    @contextmanager
    def _captured(self) -> Iterator[dict[int, Tensor]]:
        states: dict[int, Tensor] = {}

        def keep(layer: int) -> Any:
            def hook(module: Any, inputs: Any, output: Any) -> None:
                states[layer] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [self._layers[layer].register_forward_hook(keep(layer)) for layer in self._ids]
        try:
            yield states
        finally:
            for handle in handles:
                handle.remove()


@torch.no_grad()
def greedy_decode(
    target: HuggingFaceTarget,
    prompt: Sequence[int],
    max_new_tokens: int,
    eos: Collection[int] = (),
) -> Decoded:
    """Plain greedy decoding: one target forward for each token after the first.

    ``eos`` are the tokens that end the text; the first of them is its last token.
    """
    decoder = _Target(target)
    began = time.perf_counter()
    tokens = [int(decoder.forward(prompt)[-1].argmax())]
    while len(tokens) < max_new_tokens and tokens[-1] not in eos:
        logits = decoder.forward(tokens[-1:])
        tokens.append(int(logits[-1].argmax()))
    return Decoded(tokens, len(tokens) - 1, [], time.perf_counter() - began)


@torch.no_grad()
def speculative_decode(
    target: HuggingFaceTarget,
    draft: Eagle3Draft,
    prompt: Sequence[int],
    max_new_tokens: int,
    draft_tokens: int = 5,
    eos: Collection[int] = (),
) -> Decoded:
    """Greedy decoding in which the target checks ``draft_tokens`` guesses at once."""
    if draft_tokens < 1:
        raise ValueError(f"draft_tokens must be at least 1, got {draft_tokens}")
    decoder, cache = _Target(target), DecodeCache()
    to_target = draft.selected_token_ids
    began = time.perf_counter()
    aux, logits = decoder.forward_with_aux(prompt)
    tokens = [int(logits[-1].argmax())]
    unread = [*prompt[1:], tokens[0]]  # what the draft has not read, one for each slot of aux
    accepted: list[int] = []
    while len(tokens) < max_new_tokens and tokens[-1] not in eos:
        guesses = _chain(draft, cache, unread, aux, to_target, draft_tokens)
        read = [tokens[-1], *guesses]
        before = decoder.copy()
        aux, logits = decoder.forward_with_aux(read)
        best = logits.argmax(-1).tolist()
        right = 0
        while right < len(guesses) and guesses[right] == best[right]:
            right += 1
        new = best[: right + 1]
        if end := next((at for at, token in enumerate(new, 1) if token in eos), 0):
            new, right = new[:end], min(right, end)  # what comes after the end is not counted
        # the target has read the last token and the right guesses; the draft none of the new
        decoder.take_back(before, read, right + 1)
        aux, unread = aux[:, : right + 1], new
        accepted.append(right)
        tokens += new
    seconds = time.perf_counter() - began
    return Decoded(tokens[:max_new_tokens], len(accepted), accepted, seconds)


def _chain(
    draft: Eagle3Draft,
    cache: DecodeCache,
    unread: Sequence[int],
    aux: Tensor,
    to_target: Tensor,
    count: int,
) -> list[int]:
    """Read the unread tokens with the target's states, then guess ``count`` more from its own."""
    hidden = draft.decode(torch.tensor([list(unread)], device=aux.device), draft.fuse(aux), cache)
    known = cache.length
    guesses: list[int] = []
    while True:
        hidden = hidden[:, -1:]
        token = to_target[draft.logits(hidden)[0, -1].argmax()]
        guesses.append(int(token))
        if len(guesses) == count:
            break
        hidden = draft.decode(token.view(1, 1), draft.fed_back(hidden, draft.norm(hidden)), cache)
    cache.crop(known)  # its own states are replaced by the target's, next time
    return guesses


def evaluate(
    target: HuggingFaceTarget,
    draft: Eagle3Draft,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    draft_tokens: int = 5,
    eos: Collection[int] | None = None,
    on_prompt: Callable[[], object] = lambda: None,
) -> EvalResult:
    """Decode every prompt both ways, in alternating order, and compare token by token.

    ``eos`` are the tokens that end a text, by default the target's own. Raises :class:`DataError`
    when there is no prompt, or one for which the target has not enough positions.
    """
    _check_room(target, prompts, max_new_tokens + draft_tokens)
    draft = draft.eval()
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    options["eos"] = eos_tokens(target) if eos is None else eos
    greedy_decode(target, prompts[0], 4)  # warm up both ways
    speculative_decode(target, draft, prompts[0], 4, draft_tokens)
    accepted: list[int] = []
    ratios: list[float] = []
    difference: tuple[int, int] | None = None
    tokens = 0
    for number, prompt in enumerate(prompts):
        plain = None if number % 2 else greedy_decode(target, prompt, **options)
        fast = speculative_decode(target, draft, prompt, draft_tokens=draft_tokens, **options)
        plain = plain or greedy_decode(target, prompt, **options)
        if fast.tokens != plain.tokens and difference is None:
            difference = (number, _first_difference(fast.tokens, plain.tokens))
        accepted += fast.accepted
        tokens += len(fast.tokens) - 1
        ratios.append(plain.seconds / fast.seconds)
        on_prompt()
    checks = max(1, len(accepted))
    return EvalResult(
        accept_length=1 + sum(accepted) / checks,
        depth_acceptance=[
            sum(count >= depth for count in accepted) / checks
            for depth in range(1, draft_tokens + 1)
        ],
        speedup=statistics.median(ratios),
        lossless=difference is None,
        first_difference=difference,
        prompts=len(prompts),
        tokens=tokens,
        draft_tokens=draft_tokens,
    )


def eos_tokens(target: HuggingFaceTarget) -> tuple[int, ...]:
    """The tokens that end a text of this target, as its generation config or config says."""
    for config in (target.model.generation_config, text_config(target.model.config)):
        said = getattr(config, "eos_token_id", None)
        if said is not None:
            return tuple(said) if isinstance(said, (list, tuple)) else (said,)
    return ()


def _check_room(target: HuggingFaceTarget, prompts: Sequence[Sequence[int]], more: int) -> None:
    if not prompts:
        raise DataError("there is no prompt to decode")
    positions = getattr(text_config(target.model.config), "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise DataError(f"prompt {number} is empty; a prompt has at least one token")
        if positions and len(prompt) + more > positions:
            raise DataError(
                f"prompt {number} has {len(prompt)} tokens and {more} may follow, more than the "
                f"target's {positions} positions; shorten it, or decode fewer tokens"
            )


def _first_difference(one: Sequence[int], two: Sequence[int]) -> int:
    for at, (a, b) in enumerate(zip(one, two, strict=False)):
        if a != b:
            return at
    return min(len(one), len(two))
