"""Structured log lines: an event with a stable name, and its fields."""

from __future__ import annotations

import functools
import json
import logging
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

import click

from broker.log_writer import LogWriter

FORMATS = ("logfmt", "json")


def log(logger: logging.Logger, level: str, event: str, fields: Mapping[str, Any]) -> None:
    """Log an event of a core or a service."""
    logger.log(logging.getLevelName(level.upper()), event, extra={"fields": fields})


class Throttle:
    """Lets ``burst`` events of one name through, then ``per_s`` a second, so that whoever causes
    them cannot fill the disk.
    """

    def __init__(self, burst: int = 20, per_s: float = 1.0) -> None:
        self._burst = burst
        self._per_s = per_s
        #: event -> tokens left, when that was so, events left out since one was let through
        self._events: dict[str, tuple[float, float, int]] = {}

    def left_out(self, event: str, now: float) -> int | None:
        """How many came since the last that was let through; None for one that is left out too."""
        tokens, since, left_out = self._events.get(event, (float(self._burst), now, 0))
        tokens = min(self._burst, tokens + (now - since) * self._per_s)
        if tokens < 1:
            self._events[event] = (tokens, now, left_out + 1)
            return None
        self._events[event] = (tokens - 1, now, 0)
        return left_out


#: Fields of every line of this process, such as a trainer's rank.
_always: dict[str, Any] = {}


def name_lines(**fields: Any) -> None:
    """Have every log line of this process carry these fields from now on."""
    _always.update(fields)


class _Formatter(logging.Formatter):
    def __init__(self, style: str) -> None:
        super().__init__()
        self._json = style == "json"

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat("T", "milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_always,
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        if self._json:
            return json.dumps(line, default=str)
        return " ".join(f"{key}={_logfmt(value)}" for key, value in line.items())


def _logfmt(value: Any) -> str:
    text = str(value)
    plain = text and not any(character in text for character in ' "=\n\\')
    return text if plain else json.dumps(text)


def configure(style: str = "logfmt", level: str = "info") -> None:
    """Send all log lines of this process to stderr, as ``logfmt`` or ``json``."""
    logging.basicConfig(level=level.upper(), handlers=[_to_stderr(style)], force=True)


def attach(level: str = "info", style: str = "logfmt") -> None:
    """Inside another program: write draftmq's lines to stderr with their fields, and leave all
    other loggers alone. That program's formats would show the events' names only.
    """
    logger = logging.getLogger("draftmq")
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, _Formatter):
            logger.removeHandler(handler)
    logger.addHandler(_to_stderr(style))
    logger.setLevel(level.upper())
    logger.propagate = False


def _to_stderr(style: str) -> logging.Handler:
    handler: logging.Handler
    try:
        handler = LogWriter(sys.stderr.fileno())
    except OSError:  # no file but an object, as in a notebook
        handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(style))
    return handler


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options ``--log-format`` and ``--log-level`` for a command; they configure its logs."""

    @click.option(
        "--log-format",
        type=click.Choice(FORMATS),
        default="logfmt",
        show_default=True,
        help="A log line as words with key=value, or as one JSON object.",
    )
    @click.option(
        "--log-level",
        type=click.Choice(("debug", "info", "warning", "error")),
        default="info",
        help="The least severe lines that are written.",
    )
    @functools.wraps(command)
    def configured(*, log_format: str, log_level: str, **others: Any) -> Any:
        configure(log_format, log_level)
        return command(**others)

    return configured
