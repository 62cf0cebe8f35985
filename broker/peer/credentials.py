"""What a worker or a trainer shows to brokers, and how it knows them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from broker.errors import BrokerError
from broker.keys.addresses import connecting, is_local
from broker.keys.files import KeyFileError, PublicKey, Role, read_public, read_secret, require_curve
from broker.transport.sockets import Curve

#: A file, or for a public key its text.
KeyLike = str | os.PathLike[str]
_COMMANDS = {Role.TRAINER: "TRAIN", Role.WORKER: "WORKER"}


@dataclass(frozen=True)
class Credentials:
    """``curves`` has the keys for each endpoint; without any, connections are not encrypted."""

    fingerprint: str = ""
    curves: Mapping[str, Curve] = field(default_factory=dict)


def credentials(
    role: Role,
    endpoints: Sequence[str],
    key: KeyLike | None,
    broker_key: KeyLike | Sequence[KeyLike] | None,
    logger: logging.Logger,
) -> Credentials:
    """Read the keys of a peer: its own secret, and one public key for all brokers or one for each.

    What is None comes from ``DRAFTMQ_TRAIN_KEY`` and ``DRAFTMQ_TRAIN_BROKER_KEY`` (``_WORKER_`` for
    a worker). Without keys, an endpoint on another machine is worth a warning and no more: whether
    strangers are kept out is decided where the broker listens, and there it had to be said aloud.
    Raises :class:`KeyFileError`.
    """
    for endpoint in endpoints:
        connecting(endpoint)
    prefix = f"DRAFTMQ_{_COMMANDS[role]}"
    key = key or os.environ.get(f"{prefix}_KEY")
    broker_key = broker_key or os.environ.get(f"{prefix}_BROKER_KEY", "").split()
    brokers = [broker_key] if isinstance(broker_key, str | os.PathLike) else list(broker_key)
    if not key and not brokers:
        _warn(endpoints, logger)
        return Credentials()
    if not key or not brokers:
        missing = "--broker-key (the broker's public key)" if key else f"--key (a {role.value}'s)"
        raise KeyFileError(f"a key needs its counterpart: {missing} is missing")
    require_curve()
    secret = read_secret(key, role)
    public = secret.public
    servers = _one_for_each(endpoints, [_of_broker(item) for item in brokers])
    curves = {
        endpoint: Curve(public.key, secret.key, server.key)
        for endpoint, server in zip(endpoints, servers, strict=True)
    }
    return Credentials(public.fingerprint, curves)


def _of_broker(item: KeyLike) -> PublicKey:
    key = read_public(item)
    if key.role is not Role.BROKER:
        raise KeyFileError(
            f"--broker-key is the public key of the {key.role.value} {key.name!r}; the broker's "
            "own is needed (draftmq keygen --role broker)"
        )
    return key


def _one_for_each(endpoints: Sequence[str], servers: Sequence[PublicKey]) -> Sequence[PublicKey]:
    if len(servers) == 1:
        return list(servers) * len(endpoints)
    if len(servers) != len(endpoints):
        raise KeyFileError(
            f"{len(servers)} keys of brokers for {len(endpoints)} brokers; give one for all, or "
            "one for each, in the same order"
        )
    return servers


def _warn(endpoints: Sequence[str], logger: logging.Logger) -> None:
    for endpoint in endpoints:
        try:
            local = is_local(endpoint)
        except BrokerError:
            continue  # the socket says it better
        if not local:
            why = "no --key is given: whoever is on the way can read and change what is sent"
            logger.warning("unencrypted", extra={"fields": {"endpoint": endpoint, "why": why}})
