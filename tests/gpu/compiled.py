"""``--compile`` makes code once, whatever the shapes: ``python -m tests.gpu.compiled OUT``."""

from __future__ import annotations

import itertools
import sys
import time
from typing import Any

import torch
from torch._dynamo.utils import counters

from tests.gpu.programs import GPU, card, say, settle, timed_ms
from worker.targets import load_target

TOKENS = (8, 11, 16, 17, 64, 129, 256, 511, 1000, 1024) if GPU else (8, 17)
ROWS, PADDING = (1, 2, 3, 8), (0, 5)
#: A forward that takes this long has made code.
LATE_S = 1.0


def main(out: str) -> None:
    place = {"device": "cuda:0", "dtype": "bfloat16"} if GPU else {"device": "cpu"}
    eager, target = load_target("embedded", **place), load_target("embedded", **place)
    began = time.monotonic()
    target.compile_forward()
    found: dict[str, Any] = card() | {"compile_s": time.monotonic() - began}
    late, worst, before = [], 0.0, counters["stats"]["unique_graphs"]
    for tokens, rows, padding in itertools.product(TOKENS, ROWS, PADDING):
        ids = torch.randint(0, 2048, (rows, tokens))
        mask = torch.ones_like(ids)
        mask[-1, tokens - padding :] = 0
        began = time.monotonic()
        with torch.inference_mode():
            got = target.forward(ids, mask).logits.float()
            settle()
            took, right = time.monotonic() - began, eager.forward(ids, mask).logits.float()
        real = mask.bool().to(got.device)
        worst = max(worst, float((got - right)[real].abs().max() / right[real].abs().max()))
        if took > LATE_S:
            late.append({"rows": rows, "tokens": tokens, "padding": padding, "s": took})
    found |= {"late": late, "graphs_later": counters["stats"]["unique_graphs"] - before}
    ids = torch.randint(0, 2048, (8, TOKENS[-1]))
    for name, each in (("eager_ms", eager), ("compiled_ms", target)):
        with torch.inference_mode():
            times = timed_ms(lambda each=each: each.forward(ids, torch.ones_like(ids)), 7)
        found[name] = sorted(times)[3]
    say(found | {"largest_relative_difference": worst}, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
