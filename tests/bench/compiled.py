"""Tokens a second of a target, with and without ``--compile``, in turns; and what differs.

``python -m tests.bench.compiled [--target MODEL] [--device cuda --dtype bfloat16] [--threads 2]``
"""

from __future__ import annotations

import json
import statistics
import time

import click
import torch
from torch import Tensor

from tests.bench.lines import Progress
from worker.targets import load_target
from worker.targets.contract import TargetOutputs
from worker.targets.huggingface import HuggingFaceTarget

#: Rows and tokens.
SHAPES = ((1, 128), (4, 128), (1, 512), (4, 512))


def measure(
    targets: dict[str, HuggingFaceTarget], rounds: int, progress: Progress
) -> list[dict[str, float]]:
    """For each shape: tokens/s of ``eager`` and ``compiled`` (medians), and their differences."""
    found = []
    for rows, tokens in SHAPES:
        progress(f"{rows} rows of {tokens} tokens")
        ids = torch.randint(targets["eager"].vocab_size, (rows, tokens))
        seconds: dict[str, list[float]] = {name: [] for name in targets}
        made: dict[str, TargetOutputs] = {}
        for turn in range(1 + rounds):  # in the first, both make memory
            for name, target in targets.items():
                began = time.perf_counter()
                made[name] = forward(target, ids)
                if turn:
                    seconds[name].append(time.perf_counter() - began)
        eager, compiled = made["eager"], made["compiled"]
        rates = {name: rows * tokens / statistics.median(of) for name, of in seconds.items()}
        found.append(
            {"rows": rows, "tokens": tokens, **rates, "ratio": rates["compiled"] / rates["eager"]}
            | {
                "aux_difference": difference(compiled.aux_hidden_states, eager.aux_hidden_states),
                "logits_difference": difference(compiled.logits, eager.logits),
                "same_argmax": same_argmax(compiled.logits, eager.logits),
            }
        )
    return found


@torch.inference_mode()
def forward(target: HuggingFaceTarget, ids: Tensor) -> TargetOutputs:
    """As a worker runs it, until the device is done."""
    outputs = target.forward(ids, torch.ones_like(ids))
    if target.device.type == "cuda":
        torch.cuda.synchronize()
    return outputs


def difference(tensor: Tensor, wanted: Tensor) -> float:
    """The largest, as a share of the largest value."""
    return float((tensor - wanted).abs().max() / wanted.abs().max())


def same_argmax(logits: Tensor, wanted: Tensor) -> float:
    """Share of the slots."""
    return float((logits.argmax(-1) == wanted.argmax(-1)).float().mean())


@click.command()
@click.option("--target", default="embedded", show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--dtype")
@click.option("--threads", type=click.IntRange(min=1))
@click.option("--rounds", type=click.IntRange(min=1), default=9, show_default=True)
def main(target: str, device: str, dtype: str | None, threads: int | None, rounds: int) -> None:
    """Print one JSON object for each shape."""
    if threads is not None:
        torch.set_num_threads(threads)
    torch.manual_seed(0)
    targets = {
        name: load_target(target, device=device, dtype=dtype) for name in ("eager", "compiled")
    }
    began = time.perf_counter()
    targets["compiled"].compile_forward()
    click.echo(json.dumps({"compile_s": time.perf_counter() - began}))
    for line in measure(targets, rounds, lambda what: click.echo(what, err=True)):
        click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
