"""Scripts: what they may say, and what is answered to wrong ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.chaos.faults import (
    ChaosError,
    Direction,
    Fault,
    Kind,
    Rule,
    Which,
    describe,
    read_fault,
)
from broker.chaos.script import Script, load_script

GOOD = """
seed = 7

[[fault]]          # every two seconds
kind = "cut"
every = 2
connections = "one"

[[fault]]
kind = "throttle"
at = 10
for = 5.5
bytes_per_s = 1000
direction = "down"
"""


def load(tmp_path: Path, text: str, name: str = "script.toml") -> Script:
    path = tmp_path / name
    path.write_text(text)
    return load_script(path)


def test_a_script_in_toml(tmp_path: Path) -> None:
    throttle = Fault(Kind.THROTTLE, Direction.DOWN, for_s=5.5, bytes_per_s=1000.0)
    script = load(tmp_path, GOOD)
    assert script.seed == 7
    assert script.rules == (
        Rule(Fault(Kind.CUT, connections=Which.ONE), every_s=2.0),
        Rule(throttle, at_s=10.0),
    )


def test_the_same_in_json(tmp_path: Path) -> None:
    text = '{"fault": [{"kind": "corrupt", "per_mib": 0.5}]}'
    script = load(tmp_path, text, "script.json")
    assert (script.seed, script.rules) == (None, (Rule(Fault(Kind.CORRUPT), per_mib=0.5),))


def test_a_fault_is_described_as_it_is_read() -> None:
    said = {"kind": "stall", "for": 2.0, "direction": "up", "connections": "newest", "pair": 2}
    assert describe(read_fault(said)) == said
    assert describe(read_fault({"kind": "cut"})) == {"kind": "cut"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ('kind = "crash"', "fault 2, line 7: 'kind' is 'crash'; it must be one of cut, stall, "),
        ("every = 0", "fault 2, line 7: 'every' is 0; it must be a number from 0.001 to"),
        ('every = "2"', "fault 2, line 7: 'every' is '2'; it must be a number"),
        ("at = true", "'at' is True; it must be a number"),
        ("at = nan", "'at' is nan; it must be a number"),
        ('direction = "left"', "line 7: 'direction' is 'left'; it must be one of up, down, both"),
        ("pair = 0", "line 7: 'pair' is 0; it must be an integer from 1"),
        ("colour = 1", "line 7: there is no field 'colour'; allowed are at, every, per_s"),
        ('how = "fin"', "line 7: 'how' means nothing for a stall, only for cut, truncate"),
        ("per_s = 1", "line 7: say when: 'at' and/or 'every' (seconds), or 'per_s', or 'per_mib'"),
        ("every = 3", "line 5: a stall that comes again needs 'for' (seconds)"),
    ],
)
def test_a_wrong_field_is_named_with_its_line_and_what_is_allowed(
    tmp_path: Path, line: str, wanted: str
) -> None:
    kind = [] if line.startswith("kind") else ['kind = "stall"']
    lines = ["[[fault]]", 'kind = "cut"', "at = 1", "", "[[fault]]", *(kind or ["at = 1"]), line]
    if not line.startswith(("at", "every")) and kind:
        lines.append("at = 1")
    with pytest.raises(ChaosError) as error:
        load(tmp_path, "\n".join(lines))
    assert wanted in str(error.value)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("[[fault]\n", "at line 1"),
        ("speed = 1", "there is no field 'speed'; allowed are 'fault' and 'seed'"),
        ("seed = 1", "'fault' must be a list of faults: write [[fault]] above each"),
        ("fault = 3", "'fault' must be a list of faults"),
        ("fault = [3]", "fault 1: a fault is a table of fields, not 3"),
        ('seed = "x"\n[[fault]]', "'seed' is 'x'; it must be an integer"),
        ("[[fault]]\nat = 1", "fault 1, line 1: 'kind' is missing; it must be one of cut, "),
        ('[[fault]]\nkind = "cut"', "fault 1, line 1: say when"),
        ('[[fault]]\nkind = "throttle"\nat = 1', "line 2: a throttle needs 'bytes_per_s'"),
        ('[[fault]]\nkind = "delay"\nat = 1', "line 2: a delay needs 'delay_s' or 'jitter_s'"),
        ('[[fault]]\nkind = "refuse"\nper_s = 1', "line 3: refuse strikes no connection"),
        (
            '[[fault]]\nkind = "cut"\nper_s = 1\nconnections = "one"',
            "line 4: 'per_s' strikes each connection by its own chance",
        ),
    ],
)
def test_a_wrong_script_says_what_is_wrong(tmp_path: Path, text: str, wanted: str) -> None:
    with pytest.raises(ChaosError) as error:
        load(tmp_path, text)
    assert wanted in str(error.value)


def test_a_script_that_is_not_there_or_no_text(tmp_path: Path) -> None:
    with pytest.raises(ChaosError, match="cannot read the script"):
        load_script(tmp_path / "nothing.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ChaosError, match="cannot read the script"):
        load_script(tmp_path / "bytes.toml")
