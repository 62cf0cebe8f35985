"""``draftmq demo``: broker, workers and trainer ranks as real processes, and a draft at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import click

from trainer_client.commands.tokenizer import load_tokenizer
from trainer_client.errors import TrainerClientError

#: What trains the embedded target's draft in about two minutes on two cores.
_SETTINGS = {
    "--epochs": 100,
    "--batch-size": 4,
    "--max-length": 128,
    "--draft-vocab-size": 1536,
    "--learning-rate": 8e-3,
    "--max-grad-norm": 1.0,
    "--ttt-depths": 4,
    "--checkpoint-every": 0,
}
#: How long a part may take to come up or to leave.
_START_S, _LEAVE_S = 60.0, 10.0


def _environment() -> dict[str, str]:
    """This process's, without what is set for other clusters than the demo's."""
    others = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DRAFTMQ_") or name.startswith("DRAFTMQ_DATA_CACHE")
    }
    return others | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class Processes:
    """Children of the demo; leaving the block ends every one of them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._children: list[tuple[str, subprocess.Popen[bytes]]] = []

    def start(
        self, name: str, arguments: Sequence[object], *, shown: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start ``python -m ARGUMENTS``; its log goes to a file, or to the terminal if shown."""
        log: IO[bytes] | None = None if shown else (self._logs / f"{name}.log").open("wb")
        child = subprocess.Popen(
            [sys.executable, "-m", *map(str, arguments)],
            stdout=log,
            stderr=log,
            stdin=subprocess.DEVNULL,
            env=_environment(),
            start_new_session=True,  # Ctrl-C comes to the demo alone, which ends them in order
        )
        if log is not None:
            log.close()
        self._children.append((name, child))
        return child

    def log(self, name: str) -> str:
        return (self._logs / f"{name}.log").read_text(errors="replace")

    def check(self) -> None:
        """Raise :class:`TrainerClientError` with the log's end if a child has gone."""
        for name, child in self._children:
            if child.poll() not in (None, 0):
                tail = "\n".join(self.log(name).splitlines()[-5:])
                raise TrainerClientError(f"{name} ended with {child.returncode}:\n{tail}")

    def __enter__(self) -> Processes:
        return self

    def __exit__(self, *_: object) -> None:
        """Trainers go first, then workers, then the broker, so that each can say goodbye."""
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # no second one in the midst of it
        for _name, child in reversed(self._children):
            self._signal(child, signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(_LEAVE_S)
            self._signal(child, signal.SIGKILL)  # also what a child of it has left
            child.wait()
        signal.signal(signal.SIGINT, before)

    def _signal(self, child: subprocess.Popen[bytes], number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, number)


_DEMO_EXAMPLE = """\b
Example:
  draftmq demo --output runs/demo"""


@click.command(epilog=_DEMO_EXAMPLE)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Directory of the run (default: runs/demo-TIME).",
)
@click.option("--steps", type=click.IntRange(min=1), default=300, help="Optimizer steps.")
@click.option("--workers", type=click.IntRange(min=1), default=2, help="Target workers.")
@click.option("--ranks", type=click.IntRange(min=1), default=2, help="Trainer ranks.")
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON at the end.")
def demo(output: Path | None, steps: int, workers: int, ranks: int, as_json: bool) -> None:
    """Train a draft for the embedded target, through a broker, on this machine alone.

    Ctrl-C at any time leaves no process behind.
    """
    output = output or Path("runs") / time.strftime("demo-%Y%m%d-%H%M%S")
    (output / "logs").mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _interrupt)
    began = time.monotonic()
    say = (lambda text: None) if as_json else click.echo
    try:
        with Processes(output / "logs") as processes:
            _train(processes, output, steps, workers, ranks, say, as_json)
            summary = _compare(output, say)
    except KeyboardInterrupt:
        raise click.Abort from None
    summary["seconds"] = time.monotonic() - began
    from trainer_client.training.run import write_summary

    write_summary(output, summary)
    if as_json:
        click.echo(json.dumps(summary))
        return
    say(
        f"\naccepted tokens per target forward: {summary['accept_length_before']:.2f} before, "
        f"{summary['accept_length_after']:.2f} after training (5 drafted)\n"
        f"decoding speed against no draft:    {summary['speedup']:.2f}x\n"
        f"text identical to plain decoding:   {'yes' if summary['lossless'] else 'NO'}\n"
        f"draft:  {summary['draft_path']}\ncurves: {summary['curves_path']}\n"
        f"all of it took {summary['seconds']:.0f} s"
    )


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _train(
    processes: Processes,
    output: Path,
    steps: int,
    workers: int,
    ranks: int,
    say: Any,
    quiet: bool,
) -> None:
    from worker.targets.embedded import continuations_file

    say(
        f"starting a broker, {workers} workers and {ranks} trainer ranks; logs in {output / 'logs'}"
    )
    any_port = "tcp://127.0.0.1:0"
    arguments = ["broker", "--clients", any_port, "--workers", any_port]
    processes.start("broker", [*arguments, "--http", "127.0.0.1:0", "--log-format", "json"])
    where = listening(processes)
    say(f"watch it live: http://{where['http']}/")
    for number in range(workers):
        arguments = ["worker", "--broker", where["workers"], "--target", "embedded"]
        arguments += ["--device", "cpu"]
        processes.start(f"worker{number}", [*arguments, "--threads", 1, "--name", f"w{number}"])
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
    options = {
        "--broker": where["clients"],
        "--data": continuations_file(),
        "--output": output,
        "--max-steps": steps,
        "--log-level": "warning",
        "--device": "cpu",  # a host may have fewer GPUs than there are ranks
        **_SETTINGS,
    }
    flat = [part for option in options.items() for part in option]
    trainer = processes.start(
        "trainer", [*torchrun, "-m", "trainer_client", *flat], shown=not quiet
    )
    while trainer.poll() is None:
        processes.check()
        time.sleep(0.2)
    if trainer.returncode:
        raise TrainerClientError(f"the trainer ended with {trainer.returncode}; see above")


def listening(processes: Processes) -> dict[str, str]:
    """The broker's addresses, from its log."""
    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        processes.check()
        for line in processes.log("broker").splitlines():
            if line.endswith("}") and '"event": "listening"' in line:
                found: dict[str, str] = json.loads(line)
                return found
        time.sleep(0.05)
    raise TrainerClientError(f"the broker did not come up within {_START_S:.0f} s")


def _compare(output: Path, say: Any) -> dict[str, Any]:
    """Decode for real with the trained draft, and with the weights that it began with."""
    import torch

    from trainer_client.drafts.export import read_draft
    from trainer_client.eagle3.draft import Eagle3Draft
    from trainer_client.evaluation.decoding import evaluate, greedy_decode
    from trainer_client.evaluation.prompts import load_prompts
    from worker.targets import load_target

    say("decoding with the draft, before and after training")
    summary: dict[str, Any] = json.loads((output / "summary.json").read_text())
    torch.set_num_threads(1)  # tiny matrices: more threads only wait for each other
    target = load_target("embedded")
    trained = read_draft(Path(summary["draft_path"]))
    torch.manual_seed(0)
    selected, head = trained.selected_token_ids, target.get_output_embeddings()
    fresh = Eagle3Draft(trained.config, selected, target.get_input_embeddings().weight)
    assert head is not None  # the embedded target has one
    fresh.start_from_target(head.weight[selected])
    tokenizer = load_tokenizer(target.tokenizer, trust_remote_code=False)
    prompts = load_prompts(tokenizer, "embedded", None, 12, 48)
    before = evaluate(target, fresh, prompts[:4])
    after = evaluate(target, trained, prompts)
    prompt = str(tokenizer.decode(prompts[0]))
    continued = str(tokenizer.decode(greedy_decode(target, prompts[0], 64).tokens))
    say(f"\n{prompt}[{continued}]")
    return summary | {
        "accept_length_before": before.accept_length,
        "accept_length_after": after.accept_length,
        "depth_acceptance": after.depth_acceptance,
        "speedup": after.speedup,
        "lossless": before.lossless and after.lossless,
        "sample": prompt + continued,
    }
