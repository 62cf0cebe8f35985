"""The directory of a run: one process writes there; a resumed run goes on with what it finds."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from trainer_client.drafts import checkpoint
from trainer_client.drafts.checkpoint import Checkpoint
from trainer_client.training import identity
from trainer_client.training.identity import RunError


@dataclass(frozen=True)
class Found:
    """What a resumed run goes on with; all of it is empty for a run that begins."""

    #: ``run.json``
    identity: Mapping[str, Any] | None = None
    #: of the newest checkpoint; 0 where there is none
    step: int = 0
    #: its vocabulary: target ids, int64 [D]
    selected_token_ids: Tensor | None = None
    newest: Checkpoint | None = None


def check_writable(output: Path) -> None:
    """Raise :class:`RunError` where ``output`` cannot be written, or made; nothing is made here."""
    there = next(each for each in (output, *output.resolve().parents) if each.exists())
    if not there.is_dir():
        raise RunError(f"cannot write to --output {output}: {there} is a file")
    if not os.access(there, os.W_OK | os.X_OK):
        raise RunError(f"cannot write to --output {output}: {there} is read-only for this user")


@contextlib.contextmanager
def held(output: Path) -> Iterator[None]:
    """Be the only process that trains into ``output``, which is made where it is missing.

    Raises :class:`RunError` where another one does, or where nothing can be written. A file system
    without locks is trusted.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        directory = os.open(output, os.O_RDONLY)
    except OSError as error:
        raise RunError(f"cannot write to --output {output}: {error.strerror}") from error
    try:
        check_writable(output)
        try:
            fcntl.flock(directory, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"another process trains into {output} right now; stop it first, or choose another "
                "--output"
            ) from None
        except OSError:  # NFS and the like
            pass
        yield
    finally:
        os.close(directory)  # and the lock with it


def look(output: Path, *, resume: bool) -> Found:
    """What lies in ``output``. Raises :class:`RunError` where a new run would mix with an old one,
    and :class:`trainer_client.drafts.checkpoint.CheckpointError` for a damaged checkpoint.
    """
    there = identity.check_place(output, resume=resume)
    found = checkpoint.complete(output / "checkpoints") if resume else []
    if not found:
        return Found(there)
    newest = found[-1]
    return Found(there, newest.step, newest.selected_token_ids(), newest)
