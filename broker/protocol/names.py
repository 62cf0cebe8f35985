"""Names of peers under keys: whose a name is can be seen from the name itself.

A peer with a key calls itself ``NAME@FINGERPRINT``; the broker knows the fingerprint from the
connection and refuses a hello in a name of another's. So a name belongs to its key for ever, also
across a restart of the broker, which forgets who was there.
"""

from __future__ import annotations

import hashlib
import secrets

from broker.protocol.limits import MAX_NAME_BYTES

_DIGEST_CHARACTERS = 16


def bounded(name: str) -> str:
    """``name`` as it may travel: a long one, as a path may be, keeps its end and tells its hash."""
    octets = name.encode(errors="replace")
    if len(octets) <= MAX_NAME_BYTES:
        return octets.decode()
    digest = hashlib.blake2b(octets, digest_size=_DIGEST_CHARACTERS // 2).hexdigest()
    end = octets[-(MAX_NAME_BYTES - _DIGEST_CHARACTERS - 8) :].decode(errors="ignore")
    return f"{digest}...{end}"


def new_incarnation() -> int:
    """What tells one life of a peer from all others. Chance, not a clock: clocks are set back."""
    return secrets.randbits(62)


def own_name(name: str, fingerprint: str) -> str:
    """``name`` as the holder of a key says it; as it is without one."""
    return f"{name}@{fingerprint}" if fingerprint else name


def owns(name: str, fingerprint: str) -> bool:
    """Whether the holder of the key may say hello as ``name``; anyone may without keys."""
    return not fingerprint or name.endswith(f"@{fingerprint}")
