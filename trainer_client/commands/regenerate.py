"""``draftmq data regenerate``."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

import click

from broker import logs
from trainer_client.data.endpoint import Endpoint
from trainer_client.data.regenerating import Outcome, Sampling
from trainer_client.data.regenerating import regenerate as run
from trainer_client.data.sources import files_of

_logger = logging.getLogger("draftmq.data")
_EVERY_S = 10.0

_EXAMPLE = """\b
Example:
  draftmq data regenerate chat.jsonl --endpoint http://HOST:8000/v1 --model Qwen/Qwen3-8B \\
      --output own.jsonl"""


@click.command(epilog=_EXAMPLE)
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--endpoint", required=True, help="Up to and with /v1, of anything that serves it.")
@click.option("--model", required=True, help="What the endpoint calls the target.")
@click.option("--output", required=True, type=click.Path(path_type=Path, dir_okay=False))
@click.option("--concurrency", default=32, show_default=True, type=click.IntRange(min=1))
@click.option("--max-tokens", default=2048, show_default=True, type=click.IntRange(min=1))
@click.option("--temperature", type=float, help="Default: the endpoint's own.")
@click.option("--top-p", type=float, help="Default: the endpoint's own.")
@click.option("--seed", type=int)
@click.option("--extra", default="{}", help="Further fields of each request, as a JSON object.")
@click.option("--api-key-env", default="OPENAI_API_KEY", show_default=True, help="Has the key.")
@click.option("--timeout-s", default=600.0, show_default=True, help="Of one try.")
@click.option("--retries", default=6, show_default=True, help="With growing pauses between.")
@click.option("--skip-bad-lines", is_flag=True, help="Count what cannot be read, and go on.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@logs.options
def regenerate(
    files: tuple[Path, ...],
    endpoint: str,
    model: str,
    output: Path,
    concurrency: int,
    max_tokens: int,
    temperature: float | None,
    top_p: float | None,
    seed: int | None,
    extra: str,
    api_key_env: str,
    timeout_s: float,
    retries: int,
    skip_bad_lines: bool,
    as_json: bool,
) -> None:
    """Ask a target for its own answers to the prompts of FILES.

    The same command goes on where it was stopped. What was asked is in OUTPUT.params.json.
    """
    key = os.environ.get(api_key_env, "")
    asked = Endpoint(endpoint, key=key, timeout_s=timeout_s, retries=retries)
    sampling = Sampling(model, max_tokens, temperature, top_p, seed, _object(extra))
    with _Shown(quiet=as_json) as shown:
        found = run(
            files_of(files),
            output,
            asked,
            sampling,
            concurrency=concurrency,
            skip_bad_lines=skip_bad_lines,
            told=shown.told,
        )
    summary: dict[str, Any] = {
        "written": found.written,
        "written_before": found.before,
        "left_out": dict(found.left_out),
        "completion_tokens": found.completion_tokens,
        "retried": asked.retried,
        "output": str(output),
    }
    if as_json:
        click.echo(json.dumps(summary))
    else:
        for name, value in summary.items():
            click.echo(f"{name.replace('_', ' ')}: {value}")
    if not found.written and not found.before:
        click.echo("draftmq: nothing was answered", err=True)
        sys.exit(1)


def _object(text: str) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        raise click.BadParameter(f"--extra wants a JSON object, got {text!r}")
    return said


class _Shown:
    """A line that counts on a terminal, lines in the log elsewhere."""

    def __init__(self, *, quiet: bool) -> None:
        from rich.console import Console

        self._status = Console(stderr=True, quiet=quiet).status("asking")
        self._began = self._said = time.monotonic()

    def __enter__(self) -> _Shown:
        self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def told(self, outcome: Outcome) -> None:
        now = time.monotonic()
        rate = outcome.completion_tokens / max(1e-9, now - self._began)
        fields = {
            "written": outcome.written + outcome.before,
            "left_out": outcome.left_out.total(),
            "tokens_per_s": round(rate),
        }
        self._status.update(", ".join(f"{value:,} {name}" for name, value in fields.items()))
        if now - self._said >= _EVERY_S and not sys.stderr.isatty():
            self._said = now
            logs.log(_logger, "info", "regenerating", fields)
