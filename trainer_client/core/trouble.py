"""Why nothing happens, in words for the user."""

from __future__ import annotations

from broker.peer.link import Link


def trouble(link: Link, now: float, offer: str = "") -> str:
    """Why this broker gives no answer to a request that names ``offer``, or nothing."""
    if not link.ready or link.trouble:
        return link.why_not_ready(now) or link.trouble
    if not link.may_serve(offer):
        return (
            f"the workers at {link.endpoint} serve other models just now; its own (offer "
            f"{offer[:8]}) is waited for"
        )
    if link.workers == 0 and link.offers:
        return f"no worker at {link.endpoint} serves the model that is asked for; is --model right?"
    if link.workers == 0:
        return f"the broker at {link.endpoint} has no worker for this; start a draftmq worker"
    return ""
