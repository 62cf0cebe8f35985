"""Names of hosts: looked up in threads of our own, and their addresses tried in turn.

libzmq looks names up in the one thread that moves the bytes of all its connections, and tries the
first address only; one silent name server would stop every connection of a process.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence

#: Patience with a name server; the C library's own is 5 s for each try.
LIMIT_S = 5.0
#: Questions about one name that may be open at once, for a name server that came back.
_MOST_OPEN = 2


class Lookup:
    """Looks one host up, each time in a thread of its own, which nobody waits for.

    ``wake`` is called from there when :meth:`take` has an answer.
    """

    def __init__(self, host: str, wake: Callable[[], None]) -> None:
        self.host = host
        self._wake = wake
        self._lock = threading.Lock()
        self._answer: tuple[list[str], str] | None = None
        self._open = 0
        self._asked_at = 0.0

    def ask(self, now: float) -> str:
        """Begin to look up; why there is no answer, where there is none for too long."""
        with self._lock:
            late = self._open > 0 and now - self._asked_at >= LIMIT_S
            if self._open and not (late and self._open < _MOST_OPEN):
                return self._silence() if late else ""
            self._open += 1
        self._asked_at = now
        try:
            threading.Thread(target=self._look, name=f"lookup {self.host}", daemon=True).start()
        except RuntimeError as error:  # no thread is to be had
            with self._lock:
                self._open -= 1
            return f"the name {self.host!r} cannot be looked up: {error}"
        return self._silence() if late else ""

    def take(self) -> tuple[list[str], str] | None:
        """The addresses that came since this was asked last, or none and why."""
        with self._lock:
            answer, self._answer = self._answer, None
        return answer

    def _silence(self) -> str:
        return (
            f"no name server answers for {self.host!r} within {LIMIT_S:g} s; look at this host's "
            "DNS, or give the broker's IP address"
        )

    def _look(self) -> None:
        try:
            answer = addresses_of(self.host), ""
        except OSError as error:
            why = error.strerror or str(error)
            answer = [], f"the name {self.host!r} has no address here ({why}); is it right?"
        except UnicodeError as error:  # of no name at all: a label is empty, or too long
            answer = [], f"{self.host!r} is no name of a host: {error}"
        with self._lock:
            self._open -= 1
            self._answer = answer
        self._wake()


def addresses_of(host: str) -> list[str]:
    """The IP addresses of a host, in the order of the system's preference. It may take long.

    Raises ``OSError`` and ``UnicodeError``.
    """
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


class Route:
    """The addresses of one host in turn: first the one that worked last, each once a round."""

    #: What an address that says nothing has, before the next is tried; what it has at the most.
    FIRST_S, LAST_S = 1.0, 5.0

    def __init__(self, addresses: Sequence[str] = ()) -> None:
        self.addresses = list(addresses)
        #: the one that is tried, or works
        self.current = ""
        self._worked = ""
        self._tried: set[str] = set()
        self.patience_s = self.FIRST_S

    def found(self, addresses: Sequence[str]) -> None:
        """The host has these addresses now."""
        self.addresses = list(addresses)

    def next(self) -> str:
        """The address to be tried now, or "" without any."""
        if self.round_over and self._tried:
            self._tried.clear()
            self.patience_s = min(2 * self.patience_s, self.LAST_S)
        left = [address for address in self.addresses if address not in self._tried]
        self.current = self._worked if self._worked in left else next(iter(left), "")
        self._tried.add(self.current)
        return self.current

    def worked(self) -> None:
        """A broker answers at the current address."""
        self._worked = self.current
        self._tried.clear()
        self.patience_s = self.FIRST_S

    @property
    def round_over(self) -> bool:
        """Whether all were tried."""
        return self._tried >= set(self.addresses)
