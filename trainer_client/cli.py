"""The ``draftmq`` command. Each part brings its own commands; they are loaded when they are used.

A setting comes from its option, else from ``DRAFTMQ_<COMMAND>_<OPTION>``, else from the table
``[<command>]`` of the ``--config`` file (TOML), else from its default. A value that does not fit is
an error wherever it comes from.
"""

from __future__ import annotations

import importlib
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

_COMMANDS = {
    "broker": "broker.cli:broker",
    "chaos": "broker.chaos.cli:chaos",
    "demo": "trainer_client.commands.demo:demo",
    "eval": "trainer_client.commands.evaluate:evaluate",
    "export": "trainer_client.commands.export:export",
    "keygen": "broker.cli:keygen",
    "status": "broker.watch.look:status",
    "top": "broker.watch.look:top",
    "train": "trainer_client.commands.train:train",
    "worker": "worker.cli:worker",
}


class _Commands(click.Group):
    """Commands by name, imported on first use: ``draftmq broker`` never loads torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, _, name = _COMMANDS[cmd_name].partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command


@click.command(
    cls=_Commands, context_settings={"auto_envvar_prefix": "DRAFTMQ", "show_default": True}
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with a table of settings for each command.",
)
@click.version_option(package_name="draftmq")
@click.pass_context
def cli(ctx: click.Context, config: Path | None) -> None:
    """Train EAGLE-3 drafts from a pool of frozen targets that run somewhere else."""
    if config is not None:
        ctx.default_map = _read_config(ctx, config)


def _read_config(ctx: click.Context, path: Path) -> dict[str, Any]:
    try:
        tables = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is not TOML: {error}") from None
    for name, table in tables.items():
        command = cli.get_command(ctx, name)
        if command is None or not isinstance(table, dict):
            raise click.UsageError(f"{path}: [{name}] is not a command; see draftmq --help")
        known = {parameter.name for parameter in command.params}
        if unknown := sorted(set(table) - known):
            raise click.UsageError(f"{path}: [{name}] has no setting {', '.join(unknown)}")
    return tables


def main(arguments: Sequence[str] = ()) -> None:
    """The console script; ``arguments`` come before those of the command line."""
    import sys

    from broker.errors import BrokerError
    from broker.protocol import ProtocolError
    from trainer_client.errors import TrainerClientError
    from worker.errors import WorkerError

    try:
        cli.main([*arguments, *sys.argv[1:]], prog_name="draftmq")
    except (BrokerError, ProtocolError, TrainerClientError, WorkerError) as error:
        click.echo(f"draftmq: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
