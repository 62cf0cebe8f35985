"""What a run tells of itself: a line of JSON a step, and curves at each checkpoint."""

from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from broker.logs import log
from trainer_client.training.identity import write_whole

_logger = logging.getLogger("draftmq.train")


class MetricsLog:
    """``metrics.jsonl``: one object a step. A resumed run goes on after ``steps_done``.

    A disk that is full costs lines, and a warning, not the run.
    """

    def __init__(self, path: Path, steps_done: int = 0) -> None:
        forget_after(path, steps_done)
        self._file = path.open("a", encoding="utf-8")
        self._failed = False

    def write(self, line: Mapping[str, Any]) -> None:
        try:
            self._file.write(_line(line))
            self._file.flush()
        except OSError as error:
            if not self._failed:
                log(_logger, "warning", "metrics_not_written", {"error": str(error)})
            self._failed = True

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):  # what could not be flushed is written again
            self._file.close()


def forget_after(path: Path, steps_done: int) -> None:
    """Rewrite a file of lines without those of steps that a resumed run will do again."""
    kept = [line for line in read(path) if line["step"] <= steps_done] if steps_done else []
    write_whole(path, "".join(map(_line, kept)))


def append(path: Path, line: Mapping[str, Any]) -> None:
    """Add one object to a file of lines; a full disk is a warning."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(_line(line))
    except OSError as error:
        log(_logger, "warning", "metrics_not_written", {"error": str(error)})


def _line(line: Mapping[str, Any]) -> str:
    return json.dumps(finite(dict(line)), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A plain value as JSON has it: what is not a number in it is null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def read(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file, without a last one that was cut off."""
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def draw_curves(lines: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Loss, accuracy by depth, simulated accept length and waiting share over steps, as a PNG.

    The raw values are pale, and a mean that follows them stands out. The file is replaced whole.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    steps = [line["step"] for line in lines]
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
    loss, accuracy, accept, waiting = axes.flat

    def draw(axis: Any, values: Sequence[float | None], **style: Any) -> None:
        axis.plot(steps, [math.nan if v is None else v for v in values], alpha=0.25, **style)
        axis.plot(steps, smoothed(values), **style)

    draw(loss, [line["loss"] for line in lines], color="tab:blue")
    loss.set_ylabel("loss (nats, weighted over depths)")
    depths = len(lines[0]["depth_accuracy"]) if lines else 0
    colors = plt.get_cmap("viridis")
    for depth in range(depths):
        values = [line["depth_accuracy"][depth] for line in lines]
        color = colors(depth / max(1, depths - 1))
        accuracy.plot(steps, smoothed(values), color=color, label=f"depth {depth + 1}")
    accuracy.set_ylabel("top-1 accuracy (smoothed)")
    accuracy.set_ylim(0, 1)
    if depths:
        accuracy.legend(fontsize="small", ncols=2)
    draw(accept, [line["accept_length"] for line in lines], color="tab:green")
    accept.set_ylabel("simulated accept length (tokens)")
    draw(waiting, [100 * line["waiting_share"] for line in lines], color="tab:red")
    waiting.set_ylabel("time spent waiting for supervision (%)")
    waiting.set_ylim(0, 100)
    for axis in axes.flat:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.suptitle(title or "EAGLE-3 draft training")
    unfinished = path.with_name(f".{path.name}")
    try:
        figure.savefig(unfinished, dpi=120, format="png")
        unfinished.replace(path)
    except OSError as error:  # the run is worth more than its picture
        log(_logger, "warning", "curves_not_written", {"error": str(error)})
    finally:
        plt.close(figure)


def smoothed(values: Sequence[float | None], share: float = 0.05) -> list[float]:
    """A mean that follows the values; each new one weighs more the fewer there are.

    Over the last ``1 / share`` values or so, and over all while there are fewer. None is passed by.
    """
    follows, seen, mean = [], 0, math.nan
    for value in values:
        if value is not None:
            seen += 1
            mean = value if seen == 1 else mean + max(share, 1 / seen) * (value - mean)
        follows.append(mean)
    return follows
