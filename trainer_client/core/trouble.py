"""Why nothing happens, in words for the user."""

from __future__ import annotations

from broker.peer.link import Link, LinkState


def trouble(link: Link, now: float, offer: str = "") -> str:
    """Why this broker gives no answer to a request that names ``offer``, or nothing."""
    if link.state is LinkState.REFUSED:
        return f"the broker at {link.endpoint} refused this client"
    if link.trouble:
        return link.trouble
    if not link.ready:
        down_s = now - link.down_since
        return f"no broker answers at {link.endpoint} ({down_s:.0f} s); is it running?"
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
