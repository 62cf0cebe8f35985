"""The ``draftmq`` command: names the commands of all parts, and imports a part when it is used.

A setting comes from its option, else from ``DRAFTMQ_<COMMAND>_<OPTION>``, else from the table
``[<command>]`` of the ``--config`` file (TOML), else from its default. A value that does not fit is
an error wherever it comes from.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import logging
import os
import signal
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from broker.keys.addresses import AddressError
from broker.protocol.errors import DraftmqError


@dataclass(frozen=True)
class _Entry:
    """One command: where it is, what it does, and which extra of the package it needs."""

    where: str
    summary: str
    extra: str = ""


_COMMANDS = {
    "broker": _Entry("broker.cli:broker", "Run the broker in the foreground."),
    "chaos": _Entry("broker.chaos.cli:chaos", "Stand between peers and a broker and break things."),
    "data": _Entry(
        "trainer_client.commands.data:data", "Look at training data before a run.", "train"
    ),
    "demo": _Entry(
        "trainer_client.commands.demo:demo",
        "Run all of it here, and end with a trained draft.",
        "all",
    ),
    "doctor": _Entry(
        "trainer_client.commands.doctor:doctor", "Say what works between here and a broker."
    ),
    "eval": _Entry(
        "trainer_client.commands.evaluate:evaluate",
        "Decode with a draft, and count accepted tokens.",
        "train",
    ),
    "export": _Entry(
        "trainer_client.commands.export:export",
        "Write a draft as engines load it, or lint one.",
        "train",
    ),
    "keygen": _Entry("broker.cli:keygen", "Make CURVE keys."),
    "speculators-train": _Entry(
        "trainer_client.commands.speculators:speculators_train",
        "Run the training of vLLM's speculators on our workers.",
        "worker",
    ),
    "status": _Entry("broker.watch.look:status", "Show what a broker sees, once."),
    "top": _Entry("broker.watch.look:top", "Show what brokers see, live."),
    "train": _Entry("trainer_client.commands.train:train", "Train a draft.", "train"),
    "worker": _Entry("worker.cli:worker", "Serve a target model.", "worker"),
}

#: What an extra brings beyond the base install. pyproject.toml says the same, and a test that they
#: agree.
_MODULES = {
    "worker": ("torch", "numpy", "transformers", "safetensors"),
    "train": ("torch", "numpy", "transformers", "safetensors", "matplotlib"),
}
_MODULES["all"] = tuple(dict.fromkeys(_MODULES["worker"] + _MODULES["train"]))

_EPILOG = """\b
Examples:
  draftmq demo
  draftmq broker --clients tcp://127.0.0.1:5555 --workers tcp://127.0.0.1:5556
  draftmq worker --broker tcp://127.0.0.1:5556 --target embedded
  draftmq COMMAND -h"""


class _Commands(click.Group):
    """Commands by name, imported on first use: ``draftmq broker`` never loads torch."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        _want_installed(cmd_name, entry.extra)
        module, _, name = entry.where.partition(":")
        command: click.Command = getattr(importlib.import_module(module), name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in _COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], _COMMANDS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else "draftmq --help lists the commands"
            ctx.fail(f"there is no command {args[0]!r}; {hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, _COMMANDS[name].summary) for name in sorted(_COMMANDS)])


def _want_installed(command: str, extra: str) -> None:
    """Raise :class:`click.ClickException` where a command's part of the package is missing."""
    missing = [name for name in _MODULES.get(extra, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise click.ClickException(
            f"'draftmq {command}' needs {', '.join(missing)}, and this is an install without; "
            f"pip install 'draftmq[{extra}]'"
        )


@click.command(
    cls=_Commands,
    epilog=_EPILOG,
    context_settings={
        "auto_envvar_prefix": "DRAFTMQ",
        "show_default": True,
        "help_option_names": ["-h", "--help"],
    },
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML file with a table of settings for each command.",
)
@click.version_option(package_name="draftmq")
@click.pass_context
def cli(ctx: click.Context, config: Path | None) -> None:
    """Train speculative drafts from a pool of frozen targets that run somewhere else."""
    if config is not None:
        ctx.default_map = _read_config(ctx, config)


def _read_config(ctx: click.Context, path: Path) -> dict[str, Any]:
    """The tables of a config file.

    The settings are checked of the command that is run, and of no other: that would import all
    parts. The other tables' names are checked.
    """
    try:
        tables = tomllib.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise click.UsageError(f"{path} is not TOML: {error}") from None
    for name, table in tables.items():
        if name not in _COMMANDS or not isinstance(table, dict):
            raise click.UsageError(f"{path}: [{name}] is not a command; see draftmq --help")
    invoked = ctx.invoked_subcommand or ""
    if invoked in tables and (command := cli.get_command(ctx, invoked)) is not None:
        _check_settings(path, invoked, command, tables[invoked])
        _listed(command, tables[invoked])
    return tables


def _check_settings(path: Path, name: str, command: click.Command, table: dict[str, Any]) -> None:
    """Raise :class:`click.UsageError` for a key that the command, or one of its group, lacks."""
    inner = command.commands if isinstance(command, click.Group) else {}
    known = {parameter.name for parameter in command.params} | set(inner)
    if unknown := sorted(set(table) - known):
        raise click.UsageError(f"{path}: [{name}] has no setting {', '.join(unknown)}")
    for key, settings in table.items():
        if key in inner and isinstance(settings, dict):
            _check_settings(path, f"{name}.{key}", inner[key], settings)


def _listed(command: click.Command, table: dict[str, Any]) -> None:
    """Make lists of single values where an option may be repeated, as on the command line."""
    for parameter in command.params:
        if parameter.multiple and not isinstance(table.get(parameter.name or "", []), list):
            table[str(parameter.name)] = [table[str(parameter.name)]]
    inner = command.commands if isinstance(command, click.Group) else {}
    for name, sub_command in inner.items():
        if isinstance(table.get(name), dict):
            _listed(sub_command, table[name])


def main(arguments: Sequence[str] = ()) -> None:
    """The console script; ``arguments`` come before those of the command line."""
    if os.getpid() == 1:  # of a container: the kernel ignores SIGTERM there, unless it is handled
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
    try:
        cli.main([*arguments, *sys.argv[1:]], prog_name="draftmq")
    except DraftmqError as error:
        for handler in logging.getLogger().handlers:
            handler.flush()  # what led to it comes first
        click.echo(f"draftmq: {error}", err=True)
        sys.exit(2 if isinstance(error, AddressError) else 1)  # 2 is wrong usage


if __name__ == "__main__":
    main()
