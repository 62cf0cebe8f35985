"""``draftmq eval``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from trainer_client.commands.tokenizer import TEMPLATE_HELP, load_tokenizer
from trainer_client.drafts.export import read_draft
from trainer_client.errors import TrainerClientError
from worker.targets.options import Layers

_AT_LEAST_1 = click.IntRange(min=1)


_EVALUATE_EXAMPLE = """\b
Example:
  draftmq eval --draft runs/one/draft --target embedded"""


@click.command("eval", epilog=_EVALUATE_EXAMPLE)
@click.option("--draft", type=click.Path(path_type=Path), required=True, help="An exported draft.")
@click.option("--target", required=True, help="Hugging Face id or path, or 'embedded'.")
@click.option(
    "--prompts",
    type=click.Path(path_type=Path),
    help="Data as for training: prompts end where answers begin (default for 'embedded': its own).",
)
@click.option("--count", type=_AT_LEAST_1, default=16, help="Prompts taken.")
@click.option("--prompt-tokens", type=_AT_LEAST_1, default=48, help="Of prompts of plain text.")
@click.option(
    "--max-new-tokens", type=_AT_LEAST_1, default=64, help="Tokens decoded for each prompt."
)
@click.option(
    "--draft-tokens", type=_AT_LEAST_1, default=5, help="Tokens that the draft guesses at a time."
)
@click.option("--device", default="", help="cpu, cuda, ... (default: a GPU if there is one).")
@click.option("--dtype", help="float32, bfloat16, ... (default: the checkpoint's).")
@click.option("--tokenizer", default="", help="Name or path (default: the target's own).")
@click.option(
    "--trust-remote-code", is_flag=True, help="Run code of the target's and the tokenizer's own."
)
@click.option("--chat-template", default="", help=TEMPLATE_HELP["chat_template"])
@click.option("--chat-template-args", multiple=True, help=TEMPLATE_HELP["chat_template_args"])
@click.option("--aux-layers", type=Layers(), help="Where not the draft's own: I,J,K.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def evaluate(
    draft: Path,
    target: str,
    prompts: Path | None,
    count: int,
    prompt_tokens: int,
    max_new_tokens: int,
    draft_tokens: int,
    device: str,
    dtype: str | None,
    tokenizer: str,
    trust_remote_code: bool,
    chat_template: str,
    chat_template_args: tuple[str, ...],
    aux_layers: tuple[int, ...] | None,
    as_json: bool,
) -> None:
    """Decode for real, with and without the draft, and compare token by token.

    Exits 1 when the text is not that of plain greedy decoding.
    """
    from rich.progress import track

    from trainer_client.data.reading import template_options
    from trainer_client.drafts.initial import check_fit
    from trainer_client.drafts.layers import aux_layer_ids
    from trainer_client.evaluation.decoding import evaluate as run_evaluation
    from trainer_client.evaluation.prompts import load_prompts
    from worker.targets import load_target

    layers = aux_layers or aux_layer_ids(draft)
    told = template_options(chat_template, chat_template_args)
    loaded = load_target(
        target,
        device=device,
        dtype=dtype,
        aux_layer_ids=layers,
        trust_remote_code=trust_remote_code,
    )
    embeddings = loaded.get_input_embeddings().weight
    check_fit(draft, target, embeddings.shape[1], loaded.vocab_size)
    name = tokenizer or loaded.tokenizer
    if not name:
        raise TrainerClientError(f"the target {target!r} names no tokenizer; say --tokenizer")
    read = load_tokenizer(name, trust_remote_code)
    tokens = load_prompts(read, target, prompts, count, prompt_tokens, told)
    draft_model = read_draft(draft, embeddings)
    model = draft_model.to(device=loaded.device, dtype=loaded.dtype)
    ticks = iter(track(tokens, description="decoding", disable=as_json))
    next(ticks)
    result = run_evaluation(
        loaded,
        model,
        tokens,
        max_new_tokens=max_new_tokens,
        draft_tokens=draft_tokens,
        on_prompt=lambda: next(ticks, None),
    )
    if as_json:
        click.echo(json.dumps(asdict(result)))
    else:
        rates = ", ".join(f"{rate:.0%}" for rate in result.depth_acceptance)
        click.echo(
            f"accepted tokens per target forward: {result.accept_length:.2f} "
            f"({result.draft_tokens} drafted; 1 would be no draft)\n"
            f"drafts accepted to depth 1, 2, ...: {rates}\n"
            f"speed against plain greedy decoding: {result.speedup:.2f}x (median of prompts)\n"
            f"text identical to plain greedy decoding: {'yes' if result.lossless else 'NO'} "
            f"({result.prompts} prompts, {result.tokens} tokens checked)"
        )
    if not result.lossless:
        raise TrainerClientError(
            f"prompt {result.first_difference and result.first_difference[0]} differs from plain "
            "greedy decoding; low precision makes ties fall differently, try --dtype float32"
        )
