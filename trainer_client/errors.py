"""What can go wrong on the trainer's side; each error says what happened and what to do."""

from __future__ import annotations

from broker.protocol.errors import DraftmqError


class TrainerClientError(DraftmqError):
    """Root of the trainer client's errors."""


class DataError(TrainerClientError):
    """The training data cannot be used; the text names file and line."""


class ExportError(TrainerClientError):
    """A draft cannot be written, or is not one that engines load."""


class ClientClosedError(TrainerClientError):
    """The client was closed, or belongs to another process."""


class RequestError(TrainerClientError, RuntimeError):
    """A request ended without a result. ``code`` says which kind of end it was."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


class BadRequestError(RequestError, ValueError):
    """The request itself is wrong: shapes, dtypes, ids out of range, an unknown model."""


class DeadlineError(RequestError, TimeoutError):
    """Nobody answered within the request's time; the text tells its story."""


class IdentityError(RequestError):
    """A reply came that is not the one to this request. It was not used."""


class RefusedError(RequestError):
    """The broker refuses this client: another version, or fenced off by a newer process."""


class TargetFailedError(RequestError):
    """The target raised, or died, on each of several workers."""


_KINDS: dict[str, type[RequestError]] = {
    "bad_request": BadRequestError,
    "unknown_model": BadRequestError,
    "too_large": BadRequestError,
    "deadline": DeadlineError,
    "expired": DeadlineError,
    "identity": IdentityError,
    "refused": RefusedError,
    "target_failed": TargetFailedError,
    "lost_workers": TargetFailedError,
}


def request_error(code: str, text: str) -> RequestError:
    """The exception for a failure code."""
    return _KINDS.get(code, RequestError)(code, text)
