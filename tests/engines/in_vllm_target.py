"""Runs in the engines' environment: a target inside vLLM against transformers' forward.

``in_vllm_target MODEL MODE`` prints as JSON the largest error of states by their norm, and the
share of equal argmax, over unequal prompts. Modes are those of :data:`MODES`.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from worker.canary import prove
from worker.targets import load_target, load_vllm_target

#: name -> GPUs (processes, on a CPU) | arguments of vllm.LLM
MODES: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (1, {}),
    "chunked": (1, {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}),
    "prefix-caching": (1, {"enable_prefix_caching": True}),
    "synchronous": (1, {"async_scheduling": False}),
    "two-ranks": (2, {}),
}
_LENGTHS = (3, 17, 64, 33, 1, 300)


def main(model: str, mode: str) -> None:
    ranks, options = MODES[mode]
    target = load_vllm_target(
        model,
        dtype="float32",
        tensor_parallel=ranks,
        layers=(0, 2),
        options={"enforce_eager": True, **options},
    )
    reference = load_target(model, dtype="float32", aux_layer_ids=target.aux_layer_ids)
    try:
        prove(target)
        draw = torch.Generator().manual_seed(0)
        ids = torch.randint(10, reference.vocab_size - 10, (6, max(_LENGTHS)), generator=draw)
        mask = (torch.arange(max(_LENGTHS)) < torch.tensor(_LENGTHS).unsqueeze(1)).long()
        ids *= mask
        result = {"largest_error": 0.0, "equal_argmax": 1.0}
        for _ in range(2):  # with prefix caching the second time is another way
            got, expected = (each.forward(ids, mask, mask) for each in (target, reference))
            for name in ("aux_hidden_states", "last_hidden_state", "logits"):
                ours, right = (getattr(each, name)[mask.bool()] for each in (got, expected))
                error = float((ours - right).norm() / right.norm())
                result["largest_error"] = max(result["largest_error"], error)
            same = float((ours.argmax(-1) == right.argmax(-1)).float().mean())
            result["equal_argmax"] = min(result["equal_argmax"], same)
        print(json.dumps(result))
    finally:
        target.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
