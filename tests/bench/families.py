"""Families of drafts with the demo's budget: ``python -m tests.bench.families``.

Each is trained co-located with the same data, order and rate, and then really decodes the demo's
prompts. Printed are accepted tokens a forward of the target, and whether the text was the target's.
"""

from __future__ import annotations

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
from worker.targets import EMBEDDED, load_target
from worker.targets.embedded import continuations_file


def accepted(family: Family, seed: int, steps: int, output: Path) -> tuple[float, bool]:
    """Tokens a forward of a draft of that family, and whether its text is greedy text."""
    settings = TrainSettings(
        data=continuations_file(),
        output=output / f"{family}-{seed}",
        draft=family,
        epochs=100,
        max_steps=steps,
        global_batch=8,  # the demo's two ranks of four
        batch_size=4,
        accumulation=2,
        max_length=128,
        draft_vocab_size=1536,
        learning_rate=8e-3,
        max_grad_norm=1.0,
        ttt_depths=4,
        checkpoint_every=0,
        seed=seed,
    )
    target = load_target("embedded")
    train(settings, ColocatedTarget(target, "hidden"), AutoTokenizer.from_pretrained(EMBEDDED))
    prompts = load_prompts(target.tokenizer, "embedded", None, 12, 48)
    result = evaluate(target, read_draft(settings.output / "draft"), prompts)
    return result.accept_length, result.lossless


@click.command()
@click.option("--steps", default=300, show_default=True)
@click.option("--seeds", default=1, show_default=True)
def main(steps: int, seeds: int) -> None:
    """Train and decode with each family."""
    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as output:
        for seed in range(seeds):
            for family in get_args(Family):
                length, lossless = accepted(family, seed, steps, Path(output))
                click.echo(f"seed {seed} {family}: {length:.3f} tokens a forward, {lossless=}")


if __name__ == "__main__":
    main()
