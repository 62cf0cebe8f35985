"""``draftmq data check`` says what would be learned, and fails where that cannot be meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from broker.commands import cli

CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"What is {number} and {number}?"},
            {"role": "assistant", "content": f"It is {2 * number}."},
        ]
    }
    for number in range(1, 30)
]


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    return write(tmp_path / "chats.jsonl", CHATS)


def write(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def check(file: Path, *options: str) -> Result:
    arguments = ["data", "check", str(file), "--tokenizer", "embedded", *options]
    return CliRunner().invoke(cli, arguments)


def test_it_shows_kinds_lengths_loss_and_samples(tmp_path: Path) -> None:
    file = write(
        tmp_path / "mixed.jsonl", [*TEXTS, {"input_ids": [5, 6, 7], "loss_mask": [0, 0, 1]}]
    )
    shown = check(file)
    assert shown.exit_code == 0, shown.output
    assert "records    6 text, 1 tokens" in shown.output
    assert "samples    7 of" in shown.output
    assert "up to      64 █" in shown.output
    assert "mixed.jsonl:1: the tokens with loss are in ⟦brackets⟧" in shown.output
    assert "⟦The draft guesses.⟧" in shown.output


TEXTS = [{"text": "The draft guesses."} for _ in range(6)]


def test_the_report_is_json_too(tmp_path: Path) -> None:
    shown = check(write(tmp_path / "a.jsonl", TEXTS), "--json")
    found = json.loads(shown.output)
    assert found["kinds"] == {"text": 6}
    assert found["supervised_share"] == 1.0
    assert len(found["shown"]) == 5
    assert found["shown"][0]["runs"][0]["loss"]


def test_nothing_to_learn_is_an_error(tmp_path: Path) -> None:
    file = write(tmp_path / "none.jsonl", [{"input_ids": [5, 6, 7], "loss_mask": [0, 0, 0]}])
    shown = check(file)
    assert shown.exit_code == 1
    assert "has no sample with anything to learn from" in str(shown.exception)


def test_everything_with_loss_is_an_error_but_for_plain_text(tmp_path: Path) -> None:
    everything = {"input_ids": [5, 6, 7], "loss_mask": [1, 1, 1]}
    shown = check(write(tmp_path / "all.jsonl", [everything, everything]))
    assert shown.exit_code == 1
    assert "every token has loss, also of what was asked" in shown.output
    assert check(write(tmp_path / "text.jsonl", TEXTS)).exit_code == 0


def test_a_bad_line_is_an_error_or_counted(tmp_path: Path) -> None:
    file = tmp_path / "odd.jsonl"
    file.write_text('{"text": "good and long enough"}\n{"nothing": 1}\n')
    shown = check(file)
    assert shown.exit_code == 1
    assert "odd.jsonl:2" in str(shown.exception)
    found = json.loads(check(file, "--skip-bad-lines", "--json").output)
    assert sum(found["left_out"].values()) == 1


def test_one_tokenizer_is_wanted(chats: Path) -> None:
    shown = CliRunner().invoke(cli, ["data", "check", str(chats)])
    assert shown.exit_code == 2
    assert "either --tokenizer or --broker" in shown.output
