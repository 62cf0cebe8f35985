"""The reference of options is the commands' own, and the example config file is one."""

from __future__ import annotations

import tomllib

import click
import pytest

from docs import options_table
from tests.deploy import command_lines

EXAMPLE = command_lines.DEPLOY / "draftmq.toml"


def test_the_tables_are_those_of_the_commands() -> None:
    written = options_table.PATH.read_text(encoding="utf-8")
    current = options_table.render(written)
    assert current == written, "run python -m docs.options_table"
    for option in ("`--target`", "`--encoding`", "`--hedge-after`", "`--draft-tokens`"):
        assert option in current


def test_every_command_has_its_section() -> None:
    said = {name.partition(" ")[0] for name, _ in options_table.commands()}
    assert said == set(options_table.cli.list_commands(click.Context(options_table.cli)))


def _tables() -> list[tuple[list[str], dict[str, object]]]:
    tables = tomllib.loads(EXAMPLE.read_text(encoding="utf-8"))
    data = tables.pop("data")
    return [([name], table) for name, table in tables.items()] + [
        (["data", name], table) for name, table in data.items()
    ]


@pytest.mark.parametrize(("words", "table"), _tables(), ids=lambda each: " ".join(each))
def test_the_example_file_is_read(words: list[str], table: dict[str, object]) -> None:
    rest = ["chat.jsonl"] if words[0] == "data" else []
    context = command_lines.parse(["--config", str(EXAMPLE), *words, *rest])
    if words[0] == "data":
        assert isinstance(context.command, click.Group)
        command = context.command.commands[words[1]]
        context = command.make_context(words[1], rest, parent=context)
    for key in table:
        source = context.get_parameter_source(key)
        assert source == click.core.ParameterSource.DEFAULT_MAP, key


def test_what_the_example_file_comments_out_are_settings_too() -> None:
    table = ""
    for line in EXAMPLE.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            table = line.strip("[]")
        elif line.startswith("# ") and " = " in line:
            command = dict(options_table.commands())[table.replace(".", " ")]
            assert line[2:].partition(" = ")[0] in {each.name for each in command.params}, line
