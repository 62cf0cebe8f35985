"""Drafts on disk, in the layout that vLLM and SGLang load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from trainer_client.eagle3.config import DraftConfig, rope_parameters
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.errors import ExportError

ARCHITECTURE = "LlamaForCausalLMEagle3"


def write_draft(draft: Eagle3Draft, directory: Path, *, target_info: Mapping[str, Any]) -> None:
    """Write a draft for the target that ``target_info`` (``model_info()``) describes.

    The directory appears whole or not at all. Raises :class:`ExportError`.
    """
    unfinished = directory.parent / f".{directory.name}.{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in draft.state_dict().items()}
        if draft.config.draft_vocab_size == draft.config.vocab_size:
            del tensors["d2t"], tensors["t2d"]  # engines take their absence for "the same"
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(engine_config(draft, target_info), indent=1) + "\n"
        (unfinished / "config.json").write_text(text)
        shutil.rmtree(directory, ignore_errors=True)
        unfinished.rename(directory)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise ExportError(f"cannot write the draft to {directory}: {error}") from error


def engine_config(draft: Eagle3Draft, target_info: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json``.

    vLLM reads the aux layers at the top level, as indices into Hugging Face's ``hidden_states``
    (the output of layer k is k + 1); SGLang reads them in ``eagle_config``, as layers.
    """
    config, target = draft.config, target_info["config"]
    layers = list(target_info["aux_layer_ids"])
    rope = dict(config.rope_parameters)
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.target_hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope,  # transformers 5
        "rope_theta": rope["rope_theta"],  # transformers 4
        "rope_scaling": None if scaling["rope_type"] == "default" else scaling,
        "initializer_range": 0.02,
        "tie_word_embeddings": False,
        "norm_before_residual": False,
        "use_cache": True,
        "torch_dtype": str(draft.fc.weight.dtype).removeprefix("torch."),
        "bos_token_id": target.get("bos_token_id"),
        "eos_token_id": target.get("eos_token_id"),
        "pad_token_id": target.get("pad_token_id"),
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": layers,
            "use_aux_hidden_state": True,
        },
    }


def read_draft(directory: Path) -> Eagle3Draft:
    """Load a draft that :func:`write_draft` wrote. Raises :class:`ExportError`."""
    import torch

    try:
        config = json.loads((directory / "config.json").read_text())
        tensors = load_file(directory / "model.safetensors")
        sizes = DraftConfig(
            **{
                name: config[name]
                for name in DraftConfig.__dataclass_fields__
                if name != "rope_parameters"
            },
            rope_parameters=rope_parameters(config),
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ExportError(f"{directory} is no draft: {error!r}") from error
    every = torch.arange(sizes.draft_vocab_size)
    selected = every + tensors["d2t"] if "d2t" in tensors else every
    draft = Eagle3Draft(sizes, selected)
    tensors.setdefault("d2t", draft.d2t)
    tensors.setdefault("t2d", draft.t2d)
    try:
        draft.load_state_dict(tensors)
    except RuntimeError as error:
        raise ExportError(f"{directory} does not fit its config: {error}") from error
    return draft.eval()


def export_checkpoint(checkpoint: Path, output: Path) -> None:
    """Write the newest checkpoint of a run (or one checkpoint) as a draft.

    Raises :class:`ExportError` where there is none.
    """
    from trainer_client.training.checkpoint import complete

    found = complete(checkpoint / "checkpoints") or complete(checkpoint.parent)
    wanted = [one for one in found if checkpoint == one.directory] or found[-1:]
    if not wanted:
        raise ExportError(f"{checkpoint} has no complete checkpoint; give a run's directory")
    try:
        info = json.loads((wanted[0].directory / "target.json").read_text())
        config = DraftConfig(**json.loads((wanted[0].directory / "draft.json").read_text()))
        tensors = load_file(wanted[0].directory / "draft.safetensors")
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        raise ExportError(f"{wanted[0].directory} is damaged: {error}") from error
    selected = tensors["t2d"].nonzero().flatten()
    draft = Eagle3Draft(config, selected)
    draft.load_state_dict(tensors)
    write_draft(draft, output, target_info=info)
