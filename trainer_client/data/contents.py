"""Hashes of files' content, remembered as long as the disk says that a file is the same."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from pathlib import Path

from trainer_client.errors import DataError

#: A file that changed so shortly before it was read may change again with the same time on it.
_SETTLED_NS = 100_000_000


class Contents:
    """Content hashes, in a directory of notes; without one, nothing is remembered."""

    def __init__(self, notes: Path | None = None) -> None:
        self._notes = notes

    def hash(self, path: Path) -> str:
        """A hash of the file's bytes (blake2b, 16 bytes), read only where it is not known.

        Raises :class:`DataError` for a file that cannot be read.
        """
        try:
            stat = path.stat()
            facts = [stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns]
            known = self._read(path)
            if known.get("facts") == facts:
                return str(known["content"])
            settled = time.time_ns() - stat.st_ctime_ns > _SETTLED_NS
            content = content_hash(path)
            if settled:
                self._write(path, {"facts": facts, "content": content, "path": str(path)})
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from None
        return content

    def _note(self, path: Path) -> Path | None:
        name = hashlib.blake2b(os.fsencode(path.resolve()), digest_size=16).hexdigest()
        return None if self._notes is None else self._notes / f"{name}.json"

    def _read(self, path: Path) -> Mapping[str, object]:
        note = self._note(path)
        try:
            said = json.loads(note.read_text()) if note is not None else {}
        except (OSError, ValueError):
            return {}
        return said if isinstance(said, dict) else {}

    def _write(self, path: Path, said: Mapping[str, object]) -> None:
        note = self._note(path)
        if note is None:
            return
        unfinished = note.with_name(f".{note.name}-{os.getpid()}")
        try:
            note.parent.mkdir(parents=True, exist_ok=True)
            unfinished.write_text(json.dumps(said))
            unfinished.replace(note)
        except OSError:  # it is read again the next time
            unfinished.unlink(missing_ok=True)


def content_hash(path: Path) -> str:
    """A hash of a file's bytes. Raises :class:`OSError`."""
    content = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
    return content.hexdigest()
