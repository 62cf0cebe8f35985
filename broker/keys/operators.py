"""Who may look at an HTTP port: whoever holds its token, where other machines reach it.

HTTP has no CURVE, so operators have a credential of their own. A token opens a port that can be
looked at and nothing else: whoever steals it reads names and counters.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from broker.errors import BrokerError
from broker.keys.addresses import http
from broker.keys.files import KeyFileError, create, read_secret_text

#: What a token may be: long enough not to be guessed, and plain in an HTTP header.
_TOKEN = re.compile(r"[!-~]{16,512}", re.ASCII)
#: In place of a token's file: everyone may look.
NOBODY_ASKED = "none"


def read_token(path: str | os.PathLike[str]) -> str:
    """The token in a file that its owner alone can read. Raises :class:`KeyFileError`."""
    token = read_secret_text(Path(path)).strip()
    if not _TOKEN.fullmatch(token):
        raise KeyFileError(
            f"{path} holds no token: one line of 16 to 512 printable characters without spaces; "
            "draftmq keygen --role operator makes one"
        )
    return token


def write_token(directory: Path, name: str) -> Path:
    """Write a new token to ``NAME.token`` (mode 0600). Raises :class:`KeyFileError`."""
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / f"{name}.token"
    create(path, secrets.token_urlsafe(32), 0o600)
    return path


def door(
    address: str, token: str | os.PathLike[str] | None, *, insecure: bool = False
) -> Callable[[str], bool] | None:
    """What decides at an HTTP port from the header ``Authorization``; None where everyone may look.

    ``token`` is a token's file, read again at each question, so that a new one counts at once; or
    ``none``. Raises :class:`BrokerError` without one where other machines reach ``address``, and
    :class:`KeyFileError` for a file that cannot be used.
    """
    if insecure or token == NOBODY_ASKED:
        return None
    if token is None:
        if http(address).local:
            return None
        raise BrokerError(
            f"'{address}' can be reached from other machines, and anyone could look; give "
            "--http-token FILE (draftmq keygen --role operator makes one), listen on 127.0.0.1, "
            "or say --http-token none where the network itself keeps strangers out"
        )
    read_token(token)

    def admits(authorization: str) -> bool:
        try:
            return hmac.compare_digest(_shown(authorization).encode(), read_token(token).encode())
        except KeyFileError:
            return False  # a token that is being changed opens nothing

    return admits


def _shown(authorization: str) -> str:
    """The token in a header: as a bearer token, or as a browser's password, whoever the user."""
    scheme, _, credentials = authorization.strip().partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(credentials, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return ""


def _file_or_none(ctx: click.Context, param: click.Parameter, value: str | None) -> Any:
    return value if value in (None, NOBODY_ASKED) else Path(str(value))


#: The option of a command that serves HTTP.
option = click.option(
    "--http-token",
    metavar="FILE",
    callback=_file_or_none,
    help="What --http wants of operators: a token's file; 'none' shows it to anyone.",
)
