"""A run's figures where people already look: TensorBoard and Weights & Biases.

Beside ``metrics.jsonl``, which is always written. Both packages are looked for when they are asked
for; Weights & Biases runs offline where ``WANDB_MODE=offline`` says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from broker.logs import log
from trainer_client.errors import TrainerClientError

_logger = logging.getLogger("draftmq.train")

#: The boards, and the package that each needs.
BOARDS = {"tensorboard": "tensorboard", "wandb": "wandb"}


class Board(Protocol):
    """Takes the figures of one step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class _TensorBoard:
    def __init__(self, output: Path, done: int, settings: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # what an interrupted run wrote behind its checkpoint is trained again
        self._writer: Any = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1)
        rows = "".join(f"| {name} | {value} |\n" for name, value in settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", done)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, output: Path, done: int, settings: Mapping[str, Any]) -> None:
        import wandb

        self._run: Any = wandb.init(
            project="draftmq",
            name=output.name,
            id=hashlib.blake2b(str(output.resolve()).encode(), digest_size=8).hexdigest(),
            resume="allow",
            dir=str(output),
            config=dict(settings),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


_KINDS: dict[str, type[_TensorBoard] | type[_Wandb]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
}


def check_boards(names: Sequence[str]) -> None:
    """Raise ``ValueError`` for a name that is none."""
    if unknown := [name for name in names if name not in BOARDS]:
        raise ValueError(f"log_to knows {' and '.join(BOARDS)}, got {', '.join(unknown)}")


@contextlib.contextmanager
def opened(
    names: Sequence[str], output: Path, done: int, settings: Mapping[str, Any]
) -> Iterator[list[Board]]:
    """The boards of a run that has ``done`` steps behind it.

    Raises :class:`TrainerClientError` in one sentence where a package is missing. What a board
    says against later is a warning: figures are not worth a run.
    """
    boards: list[Board] = []
    try:
        for name in names:
            try:
                importlib.import_module(BOARDS[name])
                boards.append(_KINDS[name](output, done, settings))
            except ImportError as error:
                raise TrainerClientError(
                    f"--log-to {name} needs the package {BOARDS[name]} ({error}); "
                    f"pip install 'draftmq[{name}]', or leave it away"
                ) from None
        yield boards
    finally:
        for board in boards:
            with _warned():
                board.close()


def write(boards: Sequence[Board], step: int, line: Mapping[str, Any], prefix: str = "") -> None:
    """Give the numbers of a line to all boards; of a list each under its index."""
    values = {f"{prefix}{name}": float(value) for name, value in _numbers(line)}
    for board in boards:
        with _warned():
            board.write(step, values)


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, (list, tuple)):
            yield from ((f"{name}/{at}", each) for at, each in enumerate(value) if _is(each))
        elif _is(value) and name != "step":
            yield name, value


def _is(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@contextlib.contextmanager
def _warned() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        fields = {"error": f"{type(error).__name__}: {error}"}
        log(_logger, "warning", "metrics_not_written", fields)
