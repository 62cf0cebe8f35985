"""``python -m tests.bench.NAME``: one file's lines by themselves."""

from __future__ import annotations

from collections.abc import Callable

import click

from tests.bench.lines import Line, Progress


def run_alone(measure: Callable[..., list[Line]]) -> None:
    """A command that measures, and prints a line for each figure."""

    @click.command()
    @click.option("--quick", is_flag=True, help="Shorter, and less sure.")
    def command(quick: bool) -> None:
        progress: Progress = lambda text: click.echo(f"  {text}", err=True)  # noqa: E731
        for line in measure(progress, quick=quick):
            click.echo(text_of(line))

    command()


def text_of(line: Line) -> str:
    """A line as a person reads it."""
    verdict = f"wants {line.wants}: {'holds' if line.holds else 'FALLS SHORT'}"
    peer = ""
    if line.peer is not None:
        value = "could not run here" if line.peer_value is None else f"{line.peer_value:.4g}"
        peer = f"{line.peer}: {value} {line.unit}"
    beside = "; ".join(filter(None, [verdict if line.wants else "", peer]))
    return f"{line.name}: {line.value:.4g} {line.unit}" + (f" ({beside})" if beside else "")
