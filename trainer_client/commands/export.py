"""``draftmq export``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from trainer_client.drafts.export import draft_folder, export_checkpoint, newest_checkpoint
from trainer_client.drafts.lint import check_draft
from trainer_client.drafts.rewriting import rewrite_draft
from trainer_client.errors import DataError
from worker.targets.options import Layers

_EXPORT_EXAMPLE = """\b
Example:
  draftmq export --checkpoint runs/one --output draft
  draftmq export --checkpoint NEMOS_OUTPUT_DIR --output draft
  draftmq export --check draft"""


@click.command(epilog=_EXPORT_EXAMPLE)
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="A run or a checkpoint, of ours or of NeMo AutoModel's; or speculators' draft.",
)
@click.option(
    "--format",
    "layout",
    type=click.Choice(("engine", "speculators")),
    default="engine",
    show_default=True,
    help="What vLLM and SGLang load, or what speculators trains and vLLM loads.",
)
@click.option("--verifier", default="", help="With speculators: the target's hub name or path.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the draft is written.")
@click.option(
    "--check", "checked", type=click.Path(path_type=Path), help="Lint this EAGLE-3 draft instead."
)
@click.option(
    "--aux-layers",
    type=Layers(),
    help="Which layers a draft reads, where another trainer did not write them: I,J,K.",
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def export(
    checkpoint: Path | None,
    layout: str,
    verifier: str,
    output: Path | None,
    checked: Path | None,
    aux_layers: tuple[int, ...] | None,
    as_json: bool,
) -> None:
    """Write a checkpoint as vLLM and SGLang load it, or lint any EAGLE-3 draft with --check."""
    if checked is None:
        if checkpoint is None or output is None:
            raise click.UsageError("give --checkpoint and --output, or --check")
        if bool(verifier) != (layout == "speculators"):
            raise click.UsageError("--format speculators and --verifier TARGET go together")
        _write(checkpoint, output, aux_layers, verifier)
    findings = check_draft(checked or Path(str(output)))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{finding.severity}: {finding.text}")
        click.echo(f"{len(findings)} findings in {checked or output}")
    if any(finding.severity == "error" for finding in findings):
        raise DataError(f"{checked or output} will not work in engines as it is; see above")


def _write(
    checkpoint: Path, output: Path, aux_layers: tuple[int, ...] | None, verifier: str
) -> None:
    theirs = (draft_folder(checkpoint) / "config.json").is_file()
    if theirs and newest_checkpoint(checkpoint) is None:
        if verifier:
            raise click.UsageError("--format speculators is for our own runs and checkpoints")
        layers = rewrite_draft(checkpoint, output, aux_layers)
        click.echo(f"it reads the target's layers {','.join(map(str, layers))}", err=True)
    elif aux_layers:
        raise click.UsageError("--aux-layers is for drafts of other trainers; ours say them")
    else:
        export_checkpoint(checkpoint, output, verifier)
