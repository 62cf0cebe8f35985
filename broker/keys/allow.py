"""Whom a broker lets in: public keys by role, from files that may change while it runs."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from broker.keys.files import KeyFileError, PublicKey, Role, parse_public, read_text
from broker.logs import log

_logger = logging.getLogger("draftmq.allow")


def parse_list(text: str, where: str) -> list[PublicKey]:
    """The keys of an allow-list: one a line; empty lines and ``#`` lines are comments."""
    lines = enumerate(text.splitlines(), 1)
    return [
        parse_public(line, f"{where}, line {number},")
        for number, line in lines
        if line.strip() and not line.lstrip().startswith("#")
    ]


class AllowList:
    """Public keys from files of lines and from directories of ``*.public`` files.

    Raises :class:`KeyFileError` for what cannot be read. A later :meth:`reread` that fails leaves
    the keys as they were.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self._paths = [Path(path) for path in paths]
        self._seen: object = None
        self._keys: dict[tuple[Role, str], PublicKey] = {}
        self.reread()

    def __len__(self) -> int:
        return len(self._keys)

    def __iter__(self) -> Iterator[PublicKey]:
        return iter(self._keys.values())

    def find(self, role: Role, key: bytes) -> PublicKey | None:
        """The entry for this public key (32 bytes) in this role."""
        listed = self._keys.get((role, PublicKey(role, "", key).fingerprint))
        return listed if listed is not None and listed.key == key else None

    def has(self, role: Role, fingerprint: str) -> bool:
        return (role, fingerprint) in self._keys

    def roles(self, key: bytes) -> list[Role]:
        """The roles in which this public key is listed."""
        return [role for role in Role if self.find(role, key) is not None]

    def changed(self) -> bool:
        """Whether a file has changed, come or gone since the keys were last read."""
        return self._state() != self._seen

    def refresh(self, *, forced: bool = False) -> bool:
        """Read the files again if they changed; whether they did. Bad ones change nothing."""
        if not (forced or self.changed()):
            return False
        try:
            self.reread()
        except KeyFileError as error:
            log(_logger, "error", "allow_list_kept", {"error": str(error)})
            return False
        log(_logger, "info", "allow_list_read", {"keys": len(self)})
        return True

    def reread(self) -> None:
        """Read all files again; the new keys hold from now on, or none of them."""
        self._seen = self._state()
        keys: dict[tuple[Role, str], PublicKey] = {}
        owners: dict[str, PublicKey] = {}
        for path in self._files(strict=True):
            for key in parse_list(read_text(path), str(path)):
                if key.role is Role.BROKER:
                    continue  # it may lie beside the others
                other = owners.setdefault(key.fingerprint, key)
                if other.key != key.key:
                    raise KeyFileError(
                        f"{path}: the keys {other.name!r} and {key.name!r} both begin with "
                        f"{key.fingerprint}, so their holders' names could be confused; one of "
                        "them was made to: remove it"
                    )
                keys[key.role, key.fingerprint] = key
        self._keys = keys

    def _files(self, *, strict: bool) -> list[Path]:
        files = []
        for path in self._paths:
            if path.is_dir():
                files += sorted(path.glob("*.public"))
            elif strict and not path.exists():
                raise KeyFileError(
                    f"there is no allow-list at {path}; give a file of public keys, one a line, "
                    "or a directory of .public files"
                )
            else:
                files.append(path)
        return files

    def _state(self) -> object:
        return [(str(path), _stamp(path)) for path in self._files(strict=False)]


def _stamp(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
