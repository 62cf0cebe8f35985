"""``draftmq train``."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

import click
import torch

from broker import logs
from broker.keys import operators
from broker.options import ABOVE_0
from trainer_client.commands.progress import Progress
from trainer_client.commands.tokenizer import TEMPLATE_HELP, load_tokenizer, served_tokenizer
from trainer_client.eagle3.config import Family
from trainer_client.eagle3.draft import Attention
from trainer_client.errors import TrainerClientError
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.targets.wished import check_for_training
from trainer_client.training.early import look_first
from trainer_client.training.probe import probe
from trainer_client.training.ranks import Ranks
from trainer_client.training.run import train as run_training
from trainer_client.training.run import write_summary
from trainer_client.training.settings import Differs, InitVocab, TrainSettings, Turns
from trainer_client.training.stopping import Stop, Stopped
from trainer_client.training.trainer import StepMetrics
from trainer_client.watch.observed import Observed
from worker.direct import options as direct_options
from worker.direct.config import DirectConfig

_logger = logging.getLogger("draftmq.train")

HELP = {
    "data": "File, pattern or directory (JSON, parquet, text, Arrow); may be repeated.",
    "output": "Directory of the run: metrics, curves, checkpoints, the draft.",
    "epochs": "Passes over the data.",
    "max_steps": "End after so many steps (0: after the epochs).",
    "batch_size": "Samples of one rank in one micro-batch.",
    "accumulation": "Micro-batches of one rank for one optimizer step.",
    "global_batch": "Samples of a step over all ranks (0: batch size x accumulation x ranks).",
    "pack": "Tokens of a micro-batch without padding, in which samples follow one another (0: no).",
    "skip_non_finite": "Samples with values that are not finite that may be left out.",
    "max_length": "Tokens of a sample; what is longer is cut, and counted.",
    "loss_on": "Assistant turns that have loss: all of them, or each conversation's last.",
    **TEMPLATE_HELP,
    "skip_bad_lines": "Leave out records that cannot be used, and count them by reason.",
    "draft": "The family of the draft: its norms, and what the next depth reads.",
    "init_from": "A draft to begin from (any trainer's); its network takes the place of --draft.",
    "init_vocab": "Keep that draft's vocabulary, or choose one from the data.",
    "draft_vocab_size": "Tokens that the draft can emit: the most frequent in the data.",
    "draft_intermediate_size": "Width of the draft's MLP (0: like the target's).",
    "ttt_depths": "Depths of the training-time test.",
    "attention": "auto merges flash attention with the later depths' keys; reference never does.",
    "learning_rate": "Peak, after warm-up; then a cosine to a tenth of it.",
    "warmup_share": "Share of the steps that warm up.",
    "weight_decay": "AdamW's; norms are spared.",
    "max_grad_norm": "Gradients are clipped to this norm.",
    "prefetch": "Requests kept ahead of the trainer; auto finds how many it takes.",
    "prefetch_mib": "Memory for what prefetch=auto keeps ahead.",
    "validation": "A share of the samples (0.05) or a file: measured at checkpoints, not trained.",
    "verify_share": "Share of the samples that a second worker is asked for too, and compared.",
    "verify_differs": "Where two workers differ by more than rounding: end the run, or warn.",
    "log_to": "Boards that get the figures too: tensorboard, wandb (commas between).",
    "seed": "Of the draft's first weights and of the order of the data.",
    "checkpoint_every": "Steps between checkpoints (0: only at the end).",
    "keep_checkpoints": "Checkpoints that are kept.",
    "resume": "Go on from the newest checkpoint in --output, if there is one.",
}
_AT_LEAST_1 = click.IntRange(min=1)


class _Depth(click.ParamType):
    """``auto`` or a number."""

    name = "auto|N"

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        return value if value == "auto" else _AT_LEAST_1.convert(value, param, ctx)


_TYPES = {
    "Path": click.Path(path_type=Path),
    "Paths": click.Path(path_type=Path),
    "Pairs": str,
    "int": int,
    "str": str,
    "float": float,
    "bool": bool,
    "Depth": _Depth(),
    "Turns": click.Choice(get_args(Turns)),
    "Attention": click.Choice(get_args(Attention)),
    "Family": click.Choice(get_args(Family)),
    "Differs": click.Choice(get_args(Differs)),
    "InitVocab": click.Choice(get_args(InitVocab)),
}


def _settings_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each field of :class:`TrainSettings`."""
    for field in reversed(fields(TrainSettings)):
        name = "--" + field.name.replace("_", "-")
        options: dict[str, Any] = {"help": HELP[field.name]}
        if field.type == "bool":
            options["is_flag"] = True
        else:
            options["type"] = _TYPES[str(field.type)]
            options["multiple"] = field.type in ("Paths", "Pairs")
        if field.default is MISSING:
            options["required"] = True
        else:
            options["default"] = field.default
        command = click.option(name, **options)(command)
    return command


def _encoding(context: click.Context, option: click.Parameter, value: str) -> str:
    if value != "auto":
        try:
            check_for_training(value)
        except ValueError as error:
            raise click.BadParameter(str(error)) from None
    return value


_TRAIN_EXAMPLE = """\b
Example:
  draftmq train --broker tcp://HOST:5555 --data chat.jsonl --output runs/one
  torchrun --nproc-per-node 8 -m trainer_client --broker tcp://HOST:5555 \\
      --data chat.jsonl --output runs/one"""


@click.command(epilog=_TRAIN_EXAMPLE)
@click.option("--broker", multiple=True, required=True, help="tcp://HOST:5555; may be repeated.")
@click.option("--key", type=click.Path(), help="This trainer's secret key (draftmq keygen).")
@click.option(
    "--broker-key",
    multiple=True,
    help="The broker's public key, or its file; one for all brokers, or one for each.",
)
@_settings_options
@click.option("--model", default="", help="Which model, where the broker has several.")
@click.option(
    "--encoding",
    default="auto",
    callback=_encoding,
    help="What workers send: probs, hidden, topk (lossy), auto (hidden where it is offered), or a "
    "wish such as 'layers=1,17,32;last;states=fp8' (docs/encodings.md).",
)
@click.option("--trust-remote-code", is_flag=True, help="Run code of the tokenizer's own.")
@click.option("--tokenizer", help="Name or path (default: the target's own).")
@click.option("--device", default="", help="cpu, cuda, ... (default: a GPU if there is one).")
@click.option("--job", default="", help="Groups ranks in the broker (default: the output path).")
@click.option(
    "--timeout-s", type=ABOVE_0, default=120.0, help="Patience with one request, before retries."
)
@click.option(
    "--retries",
    type=click.IntRange(min=0),
    default=3,
    help="A request's deadline is timeout x (retries + 1).",
)
@click.option("--http", help="Serve /metrics on HOST:PORT, each rank on PORT plus its rank.")
@operators.option
@click.option(
    "--trace",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write where the last requests spent their time, as a Chrome trace.",
)
@click.option(
    "--trace-broker",
    multiple=True,
    help="HTTP address of a broker whose times belong in the trace; may be repeated.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON at the end.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Say what the run would be, with memory and time of one step, and write nothing.",
)
@direct_options.options(worker=False)
@logs.options
def train(
    broker: tuple[str, ...],
    key: str | None,
    broker_key: tuple[str, ...],
    model: str,
    encoding: str,
    tokenizer: str | None,
    trust_remote_code: bool,
    device: str,
    job: str,
    timeout_s: float,
    retries: int,
    http: str | None,
    http_token: str | Path | None,
    trace: Path | None,
    trace_broker: tuple[str, ...],
    as_json: bool,
    dry_run: bool,
    direct: DirectConfig,
    **settings_: Any,
) -> None:
    """Train a draft; also under torchrun, one rank a process."""
    try:
        settings = TrainSettings(**settings_)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    stop = Stop()
    with stop.listening(), _one_sentence(stop):
        ranks = Ranks.from_environment()
        if ranks.world_size > 1:
            logs.name_lines(rank=ranks.rank)
        try:
            if ranks.first:
                logs.log(_logger, "info", "settings", {"broker": broker, **settings.plain()})
                look_first(settings)
            device = own_device(device)
            observed = Observed(ranks.rank, http, trace, trace_broker, http_token=http_token)
            target = RemoteEagle3TargetModel(
                list(broker),
                device=device,
                timeout=timeout_s,
                max_retries=retries,
                model=model,
                encoding=encoding,
                job=job or str(settings.output.resolve()),
                rank=ranks.rank,
                direct=direct,
                host_batches=True,
                trace=observed.trace,
                key=key,
                broker_key=broker_key,
            )
            progress = Progress(ranks, quiet=as_json)
            if dry_run:
                with target:
                    read = load_tokenizer(tokenizer or served_tokenizer(target), trust_remote_code)
                    where = torch.device(device)
                    found = probe(settings, target, read, ranks=ranks, device=where)
                if ranks.first:
                    _say_probe(found, as_json)
                return
            with target, observed.of(target), progress:

                def on_step(step: StepMetrics) -> None:
                    observed.step(step)
                    progress.step(step)

                summary = run_training(
                    settings,
                    target,
                    load_tokenizer(tokenizer or served_tokenizer(target), trust_remote_code),
                    ranks=ranks,
                    device=torch.device(device),
                    on_plan=progress.plan,
                    stop=stop,
                    on_step=on_step,
                )
                summary |= {"requests": target.counters()} if ranks.first else {}
        finally:
            ranks.leave()
    if ranks.first:
        _finish_summary(settings.output, summary, as_json)


@contextlib.contextmanager
def _one_sentence(stop: Stop) -> Iterator[None]:
    """A signal that came before the first step is an error in one sentence."""
    try:
        yield
    except Stopped:
        raise TrainerClientError(f"stopped by {stop.by} before the first step") from None


def own_device(wanted: str) -> str:
    """The device of this rank: ``wanted``, and of several GPUs the one of its local rank.

    Raises :class:`click.UsageError` for a rank beyond this host's GPUs.
    """
    if wanted not in ("", "cuda"):
        _known_device(wanted)
        return wanted
    if not torch.cuda.is_available():
        if wanted:
            raise click.UsageError("--device cuda, and torch sees no GPU here; say --device cpu")
        return "cpu"
    local, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if local >= count:
        raise click.UsageError(
            f"local rank {local} has no GPU: this host shows {count}; start at most {count} ranks "
            "on it, or say --device cpu"
        )
    torch.cuda.set_device(local)  # what names no device means this one
    return f"cuda:{local}"


def _known_device(name: str) -> None:
    try:
        torch.device(name)
    except RuntimeError:
        raise click.UsageError(
            f"torch {torch.__version__} knows no device {name!r}; say --device cpu, cuda or cuda:N"
        ) from None


def _say_probe(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(found))
        return
    for name, value in found.items():
        click.echo(f"{name.replace('_', ' ')}: {value}")


def _finish_summary(output: Path, summary: dict[str, Any], as_json: bool) -> None:
    write_summary(output, summary)
    if as_json:
        click.echo(json.dumps(summary))
    else:
        click.echo(
            f"draft:  {summary['draft_path']}\ncurves: {summary['curves_path']}\n"
            f"waited for supervision: {summary['waiting_share']:.1%} of the time; "
            f"peak memory: {(summary['peak_memory_bytes'] or 0) / 2**20:,.0f} MiB"
        )
