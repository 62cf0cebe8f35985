"""What a channel needs of a way to move bytes: Gloo, shared memory, NCCL and CUDA IPC are such."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

#: The worker's rank in the pair, and the client's.
WORKER, CLIENT = 0, 1


class TransferError(Exception):
    """A channel could not be built, or a transfer failed or stalled."""


def out_of_step(expected: tuple[int, ...], came: tuple[int, ...]) -> TransferError:
    """A part ``(seq, number)`` is not the one whose turn it is."""
    return TransferError(f"out of step: part {expected} was expected, {came} came")


def plain(error: Exception) -> str:
    """What torch says in several lines, with source paths and advice, in one."""
    first = str(error).strip().splitlines()[0]
    return re.sub(r"\[/[^\]]*\]\s*", "", first).partition(" This is typically")[0]


class Backend(Protocol):
    """Two processes and one epoch. Any error ends it: it is closed and never used again."""

    def send(self, seq: int, tensors: Sequence[Tensor], limit_s: float) -> None:
        """Send uint8 tensors [nbytes]; returns when the other end has said that it has them.

        Raises :class:`TransferError` when nothing moved for ``limit_s``, or the peer is gone.
        """

    def receive(self, seq: int, sizes: Sequence[int], limit_s: float) -> list[Tensor]:
        """Receive uint8 tensors of these sizes, usable on any stream when this returns.

        Raises :class:`TransferError` likewise; nothing of a partial transfer is returned.
        """

    @property
    def gone(self) -> bool:
        """The other end has left or died, as far as can be known without a transfer."""

    def interrupt(self) -> None:
        """Free whoever waits in :meth:`send` or :meth:`receive`; from any thread."""

    def close(self) -> None:
        """Let go of all connections; only when nobody waits any more."""
