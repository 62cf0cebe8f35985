"""Any Hugging Face causal language model with decoder layers, as a target."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

from worker.errors import TargetError
from worker.targets.compiled import CompiledLayers, warm_up
from worker.targets.contract import (
    HasWeight,
    Needs,
    TargetBatch,
    TargetOutputs,
    choose_aux_layer_ids,
    colocated_batch,
    full_tensor,
    text_config,
)
from worker.targets.fingerprint import weights_fingerprint

#: Where the decoder layers are: Llama, Qwen, Mistral, Gemma, Phi | multimodal wrappers, two ages |
#: a bare text model | OPT | GPT-2, Falcon | GPT-NeoX.
LAYER_PATHS = (
    "model.layers",
    "model.language_model.layers",
    "language_model.model.layers",
    "language_model.layers",
    "layers",
    "model.decoder.layers",
    "transformer.h",
    "gpt_neox.layers",
)

#: Rotary embeddings that choose their frequencies by the longest sequence of the batch.
_ROPES_OF_THE_LONGEST = {"dynamic", "longrope", "su"}


@dataclass
class _Capture:
    """What the hooks keep of one forward."""

    needs: Needs
    trial: bool = False  # keeps the head's output too, which is as large as the logits
    layers: dict[int, Tensor] = field(default_factory=dict)  # [B, T, H] each
    head_input: Tensor | None = None  # [B, T, H]
    head_output: Tensor | None = None  # [B, T, V]

    def keep(self, layer: int, state: Tensor) -> None:
        """Take a layer's output. Raises :class:`_EnoughError` where nothing behind it is needed."""
        if layer in self.needs.layers:
            self.layers[layer] = state
            needs = self.needs
            if layer == needs.layers[-1] and not (needs.last or needs.logits):
                raise _EnoughError


class _EnoughError(Exception):
    """Ends a forward once it has given all that was asked for: nobody would use the rest."""


#: The forward under way in this thread. Another thread's forward of the same model finds its own,
#: or none, so no capture ever sees another's tensors.
_current: ContextVar[_Capture | None] = ContextVar("draftmq_capture", default=None)


def _keep_embeddings(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
    capture = _current.get()
    if capture is not None:
        capture.keep(-1, args[0] if args else kwargs["hidden_states"])


def _keep_layer(layer: int, module: nn.Module, args: Any, output: Any) -> None:
    capture = _current.get()
    if capture is not None:
        capture.keep(layer, output[0] if isinstance(output, tuple) else output)


def _keep_head_input(module: nn.Module, args: Any) -> None:
    capture = _current.get()
    if capture is not None and args:
        capture.head_input = args[0]
        if not capture.needs.logits:
            raise _EnoughError


def _keep_head_output(module: nn.Module, args: Any, output: Tensor) -> None:
    capture = _current.get()
    if capture is not None and capture.trial:
        capture.head_output = output


class HuggingFaceTarget:
    """A frozen model with its layers' hidden states, its logits, and what its head multiplies.

    ``last_hidden_state`` is the very tensor that enters ``lm_head``, and the logits are the
    model's own. ``hidden`` is offered only where a trial forward shows that the logits are the
    head's output as it is; :attr:`hidden_refused` says why not (Gemma 2 caps, Granite scales).

    One forward runs at a time: some rotary embeddings keep their frequencies of the last length.
    Raises :class:`TargetError` for a model that cannot be a target.
    """

    def __init__(
        self,
        model: Any,
        *,
        name: str,
        aux_layer_ids: Sequence[int] | None = None,
        tokenizer: str | None = None,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.tokenizer = tokenizer or ""
        self._layers = decoder_layers(model)
        self.aux_layer_ids = choose_aux_layer_ids(aux_layer_ids, len(self._layers))
        self._one_forward = threading.Lock()
        #: what :meth:`close` takes away again
        self._handles: list[Any] = [
            layer.register_forward_hook(partial(_keep_layer, number))
            for number, layer in enumerate(self._layers)
        ]
        self._handles.append(
            self._layers[0].register_forward_pre_hook(_keep_embeddings, with_kwargs=True)
        )
        head = model.get_output_embeddings()
        if head is not None:
            self._handles.append(head.register_forward_pre_hook(_keep_head_input))
            self._handles.append(head.register_forward_hook(_keep_head_output))
        try:
            trial, logits = self._try()
            #: what can be had of it; empty: every layer
            self.layers = self._layers_of(trial)
        except Exception:
            self.close()
            raise
        #: V: what the logits have, which may be more than the tokenizer knows
        self.vocab_size = int(logits.shape[-1])
        self.dtype = trial.layers[self.aux_layer_ids[0]].dtype
        self.engine = f"transformers {transformers.__version__}"
        self.batchable = _batchable(model)
        self.hidden_refused = _why_not_hidden(head, trial, logits)
        self.encodings = ("probs", "topk") if self.hidden_refused else ("probs", "hidden", "topk")

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return self.model.get_input_embeddings().weight.device

    @cached_property
    def fingerprint(self) -> str:
        """Equal where class, config and weights are equal, on any machine."""
        return weights_fingerprint(self.model)

    def get_input_embeddings(self) -> HasWeight:
        """The module with ``weight`` [V, H]; of one that has more rows than there are logits, as
        Mllama's for its images, the first V.
        """
        module: HasWeight = self.model.get_input_embeddings()
        if len(module.weight) <= self.vocab_size:
            return module
        return SimpleNamespace(weight=module.weight[: self.vocab_size])

    def get_output_embeddings(self) -> HasWeight | None:
        """The module with ``weight`` [V, H] and perhaps ``bias`` [V]; None without one."""
        return self.model.get_output_embeddings()

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> TargetBatch:
        """The co-located contract: ids and masks [B, T], padded on the right."""
        outputs = self.forward(input_ids, attention_mask, loss_mask)
        return colocated_batch(outputs, input_ids, attention_mask, loss_mask)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor | None = None,
        needs: Needs | None = None,
    ) -> TargetOutputs:
        """Unshifted outputs: a shift of logits [B, T, V] would be one more copy of them.

        With ``needs`` nothing is run that they do not ask for, the head least of all.
        """
        del loss_mask  # only for targets that want it
        needs = needs or Needs(self.aux_layer_ids, last=True, logits=True)
        capture, logits = self._run(input_ids, attention_mask, needs)
        missing = [layer for layer in needs.layers if layer not in capture.layers]
        if missing:
            raise TargetError(f"the model's forward did not run its layers {missing}")
        states = [full_tensor(capture.layers[layer]) for layer in needs.layers]
        last = None if capture.head_input is None else full_tensor(capture.head_input)
        where = next(t for t in (logits, last, *states) if t is not None).device
        return TargetOutputs(
            torch.cat([state.to(where) for state in states], dim=-1)
            if states
            else torch.empty(*input_ids.shape, 0, dtype=self.dtype, device=where),
            logits,
            last,
        )

    def compile_forward(self) -> None:
        """Compile the decoder layers, here and now; last bits of all outputs may change.

        Raises :class:`TargetError` where that fails, and leaves the target as it was.
        """
        compiled = CompiledLayers(self._layers)
        try:
            warm_up(self.name, self.forward)
        except TargetError:
            compiled.remove()
            raise
        self._handles.append(compiled)

    def close(self) -> None:
        """Take hooks and compiled code off the model, which stays usable for others."""
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()  # not inference_mode: a co-located trainer saves these tensors for backward
    def _run(
        self, input_ids: Tensor, attention_mask: Tensor, needs: Needs, *, trial: bool = False
    ) -> tuple[_Capture, Tensor | None]:
        """What the hooks kept, and the logits [B, T, V] where the forward went on to them."""
        capture, outputs = _Capture(needs, trial), None
        with self._one_forward:
            before = _current.set(capture)
            try:
                outputs = self.model(
                    input_ids=input_ids.to(self.device),
                    attention_mask=attention_mask.to(self.device),
                    use_cache=False,
                )
            except _EnoughError:
                return capture, None
            finally:
                _current.reset(before)
        logits = full_tensor(outputs.logits if hasattr(outputs, "logits") else outputs)
        return capture, logits

    def _try(self) -> tuple[_Capture, Tensor]:
        rows = self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(rows - 1, max(-1, rows - 9), -1).unsqueeze(0)  # [1, 8]
        needs = Needs(tuple(range(-1, len(self._layers))), last=True, logits=True)
        capture, logits = self._run(ids, torch.ones_like(ids), needs, trial=True)
        assert logits is not None
        return capture, logits

    def _layers_of(self, trial: _Capture) -> tuple[int, ...]:
        """The layers whose states are [B, T, H]; empty for all.

        Raises :class:`TargetError` where an aux layer is none of them.
        """
        hidden_size = int(text_config(self.model.config).hidden_size)
        shapes = {layer: tuple(state.shape) for layer, state in trial.layers.items()}
        right = [layer for layer, shape in shapes.items() if shape[2:] == (hidden_size,)]
        for layer in self.aux_layer_ids:
            if layer not in right:
                got = f"gives states {shapes[layer]}" if layer in shapes else "is not run"
                raise TargetError(
                    f"layer {layer} of {self.name!r} {got} where (1, 8, {hidden_size}) was "
                    "expected for 8 tokens of text; a draft cannot learn from that. Layers that "
                    f"can be had: {', '.join(map(str, sorted(right))) or 'none'}"
                )
        return () if len(right) == len(self._layers) + 1 else tuple(sorted(right))

    def __repr__(self) -> str:
        return (
            f"<HuggingFaceTarget {self.name} {type(self.model).__name__} {self.dtype} on "
            f"{self.device} aux={list(self.aux_layer_ids)}>"
        )


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder layers in order. Raises :class:`TargetError` where there are none."""
    for path in LAYER_PATHS:
        found: Any = model
        for part in path.split("."):
            found = getattr(found, part, None)
        if isinstance(found, nn.ModuleDict):  # NeMo AutoModel's own models: keys "0", "1", ...
            return [found[str(index)] for index in range(len(found))]
        if isinstance(found, nn.ModuleList) and len(found):
            return list(found)
    depth = getattr(text_config(getattr(model, "config", None)), "num_hidden_layers", None)
    raise TargetError(
        f"{type(model).__name__} (num_hidden_layers={depth}) has no decoder layers at any of "
        f"{', '.join(LAYER_PATHS)}; serve it with --target-factory"
    )


def _batchable(model: Any) -> bool:
    """False where the longest row of a batch decides the positions of all (by the rope's kind)."""
    config = text_config(model.config)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    ropes = [rope, *(of_layers for of_layers in rope.values() if isinstance(of_layers, dict))]
    return not any(
        each.get("rope_type", each.get("type")) in _ROPES_OF_THE_LONGEST for each in ropes
    )


def _why_not_hidden(head: Any, trial: _Capture, logits: Tensor) -> str:
    """Empty if softmax over head rows times ``last_hidden_state`` is the target's distribution."""
    if head is None or trial.head_input is None or trial.head_output is None:
        return "the model does not run its output embeddings on the last hidden state"
    output, hidden = full_tensor(trial.head_output), full_tensor(trial.head_input)
    if output.shape != logits.shape or not torch.equal(output.float(), logits.float()):
        return "the model changes its head's output (soft-capping or scaling)"
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if weight is None or tuple(weight.shape) != (logits.shape[-1], hidden.shape[-1]):
        return f"the head {type(head).__name__} is not a matrix [V, H]"
    whole = None if bias is None else full_tensor(bias)
    remade = F.linear(hidden.to(weight.dtype), full_tensor(weight), whole).float()
    scale = logits.float().abs().max().clamp_min(1e-6)
    if ((remade - logits.float()).abs().max() / scale) > 0.02:
        return f"the head {type(head).__name__} does more than multiply"
    return ""
