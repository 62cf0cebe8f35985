"""How far ahead of the trainer to ask: a depth that grows when it waits, and shrinks again.

Time is counted in results taken, which is the only clock that a depth knows: had a result that
lay ready for two of them been asked for two later, it would still have been there in time.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Taken:
    """The trainer took the oldest result."""

    #: it had to wait for it
    waited: bool
    #: how many results it took while this one lay ready
    lead: int
    #: as many requests were under way as the depth allows; nothing else held them back
    full: bool


class AutoDepth:
    """The smallest depth found at which the trainer does not wait.

    A wait lets it grow by half, then it sees what that brought: a request asked earlier comes to
    the trainer only after all that are under way. Without a wait for a while, half of the takes
    for which even the latest result lay ready are given back. Where something else than the depth
    holds requests back (memory, a broker's window), it does not grow, for it would not help.
    """

    #: Takes without a wait before it shrinks, and at least so many times the depth: the slowest
    #: worker's results come once in a while only.
    PATIENCE = 32
    PATIENCE_DEPTHS = 4
    #: What is left when requests are tiny and no broker says a window.
    MOST = 256

    def __init__(self) -> None:
        #: requests beyond the one that is waited for
        self.depth = 1
        self._calm = 0
        self._least_lead = self.MOST
        #: takes until the last growth can be judged
        self._unjudged = 0

    def handle(self, event: Taken) -> int:
        """Take one observation; gives the depth from now on."""
        self._unjudged = max(0, self._unjudged - 1)
        if event.waited:
            self._rest()
            if event.full and not self._unjudged:
                self.depth = min(self.MOST, self.depth + max(1, self.depth // 2))
                self._unjudged = self.depth
            return self.depth
        self._calm += 1
        self._least_lead = min(self._least_lead, event.lead)
        if self._calm >= max(self.PATIENCE, self.PATIENCE_DEPTHS * self.depth):
            self.depth = max(1, self.depth - self._least_lead // 2)
            self._rest()
        return self.depth

    def _rest(self) -> None:
        self._calm, self._least_lead = 0, self.MOST

    def __repr__(self) -> str:
        return f"<AutoDepth {self.depth} calm={self._calm}>"
