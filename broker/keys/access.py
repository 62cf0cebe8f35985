"""Who may connect to a broker, and where it may listen."""

from __future__ import annotations

import os
import resource
from collections.abc import Sequence

from broker.core import Side
from broker.errors import BrokerError
from broker.keys.addresses import is_local
from broker.keys.allow import AllowList
from broker.keys.files import KeyFileError, PublicKey, Role, SecretKey, read_secret, require_curve
from broker.keys.zap import Refusal
from broker.transport.sockets import Curve

ROLES = {Side.CLIENT: Role.TRAINER, Side.WORKER: Role.WORKER}
#: How often files of keys are looked at.
REREAD_S = 2.0
#: Descriptors that are not connections of peers: files, HTTP, libzmq's own.
_RESERVED_DESCRIPTORS = 192


class Access:
    """The broker's own key and its allow-list; without them, nobody is asked who they are."""

    def __init__(
        self,
        key: str | os.PathLike[str] | None = None,
        allow: Sequence[str | os.PathLike[str]] = (),
        *,
        insecure: bool = False,
    ) -> None:
        self._insecure = insecure
        self._secret: SecretKey | None = None
        self._allowed: AllowList | None = None
        if key is None and not allow:
            return
        if key is None or not allow:
            missing = "--key (the broker's own)" if key is None else "--allow (whom to let in)"
            raise KeyFileError(f"a key needs its counterpart: {missing} is missing")
        require_curve()
        self._secret = read_secret(key, Role.BROKER)
        self._allowed = AllowList(allow)

    @property
    def keyed(self) -> bool:
        """Whether peers need keys."""
        return self._secret is not None

    def curve(self, side: Side) -> Curve | None:
        """What the socket for ``side`` speaks with."""
        if self._secret is None:
            return None
        return Curve(self._secret.public.key, self._secret.key, domain=side.value)

    def find(self, domain: str, key: bytes) -> PublicKey | None:
        """The entry of a key that may connect to the side called ``domain``."""
        return self._allowed.find(ROLES[Side(domain)], key) if self._allowed else None

    def has(self, side: Side, fingerprint: str) -> bool:
        """Whether a key that once connected still may."""
        return self._allowed is None or self._allowed.has(ROLES[side], fingerprint)

    def explain(self, refusal: Refusal) -> str:
        """Why a key was refused, for the log."""
        role = ROLES[Side(refusal.domain)]
        roles = self._allowed.roles(refusal.key) if self._allowed else []
        if roles:
            return f"it is allowed as {roles[0].value}, and this is the port for {role.value}s"
        return "it is not on the allow-list"

    def reread(self, *, forced: bool = False) -> bool:
        """Read the allow-list again if it changed; whether it did. A bad one changes nothing."""
        return self._allowed is not None and self._allowed.refresh(forced=forced)

    def check_ports(self, *addresses: str) -> None:
        """Raises :class:`BrokerError` for an address that strangers reach and nothing guards."""
        for address in addresses:
            if not (self._insecure or self.keyed or is_local(address)):
                raise BrokerError(
                    f"{address!r} can be reached from other machines, unencrypted and by anyone; "
                    "give --key and --allow (draftmq keygen makes keys), listen on 127.0.0.1, or "
                    "say --insecure where the network itself keeps strangers out"
                )


def max_connections() -> int:
    """Connections that this process has descriptors for, with some to spare."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(soft, 1 << 20) - _RESERVED_DESCRIPTORS)


def raise_descriptor_limit() -> None:
    """Take all the descriptors that this process may have: each peer costs one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
