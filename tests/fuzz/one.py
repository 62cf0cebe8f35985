"""Fuzzes one target in this process: ``python -m tests.fuzz.one TARGET [libFuzzer's options]``."""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

#: The packages whose branches guide the fuzzer.
_GUIDES = [
    "broker",
    "worker",
    "trainer_client",
    "tests.fuzz.targets",
    "tests.sim",
    "tomllib",
    "waitress",
]

with atheris.instrument_imports(include=_GUIDES):
    from tests.fuzz.targets import MAX_BYTES, TARGETS


def main() -> None:
    name, *options = sys.argv[1:]
    target = TARGETS[name]
    work = Path("build/fuzz")
    work.mkdir(parents=True, exist_ok=True)
    words = work / f"{name}.words"
    words.write_text("".join(f"{_quoted(word)}\n" for word in target.words))
    seeds = next((Path(option) for option in options if not option.startswith("-")), work)
    for number, seed in enumerate(target.seeds):
        (seeds / f"seed-{number}").write_bytes(seed)
    target.run(b"")  # what is loaded once is loaded now
    more = [f"-max_len={MAX_BYTES}", *([f"-dict={words}"] if target.words else [])]
    atheris.Setup([sys.argv[0], *more, *options], target.run)
    atheris.Fuzz()


def _quoted(word: str) -> str:
    escaped = word.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


if __name__ == "__main__":
    main()
