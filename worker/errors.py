"""What can go wrong in a worker."""

from __future__ import annotations

from broker.protocol.errors import DraftmqError


class WorkerError(DraftmqError):
    """Root of the worker's errors."""


class TargetError(WorkerError):
    """The target cannot be loaded, or does not do what its contract says."""


class TargetGoneError(TargetError):
    """The target will never answer again: its worker ends, and its requests go to others."""


class BadRequest(WorkerError):  # noqa: N818 - named for what the trainer did
    """The target cannot serve this request; the text is shown to the trainer."""
