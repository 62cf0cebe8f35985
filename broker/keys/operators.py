"""Who may look at an HTTP port: operators only, where other machines reach it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import click

from broker.errors import BrokerError
from broker.keys.addresses import is_local
from broker.keys.allow import AllowList
from broker.keys.files import KeyFileError, PublicKey, Role, SecretKey, parse, require_curve


def guards(address: str, allowed: Iterable[PublicKey], *, insecure: bool) -> bool:
    """Whether HTTP at ``HOST:PORT`` wants an operator's key.

    Raises :class:`BrokerError` where it should and no operator is among ``allowed``.
    """
    if insecure or is_local(f"tcp://{address}"):
        return False
    if not any(key.role is Role.OPERATOR for key in allowed):
        raise BrokerError(
            f"'{address}' can be reached from other machines, and anyone could look; put an "
            "operator's key on the --allow list (draftmq keygen --role operator), listen on "
            "127.0.0.1, or say --insecure where the network itself keeps strangers out"
        )
    return True


def admits(allowed: AllowList, token: str) -> bool:
    """Whether this is the secret key of an operator on the list."""
    try:
        key = parse(token, "the token")
    except KeyFileError:
        return False
    if not isinstance(key, SecretKey):
        return False
    return allowed.find(Role.OPERATOR, key.public.key) is not None


def door(
    address: str, allow: Sequence[str | os.PathLike[str]], *, insecure: bool
) -> Callable[[str], bool] | None:
    """What decides at the HTTP port of a worker or a trainer; None where everyone may look.

    ``allow`` are files or directories of public keys, read again when they change. Raises
    :class:`BrokerError` as :func:`guards` does, and for keys that cannot be read.
    """
    allowed = AllowList(allow)
    if not guards(address, allowed, insecure=insecure):
        return None
    require_curve()

    def admits_now(token: str) -> bool:
        allowed.refresh()
        return admits(allowed, token)

    return admits_now


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options ``--allow`` and ``--insecure`` of a command that has ``--http``."""
    for option in (
        click.option(
            "--insecure", is_flag=True, help="Show --http to anyone, where other machines reach it."
        ),
        click.option(
            "--allow",
            multiple=True,
            type=click.Path(path_type=Path),
            help="Operators' public keys: who may look at --http where other machines reach it.",
        ),
    ):
        command = option(command)
    return command
