"""NeMo AutoModel 0.7.0's remote EAGLE-3 target: its own servers and clients, over HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.lines import Progress
from tests.bench.peers.driver import Driver
from tests.bench.peers.venv import python_of

NAME = "NeMo AutoModel 0.7.0"
_VENV = Path(__file__).parents[3] / "build" / "peers" / "nemo"
_INSTALLS = (
    ["torch==2.13.0"],  # first, so that nothing asks for another build of it
    ["--no-deps", "nemo-automodel==0.7.0", "pillow"],
    ["datasets", "requests", "transformers"],
)
_DRIVER = Path(__file__).with_name("nemo_driver.py")


class Nemo(Driver):
    """NeMo's servers and clients."""

    def __init__(self, python: Path) -> None:
        super().__init__("NeMo", python, _DRIVER)

    def supervision(self, tokens: int, hidden_size: int, draft_vocab: int) -> tuple[float, int]:
        """Seconds and bytes of one reply, from the request to tensors in the trainer's hands."""
        answer = self.ask(
            "supervision", tokens=tokens, hidden_size=hidden_size, draft_vocab=draft_vocab
        )
        return answer["seconds"], answer["bytes"]

    def steps_per_s(
        self, server_s: Sequence[float], ranks: int, seconds: float, warm_s: float
    ) -> float:
        """Of ranks that step together, with a server for each of ``server_s``, its seconds."""
        answer = self.ask(
            "share", server_s=list(server_s), ranks=ranks, seconds=seconds, warm_s=warm_s
        )
        return float(answer["steps_per_s"])


@contextlib.contextmanager
def nemo(progress: Progress, *, quick: bool) -> Iterator[Nemo | None]:
    """NeMo; None where it cannot be installed, which ``progress`` is told, and where it is to be
    ``quick``.
    """
    python = None if quick else python_of(_VENV, _INSTALLS, progress)
    if python is None:
        yield None
        return
    with Nemo(python) as started:
        yield started
