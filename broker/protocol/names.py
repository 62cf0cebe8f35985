"""Names of peers under keys: whose a name is can be seen from the name itself.

A peer with a key calls itself ``NAME@FINGERPRINT``; the broker knows the fingerprint from the
connection and refuses a hello in a name of another's. So a name belongs to its key for ever, also
across a restart of the broker, which forgets who was there.
"""

from __future__ import annotations


def own_name(name: str, fingerprint: str) -> str:
    """``name`` as the holder of a key says it; as it is without one."""
    return f"{name}@{fingerprint}" if fingerprint else name


def owns(name: str, fingerprint: str) -> bool:
    """Whether the holder of the key may say hello as ``name``; anyone may without keys."""
    return not fingerprint or name.endswith(f"@{fingerprint}")
