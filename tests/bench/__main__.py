"""``python -m tests.bench``: every benchmark, each beside its peer or limit in the same run."""

from __future__ import annotations

import importlib
from pathlib import Path

import click
from rich.console import Console

from tests.bench.lines import Line
from tests.bench.report import draw, table, write_json

#: Modules with a ``measure(progress, *, quick)``.
PARTS = {
    "a": "tests.bench.throughput",
    "b": "tests.bench.latency",
    "c": "tests.bench.share",
    "d": "tests.bench.waiting",
    "e": "tests.bench.encodings",
    "f": "tests.bench.memory",
    "g": "tests.bench.recovery",
}


@click.command()
@click.option("--only", help=f"Parts, by commas; there are {', '.join(PARTS)}.")
@click.option("--quick", is_flag=True, help="Run everything once, small: the figures say nothing.")
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default="build",
    help="Directory of bench.json and bench.png.",
)
def main(only: str | None, quick: bool, output: Path) -> None:
    """Measure, print a table, write bench.json and draw bench.png."""
    wanted = only.split(",") if only else list(PARTS)
    if unknown := set(wanted) - set(PARTS):
        raise click.UsageError(f"no part {', '.join(sorted(unknown))}: there are {list(PARTS)}")
    console = Console()
    parts: dict[str, list[Line]] = {}
    output.mkdir(parents=True, exist_ok=True)
    for part in wanted:
        measure = importlib.import_module(PARTS[part]).measure
        parts[part] = measure(lambda what, part=part: console.log(f"{part}: {what}"), quick=quick)
        lines = [line for lines in parts.values() for line in lines]
        write_json(output / "bench.json", lines)  # after each, so that none is lost with the next
    draw(output / "bench.png", parts)
    console.print(table(parts))


if __name__ == "__main__":
    main()
