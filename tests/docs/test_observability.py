from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from broker.commands import cli
from docs import metrics_table

TEXT = metrics_table.PATH.read_text(encoding="utf-8")


def test_the_table_of_metrics_is_current() -> None:
    assert metrics_table.render(TEXT) == TEXT, "run python -m docs.metrics_table"
    assert TEXT.count("| `draftmq_") > 30


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", TEXT))
def test_what_is_linked_is_there(link: str) -> None:
    assert (metrics_table.PATH.parent / link).resolve().is_file()


@pytest.mark.parametrize("line", re.findall(r"^draftmq .*$", TEXT, re.MULTILINE))
def test_the_commands_have_the_options_that_are_shown(line: str) -> None:
    _, name, *words = shlex.split(line.split(">>")[0], comments=True)
    command = cli.get_command(cli.make_context("draftmq", ["--help"], resilient_parsing=True), name)
    assert command is not None
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def test_the_picture_is_small() -> None:
    assert (Path(metrics_table.PATH.parent) / "images" / "status-page.png").stat().st_size < 150_000
