"""Scripts: a TOML or JSON file that says which faults strike when."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker.chaos.faults import ChaosError, FaultError, Rule, read_rule

_TABLE = re.compile(r"\s*\[\[\s*fault\s*\]\]")


@dataclass(frozen=True)
class Script:
    """What a file said. ``seed`` is None where it said none."""

    rules: tuple[Rule, ...]
    seed: int | None


def load_script(path: Path) -> Script:
    """Read a script. Raises :class:`ChaosError` that names the line or the field."""
    try:
        text = path.read_text(encoding="utf-8")
        said = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ChaosError(f"cannot read the script {path}: {error}") from None
    return _read(said, path, text)


def _read(said: Any, path: Path, text: str) -> Script:
    if not isinstance(said, dict):
        raise ChaosError(f"{path}: a script is a table with 'fault' and perhaps 'seed'")
    if unknown := sorted(set(said) - {"fault", "seed"}):
        raise ChaosError(
            f"{path}: there is no field {unknown[0]!r}; allowed are 'fault' and 'seed'"
        )
    seed, faults = said.get("seed"), said.get("fault", [])
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool)):
        raise ChaosError(f"{path}: 'seed' is {seed!r}; it must be an integer")
    if not isinstance(faults, list) or not faults:
        raise ChaosError(f"{path}: 'fault' must be a list of faults: write [[fault]] above each")
    rules = []
    for number, fault in enumerate(faults, start=1):
        try:
            rules.append(read_rule(fault))
        except FaultError as error:
            where = f"fault {number}"
            if line := _line(text, number, error.field):
                where += f", line {line}"
            raise ChaosError(f"{path}, {where}: {error}") from None
    return Script(tuple(rules), seed)


def _line(text: str, number: int, field: str) -> int:
    """Where the ``number``-th ``[[fault]]`` has this field, or begins; 0 where that is not seen."""
    seen = began = 0
    for at, line in enumerate(text.splitlines(), start=1):
        if _TABLE.match(line):
            seen += 1
            if seen > number:
                break
            began = at
        elif seen == number and field and re.match(rf"\s*[\"']?{re.escape(field)}[\"']?\s*=", line):
            return at
    return began if seen >= number else 0
