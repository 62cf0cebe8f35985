"""Which of two lives of one peer is the newer one, without any clock.

A life that comes for the first time has just begun: it is newer than the one that is there. The
broker numbers lives in the order in which they first come, and each says its number whenever it
says hello again, also to a broker that was restarted and knows nobody. So a life that comes back
is never taken for a new one.
"""

from __future__ import annotations

from typing import Protocol, Union

from broker.protocol import messages as m

#: Lives that a session has followed and that are still known for it.
_MAX_REPLACED = 16


class Life(Protocol):
    """What a session knows of the life that it belongs to."""

    incarnation: int
    admission: m.Admission
    replaced: tuple[int, ...]


Hello = Union[m.ClientHello, m.WorkerHello]  # noqa: UP007


def is_older(hello: Hello, session: Life, broker: str) -> bool:
    """Whether ``hello`` is said by a life that came before that of ``session``, at this ``broker``.

    Of two lives from before a restart the numbers tell, if one broker gave both; else the one that
    is there stays.
    """
    if hello.incarnation == session.incarnation:
        return False
    if hello.incarnation in session.replaced:  # the welcome that told it its number was lost
        return True
    if hello.admission is None:
        return False
    if hello.admission.broker == session.admission.broker:
        return hello.admission.number < session.admission.number
    return hello.admission.broker != broker


def replaced(hello: Hello, session: Life | None) -> tuple[int, ...]:
    """The lives that the one that says ``hello`` has followed, where ``session`` was its name's."""
    if session is None:
        return ()
    if session.incarnation == hello.incarnation:
        return session.replaced
    return (*session.replaced, session.incarnation)[-_MAX_REPLACED:]


def fenced(name: str, old: int, new: int) -> m.Refused:
    """What the older of two lives of one peer, given by their incarnations, is told."""
    text = (
        f"{name} said hello with incarnation {new} here; incarnation {old} is fenced off: two "
        "processes use one name, or this one is a leftover"
    )
    return m.Refused("fenced", text)
