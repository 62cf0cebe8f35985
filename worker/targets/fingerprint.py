"""A name for a model's weights that is equal on every machine that has the same ones."""

from __future__ import annotations

import hashlib
import json
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
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(_identity(model), sort_keys=True).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            words, rest = _words(full_tensor(tensor))
            line = f"{name} {tensor.dtype} {tuple(tensor.shape)} {int(words.sum())}"
            digest.update(line.encode())
            every = max(1, len(words) // SAMPLE_WORDS)
            digest.update(words[::every].cpu().numpy().tobytes())
            digest.update(rest.cpu().numpy().tobytes())
    return "w" + digest.hexdigest()


def _identity(model: Any) -> list[Any]:
    config = getattr(model, "config", None)
    to_dict = getattr(config, "to_diff_dict", None)  # what differs from the library's defaults
    settings = plain(to_dict()) if to_dict else {}
    return [type(model).__name__, {k: v for k, v in settings.items() if k not in _VOLATILE}]


def _words(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A tensor's bytes in C order: int64 [n], and uint8 [<8] of what is left."""
    octets = tensor.detach().contiguous().view(-1).view(torch.uint8)
    whole = octets.numel() // 8 * 8
    words = octets[:whole]
    if words.storage_offset() % 8:
        words = words.clone()
    return words.view(torch.int64), octets[whole:]
