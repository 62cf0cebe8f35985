from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
from click.testing import CliRunner

from broker.commands import cli
from broker.core.config import BrokerConfig
from trainer_client.core.config import ClientConfig
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.training.settings import TrainSettings
from worker.direct.channel import ChannelConfig
from worker.direct.config import DirectConfig

NOT_FINITE = [float("nan"), float("inf"), float("-inf")]


def _floats() -> Iterator[tuple[type, str]]:
    for kind in (BrokerConfig, ClientConfig, ChannelConfig, DirectConfig, TrainSettings):
        for field in dataclasses.fields(kind):
            if isinstance(field.default, float):
                yield kind, field.name


@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize(("kind", "name"), list(_floats()))
def test_no_setting_is_infinite_or_nan(kind: type, name: str, value: float) -> None:
    needed: dict[str, Any] = {"data": "d", "output": "o"} if kind is TrainSettings else {}
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        kind(**needed, **{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_patience_with_a_request_is_a_finite_time(value: float) -> None:
    with pytest.raises(ValueError, match=f"timeout must be finite and above 0, .* {value}"):
        RemoteEagle3TargetModel(["tcp://127.0.0.1:1"], timeout=value)


_BROKER = ["broker", "--clients", "tcp://127.0.0.1:0", "--workers", "tcp://127.0.0.1:0"]
_WORKER = ["worker", "--broker", "tcp://127.0.0.1:1", "--target", "embedded"]
_TRAIN = ["train", "--broker", "tcp://127.0.0.1:1", "--data", "none", "--output", "none"]
_CHAOS = ["chaos", "--listen", "tcp://127.0.0.1:0", "--upstream", "tcp://127.0.0.1:1"]


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((_BROKER, name) for name in ("--heartbeat-s", "--liveness-s", "--hedge-after")),
        *((_WORKER, name) for name in ("--drain-s", "--direct-limit-s")),
        *((_TRAIN, name) for name in ("--timeout-s", "--learning-rate", "--max-grad-norm")),
        *((_TRAIN, name) for name in ("--weight-decay", "--warmup-share", "--direct-limit-s")),
        *((_CHAOS, name) for name in ("--cut-every", "--delay", "--duration")),
        (["top"], "--interval"),
    ],
)
def test_no_command_takes_a_number_that_is_none(
    command: list[str], option: str, value: str
) -> None:
    done = CliRunner().invoke(cli, [*command, option, value])
    assert done.exit_code == 2, done.output
    assert value in done.output
