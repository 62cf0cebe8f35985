"""Writes ``options.md``, the reference of all options: ``python -m docs.options_table``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import click

from broker.commands import cli

PATH = Path(__file__).with_name("options.md")
_BEGIN, _END = "<!-- options: begin -->\n", "<!-- options: end -->\n"
_HEAD = "| option | key | value | default | is |\n|---|---|---|---|---|\n"


def render(document: str) -> str:
    """The document with its tables made anew."""
    parts = "\n".join(_section(name, command) for name, command in commands())
    wanted = f"{_BEGIN}\n{parts}\n{_END}"
    return re.sub(f"{_BEGIN}.*?{_END}", lambda _: wanted, document, flags=re.DOTALL)


def commands() -> Iterator[tuple[str, click.Command]]:
    """Every command by its words, ``data check`` say, in the order of ``draftmq --help``."""
    context = click.Context(cli)
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            for inner, each in sorted(command.commands.items()):
                yield f"{name} {inner}", each
        else:
            yield name, command


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command)
    about = (command.help or "").strip().partition("\n\n")[0].replace("\n", " ")
    rows = [_row(each, context) for each in command.params if isinstance(each, click.Option)]
    table = _HEAD + "".join(rows) if rows else ""
    arguments = " ".join(
        each.make_metavar(context) for each in command.params if isinstance(each, click.Argument)
    )
    title = f"draftmq {name} {arguments}".strip()
    return f"## draftmq {name}\n\n`{title}`: {about}\n\n{table}"


def _row(option: click.Option, context: click.Context) -> str:
    spoken = [f"`{'/'.join(pair)}`" for pair in _pairs(option)]
    value = "" if option.is_flag else f"`{option.make_metavar(context).removesuffix(' RANGE')}`"
    if option.multiple:
        value += ", repeatable"
    cells = (", ".join(spoken), f"`{option.name}`", value, _default(option, context))
    return "| " + " | ".join(_cell(each) for each in (*cells, option.help or "")) + " |\n"


def _pairs(option: click.Option) -> Iterator[list[str]]:
    for number, name in enumerate(option.opts):
        others = option.secondary_opts[number : number + 1]
        yield [name, *others]


def _default(option: click.Option, context: click.Context) -> str:
    if option.required:
        return "required"
    value = option.get_default(context, call=False)
    if option.is_flag and not option.secondary_opts:
        return "on" if value is True else "off"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str | int | float) and value != "":
        return f"`{value}`"
    return ""


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


if __name__ == "__main__":
    PATH.write_text(render(PATH.read_text(encoding="utf-8")), encoding="utf-8")
