"""Drafts on disk, in the layout that vLLM and SGLang load."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer_client.drafts import nemo
from trainer_client.drafts.kinds import kind_of, plain_config
from trainer_client.drafts.speculators import speculators_config, speculators_tensors
from trainer_client.eagle3.config import SWITCHES, DraftConfig, rope_parameters
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.errors import ExportError

if TYPE_CHECKING:
    from trainer_client.drafts.checkpoint import Checkpoint

ARCHITECTURE = "LlamaForCausalLMEagle3"
FILES = ("config.json", "model.safetensors")


def write_draft(
    draft: Eagle3Draft, directory: Path, *, target_info: Mapping[str, Any], verifier: str = ""
) -> None:
    """Write a draft for the target that ``target_info`` (``model_info()``) describes.

    With a ``verifier``, the target's name for those who load it, the format is speculators'.
    The directory appears whole or not at all, and takes the place of an older draft. Raises
    :class:`ExportError`; also where the directory has anything but a draft, which is left alone.
    """
    directory = directory.resolve()
    _refuse_to_replace(directory)
    unfinished = directory.parent / f".{directory.name}.{os.getpid()}"
    replaced = directory.parent / f".{directory.name}.{os.getpid()}.old"
    try:
        unfinished.mkdir(parents=True)
        tensors = {name: tensor.contiguous().cpu() for name, tensor in draft.state_dict().items()}
        if draft.config.draft_vocab_size == draft.config.vocab_size and not draft.d2t.any():
            del tensors["d2t"], tensors["t2d"]  # engines take their absence for "the same"
        config = engine_config(draft, target_info)
        if verifier:
            architectures = target_info["config"].get("architectures") or ()
            config = speculators_config(config, verifier, architectures)
            tensors = speculators_tensors(tensors)
        save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
        text = json.dumps(config, indent=1) + "\n"
        (unfinished / "config.json").write_text(text)
        if directory.exists():
            directory.rename(replaced)
        unfinished.rename(directory)
    except OSError as error:
        if replaced.exists():
            replaced.rename(directory)
        raise ExportError(f"cannot write the draft to {directory}: {error}") from error
    finally:
        for left in (unfinished, replaced):
            shutil.rmtree(left, ignore_errors=True)


def _refuse_to_replace(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ExportError(f"{directory} is a file; give a directory for the draft")
    if other := sorted({file.name for file in directory.iterdir()} - set(FILES)):
        raise ExportError(
            f"{directory} has more than a draft in it ({', '.join(other[:3])}); give a new or an "
            "empty directory"
        )


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
        **{name: getattr(config, name) for name in SWITCHES},
        "use_cache": True,
        "torch_dtype": str(draft.fc.weight.dtype).removeprefix("torch."),
        "bos_token_id": target.get("bos_token_id"),
        "eos_token_id": target.get("eos_token_id"),
        "pad_token_id": target.get("pad_token_id"),
        "num_aux_hidden_states": len(layers),  # which engines take the count from
        "eagle_aux_hidden_state_layer_ids": [layer + 1 for layer in layers],
        "eagle_config": {
            "eagle_aux_hidden_state_layer_ids": layers,
            "use_aux_hidden_state": True,
        },
        "trained_with": "draftmq",  # so a switch means here what it means to engines
    }


#: Settings of vLLM's and speculators' variants with the values that this network has.
_THIS_NETWORK: dict[str, tuple[Any, ...]] = {
    "attention_bias": (None, False),
    "mlp_bias": (None, False),
    "use_aux_hidden_state": (None, True),
    "num_hidden_layers": (None, 1),
    "hidden_act": (None, "silu"),
}


def _refuse_other_networks(
    directory: Path, config: Mapping[str, Any], names: Collection[str]
) -> None:
    """Raise :class:`ExportError` where a config asks for what this network does not compute."""
    kind = kind_of(config, names)
    if not kind.family.startswith("EAGLE-3"):
        raise ExportError(f"{directory} is a {kind}; only EAGLE-3 drafts are read here")
    plain = plain_config(config)
    inside = plain.get("eagle_config")
    inside = inside if isinstance(inside, Mapping) else {}
    differs = [
        f"{name}={value}"
        for name, known in _THIS_NETWORK.items()
        for value in {repr(said.get(name)): said.get(name) for said in (plain, inside)}.values()
        if value not in known
    ]
    window, positions = plain.get("sliding_window"), plain.get("max_position_embeddings")
    sliding = "sliding_attention" in (plain.get("layer_types") or ())
    everything = isinstance(window, int) and isinstance(positions, int) and window >= positions
    if sliding and not everything:
        differs.append(f"sliding_window={window}")
    if differs:
        raise ExportError(f"{directory} is another kind of EAGLE-3 draft: {', '.join(differs)}")


def read_draft(directory: Path, embeddings: Tensor | None = None) -> Eagle3Draft:
    """Load a draft; ``embeddings`` [V, H] are the target's, for a draft without its own.

    Raises :class:`ExportError` where it is not this network, or is incomplete.
    """
    config, tensors = read_config(directory), canonical(read_tensors(directory))
    _refuse_other_networks(directory, config, tensors)
    config = plain_config(config)
    if "embed_tokens.weight" not in tensors and embeddings is not None:
        tensors["embed_tokens.weight"] = embeddings.detach()
    try:
        sizes = _sizes(config)
        every = torch.arange(sizes.draft_vocab_size)
        draft = Eagle3Draft(sizes, every + tensors.get("d2t", torch.zeros_like(every)))
        tensors = {"d2t": draft.d2t, "t2d": draft.t2d} | tensors
        draft.load_state_dict(tensors)
    except (KeyError, TypeError) as error:
        raise ExportError(f"{directory}: config.json lacks or misstates {error}") from error
    except Exception as error:  # transformers' validators raise kinds of their own
        said = " ".join(str(error).split())
        raise ExportError(f"{directory} does not fit its config: {said}") from error
    return draft.eval()


#: Where a config has the layers that a draft reads.
_LAYERS = "eagle_aux_hidden_state_layer_ids"


def _sizes(config: Mapping[str, Any]) -> DraftConfig:
    """Sizes as ``config.json`` says them; two may be left out."""
    defaults = {
        "target_hidden_size": config["hidden_size"],
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
    }
    inside = config.get("eagle_config") or {}
    layers = config.get(_LAYERS) or inside.get(_LAYERS) or (0, 0, 0)
    defaults["num_aux_hidden_states"] = len(layers)
    names = set(DraftConfig.__dataclass_fields__) - {"rope_parameters", *SWITCHES}
    sizes = {name: config.get(name) or defaults[name] for name in defaults}
    sizes |= {name: config[name] for name in names - set(defaults)}
    for name in SWITCHES:  # SGLang and vLLM look for norm_before_fc in eagle_config too
        sizes[name] = bool(config.get(name) or inside.get(name))
    return DraftConfig(**sizes, rope_parameters=rope_parameters(config))


def draft_folder(directory: Path) -> Path:
    """The draft itself where a run's folder is given, or a checkpoint or a run of NeMo AutoModel's,
    which have one inside.
    """
    if (directory / "config.json").exists():
        return directory
    inside = directory / "draft"
    return inside if (inside / "config.json").exists() else nemo.find_draft(directory) or directory


def read_config(directory: Path) -> dict[str, Any]:
    """A draft's ``config.json``, or that of a run's draft. Raises :class:`ExportError`."""
    directory = draft_folder(directory)
    try:
        config = json.loads((directory / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ExportError(f"{directory} cannot be read as a draft: {error}") from error
    if not isinstance(config, dict):
        raise ExportError(f"{directory / 'config.json'} is no JSON object")
    return config


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a draft, in one safetensors file or several, or in PyTorch's own format.

    Nothing is unpickled but tensors. Raises :class:`ExportError`.
    """
    tensors: dict[str, Tensor] = {}
    directory = draft_folder(directory)
    try:
        files = sorted(directory.glob("*.safetensors"))
        for file in files:
            tensors |= load_file(file)
        for file in [] if files else sorted(directory.glob("pytorch_model*.bin")):
            tensors |= torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file makes torch's unpickler raise anything
        raise ExportError(f"{directory} cannot be read as a draft: {error}") from error
    if not tensors:
        raise ExportError(f"{directory} is no draft: it has no model.safetensors")
    return tensors


def canonical(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that all engines know."""

    def name(old: str) -> str:
        old = old.removeprefix("model.")
        return f"midlayer.{old[9:]}" if old.startswith("layers.0.") else old

    return {name(old): tensor for old, tensor in tensors.items()}


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Of a run of ours, or the one checkpoint that is named; None where it is neither."""
    from trainer_client.drafts.checkpoint import complete

    folder = folder.resolve()
    newest = [complete(place)[-1:] for place in (folder / "checkpoints", folder)]
    named = [one for one in complete(folder.parent) if one.directory == folder]
    wanted = next(filter(None, [*newest, named]), None)
    return wanted[0] if wanted else None


def export_checkpoint(checkpoint: Path, output: Path, verifier: str = "") -> None:
    """Write a run's newest checkpoint, or the one checkpoint that is named, as a draft.

    ``verifier`` is :func:`write_draft`'s. Raises :class:`ExportError` where there is none.
    """
    found = newest_checkpoint(checkpoint)
    if found is None:
        raise ExportError(
            f"{checkpoint.resolve()} is neither a run with a complete checkpoint nor a checkpoint"
        )
    where = found.directory
    try:
        info = json.loads((where / "target.json").read_text())
        config = DraftConfig(**json.loads((where / "draft.json").read_text()))
        tensors = load_file(where / "draft.safetensors")
        draft = Eagle3Draft(config, tensors["d2t"] + torch.arange(config.draft_vocab_size))
        draft.load_state_dict(tensors)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise ExportError(f"{where} is damaged: {error}") from error
    write_draft(draft, output, target_info=info, verifier=verifier)
