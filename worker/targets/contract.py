"""What a target is: the co-located contract, and what a worker needs beside it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from worker.errors import TargetError


@dataclass(frozen=True)
class Needs:
    """What a forward must give; a target may stop a forward that has given it."""

    #: ids, ascending: their outputs, and with -1 the input of layer 0
    layers: tuple[int, ...]
    last: bool
    logits: bool


@dataclass(frozen=True)
class TargetOutputs:
    """One forward. ``shifted``: logits and last hidden state are moved left by one already.

    L is the number of the layers that were wanted, which is three unless :class:`Needs` says.
    """

    aux_hidden_states: Tensor  # [B, T, L * H], the target's dtype, never shifted
    logits: Tensor | None  # [B, T, V], the target's dtype
    last_hidden_state: Tensor | None = None  # [B, T, H], what the lm_head multiplies
    shifted: bool = False

    def cut(self, rows: slice, slots: slice) -> TargetOutputs:
        """Views of some rows, and of some slots of each."""
        last = self.last_hidden_state
        return TargetOutputs(
            self.aux_hidden_states[rows, slots],
            None if self.logits is None else self.logits[rows, slots],
            None if last is None else last[rows, slots],
            self.shifted,
        )


@dataclass(frozen=True)
class TargetBatch:
    """What ``generate_batch`` of the co-located contract returns (NeMo AutoModel's field names)."""

    aux_hidden_states: Tensor  # [B, T, 3H]
    logits: Tensor  # [B, T, V], shifted
    input_ids: Tensor  # [B, T] int64, shifted
    attention_mask: Tensor  # [B, T]
    loss_mask: Tensor  # [B, T], shifted
    last_hidden_state: Tensor | None = None  # [B, T, H], shifted


class HasWeight(Protocol):
    """An ``nn.Embedding`` or ``nn.Linear``, or anything else with their weight."""

    @property
    def weight(self) -> Tensor: ...  # [V, H]


class ColocatedContract(Protocol):
    """The contract that NeMo AutoModel's wrappers for Hugging Face, SGLang and vLLM keep."""

    @property
    def model(self) -> Any: ...  # with .config, and .parameters() where there are any

    @property
    def aux_layer_ids(self) -> Sequence[int]: ...

    def get_input_embeddings(self) -> HasWeight: ...

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> Any: ...


class Target(ColocatedContract, Protocol):
    """What a worker serves. :func:`worker.targets.as_target` makes it of a co-located target."""

    @property
    def name(self) -> str: ...

    @property
    def tokenizer(self) -> str: ...  # what AutoTokenizer loads, or ""

    @property
    def fingerprint(self) -> str: ...  # of the weights

    @property
    def batchable(self) -> bool: ...

    # Several requests may run in one forward: a row's outputs, which are not shifted, depend on no
    # other row, and on no padding that follows where its attention mask is 0.

    # A target that can compile its forward also has ``compile_forward() -> None``, which does so
    # at once, or raises TargetError.

    @property
    def encodings(self) -> tuple[str, ...]: ...  # of "probs", "hidden", "topk"

    # A target that can end by itself has ``when_gone``, which its worker sets to be told of it.

    # A target whose forward takes ``needs: Needs`` as a fourth argument has ``layers``, a tuple of
    # the layers that it can give; empty, it can give any. And ``engine`` says what runs it, with
    # the version, where other engines or versions give other last bits ("transformers 5.18.0").

    @property
    def vocab_size(self) -> int: ...

    @property
    def dtype(self) -> torch.dtype: ...  # of the hidden states

    def get_output_embeddings(self) -> HasWeight | None: ...

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> TargetOutputs: ...


@dataclass(frozen=True)
class TargetFacts:
    """What is said of a target to those who do not have it, in plain values that JSON can carry.

    ``aux_layer_ids`` count from 0 the layers whose *output* is taken (NeMo's and SGLang's way).
    ``config`` is that of the text model where the target has several parts.
    """

    model: str
    fingerprint: str
    num_hidden_layers: int
    hidden_size: int
    vocab_size: int
    aux_layer_ids: tuple[int, ...]
    dtype: str  # "float32", "bfloat16", ...
    max_position_embeddings: int  # 0 where the target does not say
    encodings: tuple[str, ...]
    layers: tuple[int, ...]  # that can be had; empty: all, and -1 for the embeddings
    engine: str  # what runs the target, and its version; empty where it does not say
    tokenizer: str
    config: dict[str, Any]


def describe(target: Target, name: str = "") -> TargetFacts:
    """The facts of a target, under ``name`` or its own."""
    config = text_config(target.model.config)
    return TargetFacts(
        model=name or target.name,
        fingerprint=target.fingerprint,
        num_hidden_layers=int(config.num_hidden_layers),
        hidden_size=int(config.hidden_size),
        vocab_size=target.vocab_size,
        aux_layer_ids=tuple(target.aux_layer_ids),
        dtype=str(target.dtype).removeprefix("torch."),
        max_position_embeddings=int(getattr(config, "max_position_embeddings", 0) or 0),
        encodings=target.encodings,
        layers=layers_of(target),
        engine=str(getattr(target, "engine", "")),
        tokenizer=target.tokenizer,
        config=plain_config(config),
    )


def layers_of(target: Target) -> tuple[int, ...]:
    """The layers that a target can give, ascending; empty: all."""
    layers = getattr(target, "layers", None)
    return tuple(sorted(target.aux_layer_ids if layers is None else layers))


def text_config(config: Any) -> Any:
    """The config that has the decoder's depth: the config itself, or that of its text part."""
    inner = getattr(config, "text_config", None)
    return config if getattr(inner, "num_hidden_layers", None) is None else inner


def plain_config(config: Any) -> dict[str, Any]:
    """A Hugging Face config as JSON has it; {} for one that cannot say."""
    to_dict = getattr(config, "to_dict", None)
    return plain(to_dict()) if to_dict else {}


def plain(value: Any) -> Any:
    """A value as JSON has it; what JSON does not know becomes its ``str``."""
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value).removeprefix("torch.")


def choose_aux_layer_ids(requested: Sequence[int] | None, num_layers: int) -> tuple[int, ...]:
    """Distinct layers, by default EAGLE-3's low, middle and high: 1, n/2-1 and n-4.

    Raises :class:`TargetError` when the target is too shallow, or the request is not two or more
    distinct layers of it, ascending.
    """
    if requested is None:
        usual = (1, num_layers // 2 - 1, num_layers - 4)
        if len(set(usual)) != 3 or min(usual) < 0:
            raise TargetError(
                f"the target has {num_layers} layers, too few for the default aux layers "
                f"{list(usual)}; choose three distinct ones from 0 to {num_layers - 1}"
            )
        return usual
    ids = tuple(int(layer) for layer in requested)
    in_it = all(0 <= layer < num_layers for layer in ids)
    if len(ids) < 2 or len(set(ids)) != len(ids) or not in_it:
        raise TargetError(
            "aux layers must be two or more distinct layers from 0 to "
            f"{num_layers - 1}, got {list(ids)}"
        )
    if list(ids) != sorted(ids):  # vLLM and SGLang sort them, and read another network then
        written = ",".join(map(str, sorted(ids)))
        raise TargetError(f"aux layers must ascend, as engines read them; say {written}")
    return ids


def shift_left(tensor: Tensor) -> Tensor:
    """[B, T, ...] moved left by one along T, with zeros at the end."""
    return torch.cat((tensor[:, 1:], torch.zeros_like(tensor[:, :1])), dim=1)


def frozen(target: ColocatedContract) -> contextlib.AbstractContextManager[Any]:
    """A scope for forwards that nobody differentiates: torch's inference mode, or ``no_grad`` where
    weights are spread over devices (``DTensor``), of which inference mode makes no views.
    """
    parameters = getattr(target.model, "parameters", list)
    spread = any(hasattr(parameter, "full_tensor") for parameter in parameters())
    return torch.no_grad() if spread else torch.inference_mode()


def full_tensor(tensor: Tensor) -> Tensor:
    """A plain tensor; one that is spread over devices (``DTensor``) is gathered."""
    gather = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def colocated_batch(
    outputs: TargetOutputs, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
) -> TargetBatch:
    """The batch of the co-located contract, of unshifted outputs and on their device."""
    device = outputs.aux_hidden_states.device
    last = outputs.last_hidden_state
    assert outputs.logits is not None  # a forward without needs has all
    return TargetBatch(
        aux_hidden_states=outputs.aux_hidden_states,
        logits=shift_left(outputs.logits),
        input_ids=shift_left(input_ids.to(device, torch.int64)),
        attention_mask=attention_mask.to(device),
        loss_mask=shift_left(loss_mask.to(device)),
        last_hidden_state=None if last is None else shift_left(last),
    )
