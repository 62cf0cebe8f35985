"""``draftmq worker``."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from broker import logs
from broker.keys import addresses, operators
from broker.options import NOT_NEGATIVE
from worker.direct import options as direct_options
from worker.targets.options import Layers

if TYPE_CHECKING:
    from worker.direct.config import DirectConfig
    from worker.service import Worker
    from worker.targets.contract import Target


#: Beyond its drain time, a worker has so long to be gone.
_GRACE_S = 5.0
#: While it waits for its first broker, systemd is asked for so long again and again.
_STARTING_US = 60_000_000


#: A target that begins so is served inside vLLM.
_VLLM = "vllm:"
#: Requests that a worker in vLLM holds at once, and tokens that it runs together: rows of unequal
#: lengths cost no padding there, so nothing is lost by running what waits.
_VLLM_CREDITS, _VLLM_TOKENS = 16, 8192


class _Setting(click.ParamType[tuple[str, object]]):
    name = "KEY=VALUE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, object]:
        key, equals, text = str(value).partition("=")
        if not (key and equals):
            self.fail(f"{value!r} is not KEY=VALUE", param, ctx)
        try:
            return key, json.loads(text)
        except ValueError:
            return key, text


_WORKER_EXAMPLE = """\b
Example:
  draftmq worker --broker tcp://HOST:5556 --target Qwen/Qwen3-8B --device cuda"""


@click.command(epilog=_WORKER_EXAMPLE)
@click.option("--broker", multiple=True, required=True, help="Serve this broker; may be repeated.")
@click.option("--key", type=click.Path(), help="This worker's secret key (draftmq keygen).")
@click.option(
    "--broker-key",
    multiple=True,
    help="The broker's public key, or its file; one for all brokers, or one for each.",
)
@click.option(
    "--target",
    help="Hugging Face id or path, or 'embedded'; with vllm: before it, it runs inside vLLM.",
)
@click.option("--target-factory", help="package.module:callable that makes the target instead.")
@click.option(
    "--factory-arg",
    type=_Setting(),
    multiple=True,
    help="Given to the factory by keyword; repeatable. So are --device, --dtype, --aux-layers "
    "(aux_layer_ids) and --revision where they are said.",
)
@click.option("--model-name", default="", help="The name that trainers ask for (default: TARGET).")
@click.option("--aux-layers", type=Layers(), help="Layers whose outputs are taken [1,n/2-1,n-4].")
@click.option(
    "--layers", type=Layers(), help="With vllm: the layers that can be asked for beside these."
)
@click.option(
    "--tp",
    type=click.IntRange(min=0),
    is_flag=False,
    flag_value=0,
    metavar="[N]",
    help="Cut the model over N GPUs: in vLLM as it is; in transformers under torchrun "
    "--nproc-per-node N -m worker, where N may be left away.",
)
@click.option(
    "--device-map",
    type=click.Choice(["auto", "balanced", "balanced_low_0", "sequential"]),
    default=None,
    help="In transformers: lay the layers on all GPUs, in one process.",
)
@click.option(
    "--engine-arg",
    type=_Setting(),
    multiple=True,
    help="With vllm: an argument of vllm.LLM, such as gpu_memory_utilization=0.8; repeatable.",
)
@click.option("--device", default="", help="cpu, cuda, ... (default: a GPU if there is one).")
@click.option("--dtype", help="float32, bfloat16, ... (default: the checkpoint's).")
@click.option("--revision", help="Revision of the model on the hub.")
@click.option("--trust-remote-code", is_flag=True, help="Run code that comes with the model.")
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads for the target.")
@click.option(
    "--credits",
    type=click.IntRange(min=1),
    help="Requests held at once: with 2 the next is here when one ends. With --coalesce-tokens, "
    "twice as many as should run together. [2, in vLLM 16]",
)
@click.option(
    "--coalesce-tokens",
    type=click.IntRange(min=0),
    metavar="N",
    help="Run waiting requests in one forward of at most N tokens, padded; may change last bits. "
    "[0, in vLLM 8192]",
)
@click.option(
    "--compile/--no-compile",
    help="Run the target's layers as code of torch.compile; may change last bits.",
)
@click.option(
    "--canary/--no-canary",
    default=True,
    help="Before attaching: compare a few prompts alone, together, and with transformers'.",
)
@click.option(
    "--drain-s",
    type=NOT_NEGATIVE,
    default=30.0,
    show_default=True,
    help="Seconds to finish on SIGTERM.",
)
@click.option("--name", help="This worker's own name (default: host, pid, random).")
@direct_options.options(worker=True)
@click.option(
    "--http", help="Serve /metrics, /status and /healthz on HOST:PORT (default: nowhere)."
)
@operators.option
@logs.options
def worker(
    broker: tuple[str, ...],
    key: str | None,
    broker_key: tuple[str, ...],
    target: str | None,
    target_factory: str | None,
    factory_arg: tuple[tuple[str, object], ...],
    model_name: str,
    aux_layers: tuple[int, ...] | None,
    layers: tuple[int, ...] | None,
    tp: int | None,
    device_map: str | None,
    engine_arg: tuple[tuple[str, object], ...],
    device: str,
    dtype: str | None,
    revision: str | None,
    trust_remote_code: bool,
    threads: int | None,
    credits: int | None,
    coalesce_tokens: int | None,
    compile: bool,
    canary: bool,
    drain_s: float,
    name: str | None,
    direct: DirectConfig,
    http: str | None,
    http_token: str | Path | None,
) -> None:
    """Serve a frozen target until SIGTERM, which drains: finish what is held, take nothing new.

    A second SIGTERM, or SIGINT, leaves at once; the broker gives the requests to others.
    """
    import torch

    from broker.notify import notify
    from broker.signals import wait_until
    from worker.canary import prove
    from worker.errors import WorkerError
    from worker.last_resort import LastResort
    from worker.service import Worker
    from worker.targets import (
        compile_target,
        load_factory,
        load_parallel_target,
        load_target,
        load_vllm_target,
    )

    for endpoint in broker:  # before a model is loaded
        addresses.connecting(endpoint)
    if (target is None) == (target_factory is None):
        raise click.UsageError("give either --target or --target-factory")
    if threads is not None:
        torch.set_num_threads(threads)
    in_vllm = target is not None and target.startswith(_VLLM)
    if factory_arg and target_factory is None:
        raise click.UsageError("--factory-arg is for --target-factory")
    if not in_vllm and (layers or engine_arg):
        raise click.UsageError("--layers and --engine-arg are for --target vllm:MODEL")
    if device_map and (in_vllm or target_factory or tp is not None):
        raise click.UsageError("--device-map is for a model in transformers, without --tp")
    if tp is not None and target_factory:
        raise click.UsageError("--tp is for --target; a factory makes its own ranks")
    if tp == 0 and in_vllm:
        raise click.UsageError("say on how many GPUs vLLM should run: --tp N")
    chosen: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "aux_layer_ids": aux_layers,
        "revision": revision,
    }
    served: Target
    if target is None:
        served = load_factory(
            str(target_factory), name=model_name, arguments=dict(factory_arg), options=chosen
        )
    elif in_vllm:
        served = load_vllm_target(
            target.removeprefix(_VLLM),
            tensor_parallel=tp or 1,
            layers=layers or (),
            trust_remote_code=trust_remote_code,
            options=dict(engine_arg),
            **chosen,
        )
    elif tp is not None:
        served = part = load_parallel_target(
            target, size=tp, trust_remote_code=trust_remote_code, **chosen
        )
        if not part.leads:
            part.follow()
            return
    else:
        served = load_target(
            target, device_map=device_map or "", trust_remote_code=trust_remote_code, **chosen
        )
    if compile:
        compile_target(served)
    if canary:
        prove(served, quantised="quantization" in dict(engine_arg))
    service = Worker(
        served,
        broker,
        model=model_name,
        name=name,
        credits=credits or (_VLLM_CREDITS if in_vllm else 2),
        drain_s=drain_s,
        coalesce_tokens=(_VLLM_TOKENS if in_vllm else 0)
        if coalesce_tokens is None
        else coalesce_tokens,
        direct=direct,
        http=http,
        http_token=http_token,
        key=key,
        broker_key=broker_key,
    )

    def leave(number: int, frame: object) -> None:
        if number == signal.SIGTERM and not service.leaving:
            notify("STOPPING=1")
            service.drain("SIGTERM")
        else:
            service.leave_now()

    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    try:
        with LastResort(drain_s + _GRACE_S) as resort, service:
            try:
                _wait_for_a_broker(service)
                wait_until(service.wait)
            except WorkerError:
                resort.begin()  # a target that broke may hang, and never let its thread go
                raise
    finally:
        close = getattr(served, "close", None)
        if close is not None:
            close()


def _wait_for_a_broker(service: Worker) -> None:
    """Tell systemd that this worker is ready when a broker has welcomed it, and until then why it
    is not; that may take as long as it takes.
    """
    from broker.notify import notify
    from broker.signals import wait_until

    def ready(timeout_s: float) -> bool:
        if not service.trouble:
            notify("READY=1\nSTATUS=serving")
            return True
        notify(f"STATUS={service.trouble}\nEXTEND_TIMEOUT_USEC={_STARTING_US}")
        return service.wait(timeout_s)

    wait_until(ready)
