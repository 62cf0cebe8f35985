"""A name for a model's weights that is equal on every machine that has the same ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worker.targets.contract import full_tensor, plain

#: Words of each tensor that are hashed where they stand; the checksum covers the rest.
SAMPLE_WORDS = 256

#: Says where a config came from, or how it is run, and not what the model computes.
_VOLATILE = {
    "_attn_implementation",
    "_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def weights_fingerprint(model: Any) -> str:
    """ "w" and 32 hex digits: of the model's class, config and every byte of its weights.

    The bytes enter as their sum in 64-bit words, which is exact in any order and so the same on
    every device: about 15 GB/s on two CPU cores. A sum does not see what moved, hence a sample too.
    """
    tensors = sorted(model.state_dict().items())
    named = ((name, full_tensor(each)) for name, each in tensors if isinstance(each, Tensor))
    return "w" + _digest(_identity(type(model).__name__, getattr(model, "config", None)), named)


def files_fingerprint(config: Any, where: str) -> str:
    """ "f" and 32 hex digits: of a config and every tensor in the safetensors files of a model, for
    targets whose weights are in an engine, fused and cut, and perhaps quantised as it loads them.

    ``where`` is a folder or the id of a model that was loaded from a hub.
    """
    from safetensors import safe_open

    folder = _folder(where)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for path in sorted(folder.glob("*.safetensors")):
            with safe_open(path, "pt") as file:
                for name in sorted(file.keys()):
                    yield name, file.get_tensor(name)

    return "f" + _digest(_identity("files", config), tensors())


def has_files(where: str) -> bool:
    """Whether :func:`files_fingerprint` has something to read here, without a download."""
    try:
        return bool(where) and any(_folder(where, local_files_only=True).glob("*.safetensors"))
    except OSError:  # which transformers raises for an id of which nothing was loaded
        return False


def _folder(where: str, **options: Any) -> Path:
    from transformers.utils import cached_file

    if Path(where).is_dir():
        return Path(where)
    return Path(str(cached_file(where, "config.json", **options))).parent


def _digest(identity: list[Any], tensors: Iterable[tuple[str, Tensor]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(identity, sort_keys=True).encode())
    for name, tensor in tensors:
        words, rest = _words(tensor)
        line = f"{name} {tensor.dtype} {tuple(tensor.shape)} {int(words.sum())}"
        digest.update(line.encode())
        every = max(1, len(words) // SAMPLE_WORDS)
        digest.update(words[::every].cpu().numpy().tobytes())
        digest.update(rest.cpu().numpy().tobytes())
    return digest.hexdigest()


def _identity(kind: str, config: Any) -> list[Any]:
    to_dict = getattr(config, "to_diff_dict", None)  # what differs from the library's defaults
    settings = plain(to_dict()) if to_dict else {}
    return [kind, {k: v for k, v in settings.items() if k not in _VOLATILE}]


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's bytes in C order: int64 [n], and uint8 [<8] of what is left."""
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = octets.numel() // 8 * 8
    words = octets[:whole]
    if words.storage_offset() % 8:
        words = words.clone()
    return words.view(torch.int64), octets[whole:]
