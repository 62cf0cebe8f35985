"""Keys of a test: made on demand, allowed unless said otherwise."""

from __future__ import annotations

from pathlib import Path

from broker.keys.files import Role, generate, write_pair


class Keyring:
    """Keys in a directory, and beside it the directory of those that are allowed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.allow = path / "allow"
        self.allow.mkdir()
        self.broker = self.make("broker", Role.BROKER, allowed=False)
        self.broker_public = path / "broker.public"

    def make(self, name: str, role: Role, *, allowed: bool = True) -> Path:
        """The secret key's file of a new key."""
        secret, public = write_pair(self._path, generate(role, name))
        if allowed:
            self.allow_again(name, public)
        return secret

    def allow_again(self, name: str, public: Path | None = None) -> None:
        """Put a key on the allow-list."""
        text = (public or self._path / f"{name}.public").read_text()
        (self.allow / f"{name}.public").write_text(text)

    def revoke(self, name: str) -> None:
        (self.allow / f"{name}.public").unlink()

    def fingerprint(self, name: str) -> str:
        return (self._path / f"{name}.public").read_text().strip().rpartition(":")[2][:16]
