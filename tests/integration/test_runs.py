"""A run is the one that it began as, or says why not; it ends well when it is asked to end."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import make_target
from tests.integration.test_processes import PATIENCE_S, Commands, commands, losses
from tests.integration.test_training import ByteTokenizer, settings, weights
from tests.waiting import eventually
from trainer_client.drafts.export import read_draft
from trainer_client.errors import TrainerClientError
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.training import identity, metrics
from trainer_client.training.identity import RunError, agree
from trainer_client.training.plan import make_plan
from trainer_client.training.ranks import Ranks
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from trainer_client.training.stopping import Stop
from trainer_client.training.trainer import NonFiniteError, StepMetrics

__all__ = ["commands"]  # the fixture


def target() -> ColocatedTarget:
    return ColocatedTarget(make_target(), "probs")


def run(wanted: TrainSettings, **options: Any) -> dict[str, Any]:
    return train(wanted, target(), ByteTokenizer(), **options)


class Ends:
    """Asks the run to stop after a step, as a signal does."""

    def __init__(self, step: int) -> None:
        self.stop = Stop()
        self._step = step

    def __call__(self, step: StepMetrics) -> None:
        if step.step == self._step:
            self.stop.by = "SIGTERM"


def stopped(wanted: TrainSettings, step: int) -> None:
    ends = Ends(step)
    with pytest.raises(TrainerClientError, match=f"stopped by SIGTERM after step {step} of"):
        run(wanted, on_step=ends, stop=ends.stop)


def test_a_run_that_is_asked_to_stop_leaves_a_checkpoint_and_goes_on_with_equal_bits(
    tmp_path: Path,
) -> None:
    whole, parts = settings(tmp_path, "whole"), settings(tmp_path, "parts")
    run(whole)
    stopped(parts, 7)
    assert (parts.output / "checkpoints" / "step-000007").is_dir()
    run(dataclasses.replace(parts, resume=True))
    expected = weights(whole.output)
    assert all(torch.equal(t, expected[name]) for name, t in weights(parts.output).items())
    assert len(metrics.read(parts.output / "metrics.jsonl")) == 50


def test_a_run_is_not_resumed_on_other_data(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run")
    stopped(wanted, 3)
    with wanted.data.open("a") as file:
        file.write(" and some more text that was not there before" * 40)
    with pytest.raises(RunError, match=r"data_content is .* there and .* here"):
        run(dataclasses.replace(wanted, resume=True))


def test_the_same_data_may_lie_elsewhere_and_a_run_may_be_lengthened(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=4)
    run(wanted)
    moved = tmp_path / "moved.txt"
    wanted.data.rename(moved)
    longer = dataclasses.replace(wanted, data=moved, max_steps=6, resume=True, keep_checkpoints=5)
    assert run(longer)["steps"] == 6


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed is 0 there and 1 here"),
        ({"learning_rate": 1e-4}, "learning_rate is 0.003 there"),
        ({"draft_vocab_size": 32}, "draft_vocab_size is 64 there"),
        ({"global_batch": 5}, "global_batch is 2 there and 5 here"),
    ],
)
def test_what_makes_a_run_another_is_refused_by_name(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    wanted = settings(tmp_path, "run")
    stopped(wanted, 2)
    with pytest.raises(RunError, match=said):
        run(dataclasses.replace(wanted, resume=True, **change))


def test_another_target_is_another_run(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run")
    stopped(wanted, 2)
    other = make_target()
    with torch.no_grad():
        other.model.lm_head.weight.add_(0.01)
    other = type(other)(other.model, name=other.name)
    again = dataclasses.replace(wanted, resume=True)
    with pytest.raises(RunError, match="target is "):
        train(again, ColocatedTarget(other, "probs"), ByteTokenizer())


def test_a_second_run_does_not_mix_with_the_first(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=4)
    run(wanted)
    before = weights(wanted.output)
    with pytest.raises(RunError, match="has a run in it; go on with it"):
        run(dataclasses.replace(wanted, seed=1))
    after = weights(wanted.output)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())


def test_checkpoints_of_an_older_release_are_refused_with_what_to_do(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=4)
    run(wanted)
    (wanted.output / identity.FILE).unlink()
    with pytest.raises(RunError, match="export them"):
        run(dataclasses.replace(wanted, resume=True))


def test_a_value_that_is_not_finite_leaves_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Infinite(ColocatedTarget):
        asked = 0

        def generate_batch(self, *tokens: Any) -> Any:
            batch = super().generate_batch(*tokens)
            self.asked += 1
            if self.asked == 30:
                batch.aux_hidden_states[0, 3, 0] = torch.inf
            return batch

    wanted = settings(tmp_path, "run")
    with pytest.raises(NonFiniteError, match=r"step 30 .* from .*data.txt:token \d+"):
        train(wanted, Infinite(make_target(), "probs"), ByteTokenizer())
    kept = sorted(path.name for path in (wanted.output / "checkpoints").iterdir())
    assert kept == ["step-000020"]
    again = dataclasses.replace(wanted, resume=True)
    summary = run(again)
    assert all(tensor.isfinite().all() for tensor in weights(wanted.output).values())
    assert json.loads((wanted.output / "summary.json").read_text())["loss"] == summary["loss"]


def test_metrics_and_summary_are_json_whatever_the_numbers(tmp_path: Path) -> None:
    log = metrics.MetricsLog(tmp_path / "m.jsonl")
    log.write({"step": 1, "grad_norm": float("nan"), "depth_accuracy": [0.5, float("inf")]})
    log.__exit__(None, None, None)
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "step": 1,
        "grad_norm": None,
        "depth_accuracy": [0.5, None],
    }


def test_the_ranks_of_a_run_agree_before_the_first_request(monkeypatch: pytest.MonkeyPatch) -> None:
    def gathers(*others: dict[str, Any]) -> None:
        def gather(everyone: list[Any], mine: Any) -> None:
            everyone[:] = [mine, *others]

        monkeypatch.setattr(identity.dist, "all_gather_object", gather)

    made = {"samples": 10, "data_content": "a"}
    gathers({"error": "", "made": made})
    assert agree(0, 2, lambda: made, dict) == made
    gathers({"error": "", "made": made | {"data_content": "b"}})
    with pytest.raises(RunError, match="data_content is 'a' on rank 0 and 'b' on rank 1"):
        agree(0, 2, lambda: made, dict)
    gathers({"error": "b.jsonl:7 is not JSON", "made": {}})
    with pytest.raises(RunError, match=r"rank 1 cannot train: b.jsonl:7 is not JSON"):
        agree(0, 2, lambda: made, dict)


@pytest.mark.parametrize(
    "change", [{"checkpoint_every": 7}, {"skip_non_finite": 1}, {"max_steps": 9}, {"seed": 3}]
)
def test_ranks_with_other_options_do_not_train_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """All of these decide when ranks wait for each other, or for what."""
    wanted = settings(tmp_path, "run", max_steps=8)
    other = dataclasses.replace(wanted, **change)
    mine, theirs = (
        make_plan(each, target(), ByteTokenizer(), Ranks(0, 2)).identity for each in (wanted, other)
    )

    def gather(everyone: list[Any], said: Any) -> None:
        everyone[:] = [said, {"error": "", "made": theirs}]

    monkeypatch.setattr(identity.dist, "all_gather_object", gather)
    (name,) = change
    shown = "total_steps" if name == "max_steps" else name
    with pytest.raises(RunError, match=f"{shown} is .* on rank 0 and .* on rank 1"):
        agree(0, 2, lambda: mine, dict)


def test_a_resumed_run_keeps_its_global_batch_on_other_ranks(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", accumulation=3)
    plan = make_plan(wanted, target(), ByteTokenizer(), Ranks(0, 2))
    assert plan.schedule.global_batch == 12
    for world in (1, 3):
        again = make_plan(wanted, target(), ByteTokenizer(), Ranks(0, world), plan.identity)
        assert again.schedule == plan.schedule
        assert again.total_steps == plan.total_steps


# -- real processes -----------------------------------------------------------------------------


@pytest.mark.heavy
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_a_trainer(commands: Commands, number: signal.Signals) -> None:
    commands.broker()
    commands.worker("w")
    trainer = commands.trainer()
    eventually(lambda: commands.steps() >= 5, PATIENCE_S)
    trainer.send_signal(number)
    trainer.send_signal(number)  # as torchrun hands on what the terminal has sent already
    assert trainer.wait(PATIENCE_S) == 1
    text = commands.processes.log("trainer_client3")
    assert f"stopped by {number.name} after step" in text
    assert "--resume goes on" in text
    done = commands.steps()
    assert (commands.output / "checkpoints" / f"step-{done:06d}").is_dir()


@pytest.mark.heavy
def test_two_ranks_then_one_then_three_make_one_run(commands: Commands, tmp_path: Path) -> None:
    commands.broker()
    commands.worker("w")
    output = tmp_path / "ranks"
    for ranks, until in ((2, 6), (1, 12), (3, None)):
        process = commands.ranks(ranks, output)
        if until is None:
            assert process.wait(PATIENCE_S) == 0
        else:
            eventually(lambda until=until: commands.steps(output) >= until, PATIENCE_S)
            os.kill(process.pid, signal.SIGTERM)
            assert process.wait(PATIENCE_S) != 0
    lines = metrics.read(output / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    rates = [line["learning_rate"] for line in lines]
    peak = rates.index(max(rates))
    assert rates[peak:] == sorted(rates[peak:], reverse=True)
    assert all(
        tensor.isfinite().all() for tensor in read_draft(output / "draft").state_dict().values()
    )
    assert losses(output)[-1] < losses(output)[0]
