"""Why nothing happens, in words for the user."""

from __future__ import annotations

from broker.peer.link import Link, LinkState


def trouble(link: Link, now: float) -> str:
    """Why this broker gives no answer, or nothing."""
    if link.state is LinkState.REFUSED:
        return f"the broker at {link.endpoint} refused this client"
    if link.trouble:
        return link.trouble
    if not link.ready:
        down_s = now - link.down_since
        return f"no broker answers at {link.endpoint} ({down_s:.0f} s); is it running?"
    if link.workers == 0:
        return f"the broker at {link.endpoint} has no worker for this; start a draftmq worker"
    return ""
