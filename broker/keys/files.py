"""CURVE keys as one line of text each, and the files that hold them.

``draftmq-public:ROLE:NAME:HEX`` may be shown to anyone; ``draftmq-secret:ROLE:NAME:HEX`` belongs in
a file that its owner alone can read. One line holds everything that an allow-list says of a key, so
an allow-list is such lines, and nothing needs quotes in a shell.
"""

from __future__ import annotations

import enum
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path

import zmq
from zmq.utils import z85

from broker.errors import BrokerError

#: Digits of a public key that name it; an allow-list holds no two keys that share them.
FINGERPRINT_DIGITS = 16
#: Longer files are no key files; a list of 4,000 keys fits.
_MAX_FILE_BYTES = 1 << 20
_LINE = re.compile(
    r"draftmq-(?P<kind>public|secret):(?P<role>[a-z]+):(?P<name>[A-Za-z0-9._-]{1,64}):"
    r"(?P<hex>[0-9a-f]{64})",
    re.ASCII,
)


class KeyFileError(BrokerError):
    """A key, a key file or an allow-list that cannot be used; the text says what mends it."""


class Role(enum.Enum):
    """What a key's holder may do."""

    TRAINER = "trainer"
    WORKER = "worker"
    BROKER = "broker"


@dataclass(frozen=True)
class PublicKey:
    """Whom to let in, or which broker to believe; ``key`` is 32 bytes."""

    role: Role
    name: str
    key: bytes

    @property
    def fingerprint(self) -> str:
        return self.key.hex()[:FINGERPRINT_DIGITS]

    def __str__(self) -> str:
        return f"draftmq-public:{self.role.value}:{self.name}:{self.key.hex()}"


@dataclass(frozen=True)
class SecretKey:
    """What proves to be the holder of a public key; ``key`` is 32 bytes."""

    role: Role
    name: str
    key: bytes = field(repr=False)

    @property
    def public(self) -> PublicKey:
        require_curve()
        return PublicKey(self.role, self.name, z85.decode(zmq.curve_public(z85.encode(self.key))))

    @property
    def text(self) -> str:
        """The line that holds it. Not ``str()``, so that no log shows it by accident."""
        return f"draftmq-secret:{self.role.value}:{self.name}:{self.key.hex()}"


def require_curve() -> None:
    """Raises :class:`KeyFileError` where this build of libzmq cannot encrypt."""
    if not zmq.has("curve"):
        raise KeyFileError(
            f"this libzmq ({zmq.zmq_version()}) was built without CURVE, so keys cannot be used; "
            "install pyzmq's wheel from PyPI, which has it"
        )


def generate(role: Role, name: str) -> SecretKey:
    """A new key. Raises :class:`KeyFileError` for a name that a key cannot carry."""
    require_curve()
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name, re.ASCII):
        raise KeyFileError(
            f"a key cannot be called {name!r}; give 1 to 64 letters, digits, '.', '_' and '-'"
        )
    _, secret = zmq.curve_keypair()
    return SecretKey(role, name, z85.decode(secret))


def parse(text: str, where: str) -> PublicKey | SecretKey:
    """Read one line. Raises :class:`KeyFileError` that names ``where`` and never shows the line."""
    found = _LINE.fullmatch(text.strip())
    if found is None:
        raise KeyFileError(
            f"{where} is not a key (draftmq-public:ROLE:NAME:HEX, or draftmq-secret:...); "
            "draftmq keygen makes them"
        )
    try:
        role = Role(found["role"])
    except ValueError:
        known = ", ".join(role.value for role in Role)
        raise KeyFileError(
            f"{where} has the role {found['role']!r}; the roles are {known}"
        ) from None
    make = PublicKey if found["kind"] == "public" else SecretKey
    return make(role, found["name"], bytes.fromhex(found["hex"]))


def parse_public(text: str, where: str) -> PublicKey:
    """As :func:`parse`, and refuses a secret key."""
    key = parse(text, where)
    if isinstance(key, SecretKey):
        raise KeyFileError(
            f"{where} is a secret key, which only its holder may have; give the .public file "
            "beside it, and make a new pair if others have seen this one"
        )
    return key


def read_public(key_or_file: str | os.PathLike[str]) -> PublicKey:
    """A public key, given as its text or as a file."""
    text = os.fspath(key_or_file)
    if text.startswith("draftmq-"):
        return parse_public(text, "the key given")
    return parse_public(read_text(Path(text)), str(key_or_file))


def read_secret(path: str | os.PathLike[str], *roles: Role) -> SecretKey:
    """The secret key in a file, for one of ``roles``.

    Raises :class:`KeyFileError` for a file that others can read, or a key of another role.
    """
    key = parse(read_secret_text(Path(path)), str(path))
    if isinstance(key, PublicKey):
        raise KeyFileError(f"{path} is a public key; give the .secret file of the pair")
    if key.role not in roles:
        wanted = " or ".join(role.value for role in roles)
        raise KeyFileError(
            f"{path} is a key for a {key.role.value}, a key for a {wanted} is needed here "
            f"(draftmq keygen --role {roles[0].value})"
        )
    return key


def write_pair(directory: Path, key: SecretKey) -> tuple[Path, Path]:
    """Write ``NAME.secret`` (mode 0600 from its first instant) and ``NAME.public``.

    Raises :class:`KeyFileError` where one of them exists: a key is never overwritten.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    secret, public = directory / f"{key.name}.secret", directory / f"{key.name}.public"
    create(secret, key.text, 0o600)
    try:
        create(public, str(key.public), 0o644)
    except KeyFileError:
        secret.unlink()
        raise
    return secret, public


def read_text(path: Path) -> str:
    """A key file's text. Raises :class:`KeyFileError`."""
    try:
        with path.open("rb") as file:
            octets = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from None
    if len(octets) > _MAX_FILE_BYTES:
        raise KeyFileError(f"{path} is longer than {_MAX_FILE_BYTES} bytes: no key file is")
    try:
        return octets.decode("ascii")
    except UnicodeDecodeError:
        raise KeyFileError(f"{path} is not a key file: it is not ASCII text") from None


def read_secret_text(path: Path) -> str:
    """As :func:`read_text`, and refuses a file that others can read."""
    _refuse_open_file(path)
    return read_text(path)


def create(path: Path, line: str, mode: int) -> None:
    """Write a line to a new file of this mode. Raises :class:`KeyFileError` where one exists."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    except FileExistsError:
        raise KeyFileError(
            f"{path} exists and is not overwritten: whoever uses that key would be locked out; "
            "give another --name or --output, or remove it yourself"
        ) from None
    except OSError as error:
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from None
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(descriptor)
    except OSError as error:
        path.unlink()
        raise KeyFileError(f"cannot write {path}: {error.strerror}") from None


def _refuse_open_file(path: Path) -> None:
    """As ssh does: nobody else may read it. A group may, if another user (root) owns the file and
    so arranged it: service managers hand out secrets like that.
    """
    try:
        status = path.stat()
    except OSError as error:
        raise KeyFileError(f"cannot read the key file {path}: {error.strerror}") from None
    mode = stat.S_IMODE(status.st_mode)
    forbidden = 0o077 if status.st_uid == os.geteuid() else 0o007
    if mode & forbidden:
        raise KeyFileError(
            f"{path} has mode {mode:04o}, so others can read or change this secret key; "
            f"chmod 600 {path}, and make a new pair if someone may have read it"
        )
