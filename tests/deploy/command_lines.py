"""Finds the ``draftmq`` command lines in files and gives them to the real parser."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import click
import yaml

from broker.commands import _read_config, cli

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose"

_ENDS = re.compile(r"[;&|()]+|[<>]+")
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}|\$(\w+)")


def parse(arguments: list[str], environment: Mapping[str, str] | None = None) -> click.Context:
    """Parse as ``draftmq ARGUMENTS`` would, and run nothing. Raises ``click.UsageError``."""
    with mock.patch.dict("os.environ", environment or {}, clear=True):
        group = cli.make_context("draftmq", list(arguments))
        name, command, rest = cli.resolve_command(group, [*group._protected_args, *group.args])
        assert command is not None
        if group.params["config"] is not None:
            group.invoked_subcommand = str(name)
            group.default_map = _read_config(group, group.params["config"])
        return command.make_context(name, rest, parent=group)


def in_shell(text: str) -> Iterator[list[str]]:
    """The arguments of each ``draftmq ...`` and ``-m trainer_client ...`` of a shell text."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.lstrip().startswith("#"):
            continue
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        for word in words:  # a command in quotes, as for `sbatch --wrap`
            if " draftmq " in f" {word} " and word != "draftmq":
                yield from in_shell(word)
        for at, word in enumerate(words):
            if word == "draftmq":
                yield _until_end(words[at + 1 :])
            elif word == "trainer_client" and words[at - 1] == "-m":
                yield ["train", *_until_end(words[at + 1 :])]


def in_compose(path: Path, environment: Mapping[str, str]) -> dict[str, list[str]]:
    """Of each service: its command and, where it is one of ours, its health check."""
    found = {}
    for name, service in yaml.safe_load(path.read_text())["services"].items():
        if "command" in service:
            found[name] = [expand(word, environment) for word in service["command"]]
        test = service.get("healthcheck", {}).get("test", [])
        if "draftmq" in test:
            found[f"{name} healthcheck"] = test[test.index("draftmq") + 1 :]
    return found


def in_dockerfile(path: Path) -> dict[str, list[str]]:
    """Its CMD behind its ENTRYPOINT, and its health check."""
    words = {
        kind: shlex.split(value.strip("[]").replace(",", " "))
        for kind, value in re.findall(r"^\s*(ENTRYPOINT|CMD) (\[.*\])$", path.read_text(), re.M)
        if kind == "ENTRYPOINT" or "status" not in value
    }
    found = {"command": (words["ENTRYPOINT"] + words["CMD"])[1:]}
    health = re.search(r"HEALTHCHECK[^[]*CMD (\[.*\])", path.read_text())
    if health:
        found["health"] = shlex.split(health[1].strip("[]").replace(",", " "))[1:]
    return found


def settings(path: Path) -> dict[str, str]:
    """The variables of an environment file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


def unit(path: Path) -> dict[str, dict[str, list[str]]]:
    """Section, key, values of a unit. Raises ``ValueError`` for a line that is neither."""
    sections: dict[str, dict[str, list[str]]] = {}
    keys: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith(("#", ";")):
            continue
        if section := re.fullmatch(r"\[(\w+)\]", line):
            keys = sections.setdefault(section[1], {})
            continue
        key, equals, value = line.partition("=")
        if not equals or not sections:
            raise ValueError(f"{path.name}: {line!r} is no setting")
        keys.setdefault(key, []).append(value)
    return sections


def expand(word: str, environment: Mapping[str, str]) -> str:
    """``$NAME`` and ``${NAME:-DEFAULT}`` as compose takes them."""

    def value(match: re.Match[str]) -> str:
        return environment.get(match[1] or match[3]) or match[2] or ""

    return _VARIABLE.sub(value, word)


def option(context: click.Context, name: str) -> Any:
    """What a parsed command line says for an option."""
    return context.params[name]


def _until_end(words: list[str]) -> list[str]:
    ends = [at for at, word in enumerate(words) if _ENDS.fullmatch(word) or word.startswith("#")]
    return words[: ends[0]] if ends else words
