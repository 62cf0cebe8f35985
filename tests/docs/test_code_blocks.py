"""Every code block of README and documents is held by a test, or says why it is not run.

Shell: each command line is given to the parser of its program where that is ours (``draftmq``,
``make``, ``python -m``, the extras of ``pip install``). A block with programs of others has a
comment above it: the test that runs it (``run: FILE``), or why none does (``not run: REASON``).
Python is run beside a broker and a worker. TOML, YAML and JSON are read by what reads them.
``text`` and ``mermaid`` are no code.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import torch
import yaml

from broker.chaos.script import load_script
from broker.service import Broker
from tests.deploy import command_lines
from tests.docs.blocks import Block, all_blocks, blocks_of
from trainer_client.data.files import read_records
from trainer_client.data.records import Record, understand
from worker.service import Worker
from worker.targets import load_target

ROOT = command_lines.ROOT
BLOCKS = all_blocks()
SHELL = [block for block in BLOCKS if block.language == "sh"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
TOML = [block for block in BLOCKS if block.language == "toml"]
YAML = [block for block in BLOCKS if block.language == "yaml"]
JSON = [block for block in BLOCKS if block.language == "json"]
NO_CODE = {"text", "mermaid"}
#: Programs that a line may run beside ours without a word about it.
PLAIN = {"cd", "mkdir", "cp", "ls", "cat", "echo", "head", "export", "for", "done"}


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a shell text, without variables that are set before it."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if re.fullmatch(r"[;&|()]+", word):
                while words and (words[0] == "do" or re.fullmatch(r"\w+=.*", words[0])):
                    del words[0]
                if words:
                    yield words
                words = []
            else:
                words.append(word)


def unknown_program(words: list[str]) -> str:
    """Why no test holds this command, or nothing. Raises where it is ours and would not run."""
    program = words[0]
    if program == "draftmq":
        list(map(command_lines.parse, command_lines.in_shell(shlex.join(words))))
        return ""
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        asked = [word for word in words[1:] if "=" not in word]
        assert set(asked) <= set(targets), f"make has no {asked}"
        return ""
    if program == "pip" and words[1:2] == ["install"]:
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        for wanted in re.findall(r"\[(.+?)\]", " ".join(words)):
            assert set(wanted.split(",")) <= set(extras["optional-dependencies"])
        return ""
    if program in ("python", "torchrun", "pytest"):
        for module in re.findall(r" -m ([\w.]+)", " ".join(words)) if program != "pytest" else ():
            assert importlib.util.find_spec(module) is not None, f"there is no module {module}"
        for script in (word for word in words if word.endswith(".py")):
            assert (ROOT / script).is_file(), f"there is no {script}"
        list(map(command_lines.parse, command_lines.in_shell(shlex.join(words))))
        return ""
    return "" if program in PLAIN else program


def test_every_block_says_what_it_is() -> None:
    known = {"sh", "python", "toml", "yaml", "json", *NO_CODE}
    assert {str(block): block.language for block in BLOCKS if block.language not in known} == {}
    assert len(BLOCKS) > 30


def test_a_mark_names_a_reason_or_the_test_that_runs_the_block() -> None:
    for block in BLOCKS:
        if block.mark == "run":
            assert block.page.name in (ROOT / block.why).read_text(encoding="utf-8"), str(block)
        assert bool(block.mark) == bool(block.why), str(block)


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_shell_blocks_say_commands_that_exist(block: Block) -> None:
    unknown = [name for words in commands(block.text) if (name := unknown_program(words))]
    assert not unknown or block.mark, (
        f"{unknown}: no test runs these; say <!-- not run: REASON --> above the block"
    )


@pytest.mark.parametrize(
    "line", ["draftmq worker --target x", "make nothing", "python -m tests.nothing"]
)
def test_a_wrong_command_would_be_noticed(line: str) -> None:
    with pytest.raises((click.UsageError, AssertionError)):
        unknown_program(shlex.split(line))


def test_a_program_of_others_needs_a_reason() -> None:
    assert [unknown_program(words) for words in commands("A=1 srun x && cd y  # z")] == ["srun", ""]


def test_the_finder_sees_marks_and_indented_blocks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- not run: no GPU -->\n```sh\nls\n```\n\nand\n\n    make x\n\n```\n```\n")
    found = [(block.language, block.mark, block.why) for block in blocks_of(page)]
    assert found == [("sh", "not run", "no GPU"), ("", "", ""), ("", "", "")]


@pytest.fixture
def endpoint() -> Iterator[str]:
    with (
        Broker(http=None) as broker,
        Worker(load_target("embedded"), broker.worker_endpoint),
    ):
        yield broker.client_endpoint


@pytest.fixture
def names(endpoint: str) -> Iterator[dict[str, Any]]:
    """What the blocks take as given: a target, and one batch of its inputs."""
    from trainer_client import RemoteEagle3TargetModel

    ids = torch.arange(8).view(1, 8)
    with RemoteEagle3TargetModel.from_urls([endpoint], device="cpu") as target:
        mask = torch.zeros(target.model_info()["vocab_size"], dtype=torch.bool)
        mask[:512] = True
        yield {
            "target": target,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "loss_mask": torch.ones_like(ids),
            "packed_ids": torch.arange(8),
            "lengths": torch.tensor([3, 5]),
            "selected_token_ids": torch.arange(512),
            "selected_token_mask": mask,
        }


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_run(block: Block, endpoint: str, names: dict[str, Any]) -> None:
    code = block.text.replace("tcp://broker-host:5555", endpoint).replace('"cuda"', '"cpu"')
    code = code.replace("layers=1,9,17,25,33;", "layers=1,2;").replace("layers=1,9", "layers=1,2")
    given = names["target"]
    try:
        exec(compile(code, str(block), "exec"), names)
    finally:
        if names["target"] is not given:
            names["target"].close()


@pytest.mark.parametrize("block", TOML, ids=str)
def test_toml_blocks_are_read(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(block.text)
    tables = tomllib.loads(block.text)
    if "fault" in tables:
        assert load_script(path).rules
        return
    for command, settings in tables.items():
        context = command_lines.parse(["--config", str(path), command])
        assert set(settings) <= set(context.params)


@pytest.mark.parametrize("block", JSON, ids=str)
def test_json_blocks_are_records_of_training_data(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(block.text)
    for record in read_records(path):
        assert isinstance(record, Record)
        assert understand(record)


@pytest.mark.parametrize("block", YAML, ids=str)
def test_yaml_blocks_are_read(block: Block) -> None:
    assert yaml.safe_load(block.text)
