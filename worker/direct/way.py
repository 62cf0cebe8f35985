"""What one end can do, and its address, which a host may lose: then it is looked for again."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from broker.logs import log
from worker.direct.config import Choice, DirectConfig, choose

if TYPE_CHECKING:
    import torch

#: A start waits so long for the way to the broker to be known, and no longer for a name server.
_PATIENCE_S = 1.0
#: How often it is asked whether the address is still this host's.
_ASK_S = 1.0


class Way:
    """The present :class:`Choice` of one end.

    With the address ``auto`` it follows the host: in a thread, for a name server may be silent.
    """

    def __init__(
        self,
        config: DirectConfig,
        device: torch.device | str,
        brokers: Sequence[str],
        logger: logging.Logger,
    ) -> None:
        self._choose = lambda: choose(config, device, brokers)
        self._follows = config.address == "auto" and config.mode != "off"
        self._logger = logger
        self._choice = Choice((), "", "the way to the broker is not known yet")
        self._asked_at = time.monotonic()
        self._thread: threading.Thread | None = None
        if self._follows:
            self._look()
            assert self._thread is not None
            self._thread.join(_PATIENCE_S)
        else:
            self._found(self._choose())

    @property
    def choice(self) -> Choice:
        """What this end can do now."""
        if self._follows and time.monotonic() >= self._asked_at + _ASK_S:
            self._asked_at = time.monotonic()
            if not (self._choice.address and is_ours(self._choice.address)):
                self._look()
        return self._choice

    def give_up(self, why: str) -> None:
        """Nothing goes directly any more, unless the address was lost only."""
        if not self._follows or is_ours(self._choice.address):
            self._follows = False
            self._choice = Choice((), "", why)

    def _look(self) -> None:
        if self._thread is None or not self._thread.is_alive():
            name = "look for an address"
            self._thread = threading.Thread(target=self._look_there, name=name, daemon=True)
            self._thread.start()

    def _look_there(self) -> None:
        self._found(self._choose())

    def _found(self, choice: Choice) -> None:
        if choice != self._choice:
            self._choice = choice
            log(self._logger, "info", "direct", {"choice": str(choice)})


def is_ours(address: str) -> bool:
    """Whether this host has this address just now."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
    except OSError:
        return False
    return True
