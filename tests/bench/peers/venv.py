"""Virtual environments of peers, made when they are first wanted."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.bench.lines import Progress

#: Of one ``pip install``; torch is large.
_INSTALL_S = 900.0


def python_of(
    directory: Path, installs: Sequence[Sequence[str]], progress: Progress
) -> Path | None:
    """The interpreter of the environment at ``directory``, after each of ``installs`` in turn.

    None where a package is not to be had; ``progress`` is told why, and the next run tries again.
    """
    python = directory / "bin" / "python"
    complete = directory / "complete"
    if complete.exists():
        return python
    progress(f"installing {directory.name} into {directory}, once")
    shutil.rmtree(directory, ignore_errors=True)
    steps = [[sys.executable, "-m", "venv", str(directory)]]
    steps += [[str(python), "-m", "pip", "install", "-q", *names] for names in installs]
    for step in steps:
        try:
            subprocess.run(step, check=True, capture_output=True, text=True, timeout=_INSTALL_S)
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip().splitlines() or [str(error)])[-1]
            progress(f"{directory.name} cannot be measured here: {reason}")
            return None
        except (OSError, subprocess.TimeoutExpired) as error:
            progress(f"{directory.name} cannot be measured here: {error}")
            return None
    complete.touch()
    return python
