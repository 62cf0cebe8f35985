"""The front door: all commands by name, and a part loaded only when its command is run."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from broker import commands
from broker.commands import _COMMANDS, _MODULES, cli

ROOT = Path(__file__).parent.parent.parent
#: What takes seconds to import, and what the base install does not have.
HEAVY = ("torch", "numpy", "transformers", "safetensors", "matplotlib")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, list(arguments))


def heavy_modules_after(*arguments: str) -> list[str]:
    """What of ``HEAVY`` a process has loaded when a command line has been worked on."""
    program = (
        "import sys\n"
        "from broker.commands import cli\n"
        "cli.main(sys.argv[1:], standalone_mode=False)\n"
        f"print('LOADED', *[name for name in {HEAVY!r} if name in sys.modules])"
    )
    command = [sys.executable, "-c", program, *arguments]
    shown = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0, shown.stderr
    return shown.stdout.splitlines()[-1].split()[1:]


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_all_commands_and_an_example_and_loads_no_part(flag: str) -> None:
    result = run(flag)
    assert result.exit_code == 0
    for name, entry in _COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(entry.summary)}$", result.output, re.M)
    assert "Examples:" in result.output
    assert heavy_modules_after(flag) == []


@pytest.mark.parametrize("name", _COMMANDS)
def test_each_commands_help_ends_with_an_example_of_itself(name: str) -> None:
    result = run(name, "-h")
    assert result.exit_code == 0
    assert f"  draftmq {name} " in result.output.rpartition("Example")[2]


def test_a_mistyped_command_is_told_the_nearest() -> None:
    result = run("trian")
    assert result.exit_code == 2
    assert "did you mean 'train'?" in result.output
    assert "draftmq --help lists the commands" in run("xyzzy").output


def test_a_config_file_for_all_parts_loads_only_the_part_that_runs(tmp_path: Path) -> None:
    config = tmp_path / "all.toml"
    config.write_text('[train]\nepochs = 2\n[worker]\ncredits = 3\n[broker]\nhttp = "off"\n')
    assert heavy_modules_after("--config", str(config), "broker", "-h") == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[brokr]\n", "[brokr] is not a command"),
        ("[status]\nhtpp = 1\n", "[status] has no setting htpp"),
        ("status = 3\n", "[status] is not a command"),
        ("[", "is not TOML"),
    ],
)
def test_a_config_file_that_is_wrong_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "c.toml").write_text(text)
    result = run("--config", str(tmp_path / "c.toml"), "status")
    assert result.exit_code == 2
    assert said in result.output


def test_a_command_of_a_group_has_its_table_in_the_groups(tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text('{"text": "a b c d e f g"}\n')
    config = tmp_path / "c.toml"
    for text, said in (
        ('[data.check]\ntokenizer = "embedded"\n', "1 text"),
        ('[data.check]\ntokenzier = "embedded"\n', "[data.check] has no setting tokenzier"),
        ("[data]\nchekc = 1\n", "[data] has no setting chekc"),
    ):
        config.write_text(text)
        result = run("--config", str(config), "data", "check", str(tmp_path / "one.jsonl"))
        assert said in result.output, text


@pytest.mark.parametrize("name", [name for name, entry in _COMMANDS.items() if entry.extra])
def test_a_part_that_is_not_installed_is_one_sentence(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands.importlib.util, "find_spec", lambda module: None)
    result = run(name)
    extra = _COMMANDS[name].extra
    assert result.exit_code == 1
    assert result.output.count("\n") == 1
    assert "torch" in result.output
    assert f"pip install 'draftmq[{extra}]'" in result.output


def test_the_extras_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]

    def modules(extra: str) -> set[str]:
        found: set[str] = set()
        for need in extras[extra]:
            inner = re.fullmatch(r"draftmq\[(.+)\]", need)
            if inner:
                found |= set().union(*(modules(name) for name in inner[1].split(",")))
            else:
                found.add(re.split(r"[<>=]", need)[0])
        return found

    assert {extra: set(names) for extra, names in _MODULES.items()} == {
        # the options that need accelerate say so themselves
        extra: modules(extra) - {"accelerate"}
        for extra in ("worker", "train", "all")
    }


def test_every_command_is_where_the_table_says() -> None:
    context = click.Context(cli)
    for name in cli.list_commands(context):
        assert isinstance(cli.get_command(context, name), click.Command)


def test_a_single_value_stands_for_a_list_of_one_in_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text(
        '[train]\ndata = "nowhere.jsonl"\nbroker = "tcp://127.0.0.1:1"\noutput = "o"\n'
    )
    result = run("--config", str(config), "train")
    assert "nowhere.jsonl" in str(result.exception), result.output
