"""``draftmq data``: what a data file is to a run."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from broker import logs
from trainer_client.commands.regenerate import regenerate
from trainer_client.commands.tokenizer import TEMPLATE_HELP, load_tokenizer, served_tokenizer
from trainer_client.data import cache as tokens
from trainer_client.data.reading import template_options
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.training.data import Options, Sample
from trainer_client.training.report import DataReport, report
from trainer_client.training.settings import TrainSettings

_BAR = 40
#: Characters of a sample that are shown.
_TEXT = 1200

_EXAMPLE = """\b
Example:
  draftmq data check chat.jsonl --tokenizer Qwen/Qwen3-8B"""


@click.group(epilog=_EXAMPLE)
def data() -> None:
    """Look at training data before anything is trained."""


@data.command(epilog=_EXAMPLE)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--tokenizer", help="Name or path of the target's tokenizer.")
@click.option("--broker", multiple=True, help="Take the tokenizer of the model that it serves.")
@click.option("--trust-remote-code", is_flag=True, help="Run code of the tokenizer's own.")
@click.option("--max-length", default=TrainSettings.max_length, show_default=True)
@click.option("--loss-on", type=click.Choice(("all", "last")), default="all", show_default=True)
@click.option("--chat-template", default="", help=TEMPLATE_HELP["chat_template"])
@click.option("--chat-template-args", multiple=True, help=TEMPLATE_HELP["chat_template_args"])
@click.option("--skip-bad-lines", is_flag=True, help="Count what cannot be used, and go on.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
@logs.options
def check(
    files: tuple[Path, ...],
    tokenizer: str | None,
    broker: tuple[str, ...],
    trust_remote_code: bool,
    max_length: int,
    loss_on: str,
    chat_template: str,
    chat_template_args: tuple[str, ...],
    skip_bad_lines: bool,
    as_json: bool,
) -> None:
    """Read FILES as a training would, and say what would be learned from it.

    Exits 1 where nothing, or every token of a conversation, has loss.
    """
    if bool(tokenizer) == bool(broker):
        raise click.UsageError("give either --tokenizer or --broker")
    read = load_tokenizer(tokenizer or _served_tokenizer(broker), trust_remote_code)
    told = template_options(chat_template, chat_template_args)
    options = Options(max_length, skip_bad_lines, loss_on, told)
    found = report(files, read, options, quiet=as_json)
    if as_json:
        click.echo(json.dumps(_plain(found, read)))
    else:
        _show(found, read)
    if found.trouble:
        click.echo(f"draftmq: {found.trouble}", err=True)
        sys.exit(1)


def _served_tokenizer(brokers: tuple[str, ...]) -> str:
    with RemoteEagle3TargetModel(list(brokers)) as target:
        return served_tokenizer(target)


def _show(found: DataReport, tokenizer: Any) -> None:
    kinds = ", ".join(f"{count:,} {kind}" for kind, count in found.kinds.items())
    click.echo(f"records    {kinds}")
    click.echo(f"samples    {found.samples:,} of {found.tokens:,} tokens")
    click.echo(f"with loss  {found.supervised:,} tokens, {found.supervised_share:.1%}")
    gone = dict(found.left_out)
    gone |= {"cut to the maximum length": found.truncated, "without loss": found.without_loss}
    for reason, count in gone.items():
        if count:
            click.echo(f"           {count:,} {reason}")
    for size, share in found.coverage.items():
        click.echo(f"vocabulary {size:,} tokens cover {share:.2%} of what is to be predicted")
    click.echo("lengths")
    most = max(found.lengths.values())
    for bucket, count in found.lengths.items():
        bar = "█" * max(1, round(_BAR * count / most))
        click.echo(f"  up to {bucket:>7,} {bar} {count:,}")
    for sample in found.shown:
        how = "green" if sys.stdout.isatty() else "in ⟦brackets⟧"
        click.echo(f"\n{sample.origin}: the tokens with loss are {how}")
        click.echo(_marked(sample, tokenizer))


def _marked(sample: Sample, tokenizer: Any) -> str:
    parts, shown = [], 0
    for text, learned in _runs(sample, tokenizer):
        if learned:
            in_colour = sys.stdout.isatty()
            text = click.style(text, fg="green", bold=True) if in_colour else f"⟦{text}⟧"
        parts.append(text)
        shown += len(text)
        if shown > _TEXT:
            parts.append(" ...")
            break
    return "".join(parts)


def _runs(sample: Sample, tokenizer: Any) -> list[tuple[str, bool]]:
    """The text in pieces that have loss throughout, or none."""
    runs: list[tuple[list[int], bool]] = []
    for token, learned in zip(sample.input_ids, sample.loss_mask, strict=True):
        if not runs or runs[-1][1] != bool(learned):
            runs.append(([], bool(learned)))
        runs[-1][0].append(token)
    return [(str(tokenizer.decode(ids)), learned) for ids, learned in runs]


def _plain(found: DataReport, tokenizer: Any) -> dict[str, Any]:
    plain = asdict(found) | {"supervised_share": found.supervised_share, "trouble": found.trouble}
    plain["shown"] = [
        {
            "origin": sample.origin,
            "runs": [{"text": t, "loss": learned} for t, learned in _runs(sample, tokenizer)],
        }
        for sample in found.shown
    ]
    return plain


@data.command(
    epilog="""\b
Example:
  draftmq data cache --clear"""
)
@click.option("--clear", is_flag=True, help="Remove all that no process uses right now.")
@logs.options
def cache(clear: bool) -> None:
    """Show the token cache: what lies in it, the least recently used first.

    It lies in DRAFTMQ_DATA_CACHE, and keeps DRAFTMQ_DATA_CACHE_GIB (64) of what nobody uses.
    """
    if clear:
        gone = tokens.clean()
        click.echo(f"{len(gone)} removed, {sum(entry.nbytes for entry in gone) / 2**20:,.1f} MiB")
        return
    click.echo(f"{tokens.directory()}")
    for entry in tokens.listed():
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used_at))
        size = f"{entry.nbytes / 2**20:,.1f} MiB"
        click.echo(f"{used}  {size:>12}  {entry.tokens:,} tokens  {', '.join(entry.files)}")


data.add_command(regenerate)
