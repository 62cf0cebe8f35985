from __future__ import annotations

import re
from pathlib import Path

import pytest

from broker.commands import cli
from docs import channel_diagram
from worker.cli import worker

TEXT = channel_diagram.PATH.read_text(encoding="utf-8")


def test_the_diagram_is_that_of_the_code() -> None:
    assert channel_diagram.render(TEXT) == TEXT, "run python -m docs.channel_diagram"
    assert "connecting --> ready: Joined" in TEXT


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`(test_\w+)\*?`", TEXT))))
def test_the_tests_that_are_named_exist(name: str) -> None:
    tests = Path(__file__).parents[1] / "integration"
    sources = "".join(path.read_text(encoding="utf-8") for path in tests.rglob("test_*.py"))
    assert f"def {name}" in sources


@pytest.mark.parametrize("option", sorted(set(re.findall(r"--direct[\w-]*", TEXT))))
def test_the_options_that_are_named_exist(option: str) -> None:
    train = cli.get_command(
        cli.make_context("draftmq", ["--help"], resilient_parsing=True), "train"
    )
    assert train is not None
    known = {name for command in (worker, train) for each in command.params for name in each.opts}
    assert option in known
