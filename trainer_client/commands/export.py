"""``draftmq export``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from trainer_client.drafts.export import export_checkpoint
from trainer_client.drafts.lint import check_draft
from trainer_client.errors import DataError

_EXPORT_EXAMPLE = """\b
Example:
  draftmq export --checkpoint runs/one --output draft
  draftmq export --check draft"""


@click.command(epilog=_EXPORT_EXAMPLE)
@click.option("--checkpoint", type=click.Path(path_type=Path), help="A run, or one checkpoint.")
@click.option("--output", type=click.Path(path_type=Path), help="Where the draft is written.")
@click.option(
    "--check", "checked", type=click.Path(path_type=Path), help="Lint this EAGLE-3 draft instead."
)
@click.option("--json", "as_json", is_flag=True, help="Print what was found as JSON.")
def export(
    checkpoint: Path | None, output: Path | None, checked: Path | None, as_json: bool
) -> None:
    """Write a checkpoint as vLLM and SGLang load it, or lint any EAGLE-3 draft with --check."""
    if checked is None:
        if checkpoint is None or output is None:
            raise click.UsageError("give --checkpoint and --output, or --check")
        export_checkpoint(checkpoint, output)
    findings = check_draft(checked or Path(str(output)))
    if as_json:
        click.echo(json.dumps([asdict(finding) for finding in findings]))
    else:
        for finding in findings:
            click.echo(f"{finding.severity}: {finding.text}")
        click.echo(f"{len(findings)} findings in {checked or output}")
    if any(finding.severity == "error" for finding in findings):
        raise DataError(f"{checked or output} will not work in engines as it is; see above")
