"""Families of drafts with the demo's budget: ``python -m tests.bench.families``.

Each is trained co-located with the same data, order and rate, and then really decodes the demo's
prompts. Printed are accepted tokens a forward of the target, and whether the text was the target's.
"""

from __future__ import annotations

import lzma
import tempfile
from pathlib import Path
from typing import get_args

import click
import torch
from transformers import AutoTokenizer

from trainer_client.drafts.export import read_draft
from trainer_client.eagle3.config import Family
from trainer_client.evaluation.decoding import evaluate
from trainer_client.evaluation.prompts import load_prompts
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from worker.targets import EMBEDDED, load_target, resolve
from worker.targets.embedded import continuations_file


def accepted(
    name: str, family: Family, seed: int, steps: int, rate: float, output: Path
) -> tuple[float, bool]:
    """Tokens a forward of a draft of that family for target ``name``, and whether its text is
    greedy text.
    """
    data = continuations_file()
    if name != "embedded":  # its own continuations are not at hand
        data = output / "text.txt"
        with lzma.open(EMBEDDED / "corpus.txt.xz", "rt", encoding="utf-8") as corpus:
            data.write_text(corpus.read(400_000), encoding="utf-8")
    settings = TrainSettings(
        data=data,
        output=output / f"{family}-{seed}",
        draft=family,
        epochs=100,
        max_steps=steps,
        global_batch=8,  # the demo's two ranks of four
        batch_size=4,
        accumulation=2,
        max_length=128,
        draft_vocab_size=1536,
        learning_rate=rate,
        max_grad_norm=1.0,
        ttt_depths=4,
        checkpoint_every=0,
        seed=seed,
    )
    target = load_target(name, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(resolve(name))
    train(settings, ColocatedTarget(target, "hidden"), tokenizer)
    # the embedded target's held-out text, in this target's own tokens
    prompts = load_prompts(tokenizer, "embedded", None, 12, 48)
    result = evaluate(target, read_draft(settings.output / "draft"), prompts)
    return result.accept_length, result.lossless


@click.command()
@click.option("--target", default="embedded", show_default=True)
@click.option("--rate", default=8e-3, show_default=True, help="Learning rate.")
@click.option("--steps", default=300, show_default=True)
@click.option("--seeds", default=1, show_default=True)
def main(target: str, rate: float, steps: int, seeds: int) -> None:
    """Train and decode with each family."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as output:
        for seed in range(seeds):
            for family in get_args(Family):
                length, lossless = accepted(target, family, seed, steps, rate, Path(output))
                click.echo(f"seed {seed} {family}: {length:.3f} tokens a forward, {lossless=}")


if __name__ == "__main__":
    main()
