"""Coverage-guided fuzzing: ``python -m tests.fuzz [--seconds 60] [TARGET ...]``.

Begins with the seeds and with ``corpus/TARGET``; what fails is kept in ``crashes/TARGET``, where
``test_corpus.py`` replays it ever after. With ``--keep`` a minimal corpus is written back.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
WORK = Path("build/fuzz")
_LIMITS = ["-timeout=10", "-rss_limit_mb=4096", "-print_final_stats=1", "-verbosity=1"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="default: all")
    parser.add_argument("--seconds", type=int, default=60, help="for all targets together")
    parser.add_argument("--keep", action="store_true", help="write a minimal corpus back")
    asked = parser.parse_args()
    names = asked.targets or _names()
    each = max(1, asked.seconds // len(names))
    failed = [name for name in names if not _fuzz(name, each)]
    if asked.keep:
        for name in names:
            _keep(name)
    for name in failed:
        print(f"{name}: FAILED; the input is in {HERE / 'crashes' / name}")
    return 1 if failed else 0


def _names() -> list[str]:
    from tests.fuzz.targets import TARGETS

    return list(TARGETS)


def _fuzz(name: str, seconds: int) -> bool:
    """Fuzz one target in a process of its own; False when it failed."""
    crashes = HERE / "crashes" / name
    crashes.mkdir(parents=True, exist_ok=True)
    arguments = [f"-max_total_time={seconds}", f"-artifact_prefix={crashes}/", *_LIMITS]
    done = _run(name, [*arguments, str(WORK / name), str(HERE / "corpus" / name)])
    statistics = [line for line in done.stderr.splitlines() if "number_of_executed" in line]
    print(f"{name}: {' '.join(statistics) or 'no statistics'}", flush=True)
    if done.returncode:
        print(_story(done.stderr))
    if not any(crashes.iterdir()):
        crashes.rmdir()
    return done.returncode == 0


def _story(said: str) -> str:
    """What went wrong, without libFuzzer's preamble."""
    return "\n".join(line for line in said.splitlines() if not line.startswith("INFO:"))[-4000:]


def _keep(name: str) -> None:
    """The fewest inputs that reach what all inputs reach."""
    corpus = HERE / "corpus" / name
    fresh = WORK / f"{name}.min"
    fresh.mkdir(parents=True, exist_ok=True)
    _run(name, ["-merge=1", str(fresh), str(WORK / name), str(corpus)])
    for old in corpus.glob("*"):
        old.unlink()
    for path in sorted(fresh.iterdir(), key=lambda path: path.stat().st_size)[:60]:
        path.rename(corpus / path.name)


def _run(name: str, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    for folder in (WORK / name, HERE / "corpus" / name):
        folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tests.fuzz.one", name, *arguments]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, errors="replace")


if __name__ == "__main__":
    sys.exit(main())
