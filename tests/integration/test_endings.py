"""What strikes a run costs at most the step under way, and nothing is learned wrongly."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from broker import logs
from tests.integration.conftest import Cluster, make_target
from tests.integration.test_processes import PATIENCE_S, Commands, commands, draftmq
from tests.integration.test_runs import Ends, run, stopped, target
from tests.integration.test_training import ByteTokenizer, settings, weights
from tests.vocab import shuffled
from tests.waiting import eventually
from trainer_client.errors import DeadlineError, TrainerClientError
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.training import metrics, plan
from trainer_client.training.early import look_first
from trainer_client.training.identity import RunError
from trainer_client.training.place import held
from trainer_client.training.probe import probe
from trainer_client.training.ranks import Ranks
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings
from trainer_client.training.trainer import NonFiniteError
from worker.supervision.mapping import VocabMapping

__all__ = ["commands"]  # the fixture


def checkpoints(output: Path) -> list[str]:
    return sorted(path.name for path in (output / "checkpoints").iterdir())


# -- what is resumed ------------------------------------------------------------------------------


def test_a_run_is_not_resumed_to_an_end_that_lies_behind_it(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=6)
    run(wanted)
    before = (wanted.output / "summary.json").read_text()
    with pytest.raises(RunError, match="6 steps behind it, and 4 are wanted now"):
        run(dataclasses.replace(wanted, max_steps=4, resume=True))
    assert (wanted.output / "summary.json").read_text() == before


def test_a_finished_run_that_is_resumed_says_the_same_of_itself(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=4)
    first, again = run(wanted), run(dataclasses.replace(wanted, resume=True))
    for name in ("loss", "simulated_accept_length", "steps", "peak_memory_bytes"):
        assert again[name] == first[name], name


def test_a_resumed_run_keeps_the_vocabulary_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another release would choose other tokens from the same data."""
    wanted = settings(tmp_path, "run", max_steps=6)
    stopped(wanted, 3)
    other = VocabMapping(shuffled(torch.arange(64) + 100), 256)
    monkeypatch.setattr(plan, "frequent_tokens", lambda *_: (other, 1.0))
    asked: list[VocabMapping] = []

    class Told(ColocatedTarget):
        def set_vocab_mapping(self, ids: torch.Tensor, mask: torch.Tensor) -> None:
            asked.append(VocabMapping.from_mask_and_ids(ids, mask))
            super().set_vocab_mapping(ids, mask)

    again = dataclasses.replace(wanted, resume=True)
    train(again, Told(make_target(), "probs"), ByteTokenizer())
    said = json.loads((wanted.output / "run.json").read_text())
    assert said["mapping"] == asked[0].id != other.id
    draft = weights(wanted.output)
    assert torch.equal(draft["d2t"] + torch.arange(64), asked[0].selected_token_ids)


class Renamed(ByteTokenizer):
    """The same tokens for the same text, from another vocabulary."""

    def get_vocab(self) -> dict[str, int]:
        return {"a": 1}


def test_another_tokenizer_is_another_run(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run")
    stopped(wanted, 2)
    with pytest.raises(RunError, match="tokenizer is "):
        train(dataclasses.replace(wanted, resume=True), target(), Renamed())


def test_settings_of_the_data_that_change_no_token_are_free(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=4)
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"input_ids": [n, n + 1, 7]}) + "\n" for n in range(9)))
    wanted = dataclasses.replace(wanted, data=data)
    stopped(wanted, 2)
    again = dataclasses.replace(wanted, resume=True, skip_bad_lines=True, max_length=30)
    assert run(again)["steps"] == 4
    shorter = dataclasses.replace(again, max_length=2)
    with pytest.raises(RunError, match=r"max_length is .* data_content is "):
        run(shorter)


@pytest.mark.parametrize("edit", ["a line of the same length", "the same lines in another order"])
def test_an_edited_file_with_as_many_lines_is_other_data(tmp_path: Path, edit: str) -> None:
    data = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": f"line number {n} of ten"}) for n in range(10)]
    wanted = dataclasses.replace(settings(tmp_path, "run", max_steps=4), data=data)
    data.write_text("\n".join(lines))
    stopped(wanted, 2)
    edited = [lines[0].replace("0", "9"), *lines[1:]] if "length" in edit else lines[::-1]
    data.write_text("\n".join(edited))
    with pytest.raises(RunError, match="data_content is "):
        run(dataclasses.replace(wanted, resume=True))


# -- one process in one directory -----------------------------------------------------------------


def test_two_processes_do_not_train_into_one_directory(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=2)
    with held(wanted.output), pytest.raises(RunError, match="another process trains into"):
        run(wanted)
    assert run(wanted)["steps"] == 2


def test_an_output_that_cannot_be_written_is_said_before_anything_is_asked(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    wanted = dataclasses.replace(settings(tmp_path, "run"), output=tmp_path / "file" / "run")
    with pytest.raises(RunError, match="cannot write to --output"):
        run(wanted)


def test_a_place_that_cannot_be_written_is_said_before_a_worker_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    wanted = settings(tmp_path, "run")
    with pytest.raises(RunError, match=r"cannot write to --output .*/file is a file"):
        look_first(dataclasses.replace(wanted, output=tmp_path / "file"))
    monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path)
    with pytest.raises(RunError, match="is read-only for this user"):
        look_first(dataclasses.replace(wanted, output=tmp_path / "new" / "run"))
    assert not (tmp_path / "new").exists()


def test_what_killed_processes_left_unfinished_goes_away(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=4)
    stopped(wanted, 2)
    left = wanted.output / "checkpoints" / ".step-000003.4711"
    left.mkdir()
    (left / "draft.safetensors").write_bytes(b"half")
    run(dataclasses.replace(wanted, resume=True))
    assert checkpoints(wanted.output) == ["step-000002", "step-000004"]


def test_a_damaged_checkpoint_says_what_to_do(tmp_path: Path) -> None:
    wanted = settings(tmp_path, "run", max_steps=4)
    stopped(wanted, 2)
    (wanted.output / "checkpoints" / "step-000002" / "draft.safetensors").write_bytes(b"half")
    with pytest.raises(
        TrainerClientError, match=r"step-000002.*; remove it, to go on from the one"
    ):
        run(dataclasses.replace(wanted, resume=True))


def test_a_full_disk_costs_metrics_and_not_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = metrics.MetricsLog(tmp_path / "metrics.jsonl")
    log._file = open("/dev/full", "a")  # noqa: SIM115 - closed by the log
    log.write({"step": 1})
    log.write({"step": 2})
    log.__exit__(None, None, None)
    assert caplog.messages == ["metrics_not_written"]


# -- requests that fail ---------------------------------------------------------------------------


def test_a_request_that_fails_costs_no_step_that_was_done(tmp_path: Path) -> None:
    class Leaves(ColocatedTarget):
        asked = 0

        def generate_batch(self, *tokens: Any) -> Any:
            self.asked += 1
            if self.asked == 8:
                raise DeadlineError("deadline", "nobody answered")
            return super().generate_batch(*tokens)

    wanted = settings(tmp_path, "run")
    with pytest.raises(TrainerClientError, match=r"nobody answered; the run ended after step 7 of"):
        train(wanted, Leaves(make_target(), "probs"), ByteTokenizer())
    assert checkpoints(wanted.output) == ["step-000007"]


def with_a_bad_token(token: int) -> Any:
    """A target that overflows on one token."""
    made = make_target()

    def overflow(module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.masked_fill((inputs[0] == token).unsqueeze(-1), torch.inf)

    made.model.get_input_embeddings().register_forward_hook(overflow)
    return made


def samples_with_one_bad(tmp_path: Path, **changes: Any) -> TrainSettings:
    data = tmp_path / "data.jsonl"
    lines = [[n, n + 1, n + 2, 250 if n == 5 else 7, 9] for n in range(12)]
    data.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in lines))
    return dataclasses.replace(settings(tmp_path, "run", **changes), data=data, max_steps=0)


def test_a_sample_that_the_target_overflows_on_is_left_out_alone_and_named(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.worker(with_a_bad_token(250))
    wanted = samples_with_one_bad(tmp_path, batch_size=3)
    with pytest.raises(NonFiniteError, match=r"from .*data.jsonl:6; .*the target gave nan"):
        train(wanted, cluster.trainer(encoding="probs"), ByteTokenizer())
    again = dataclasses.replace(wanted, resume=True, skip_non_finite=1)
    summary = train(again, cluster.trainer(encoding="probs"), ByteTokenizer())
    (left_out,) = summary["samples_not_finite"]
    assert left_out.endswith("data.jsonl:6")
    assert all(tensor.isfinite().all() for tensor in weights(wanted.output).values())


@pytest.mark.parametrize("remote", [True, False])
@pytest.mark.parametrize("what", ["lm_head", "model.embed_tokens"])
def test_weights_that_are_not_finite_are_not_blamed_on_a_sample(
    cluster: Cluster, tmp_path: Path, what: str, remote: bool
) -> None:
    made = make_target()
    with torch.no_grad():
        made.model.get_submodule(what).weight[101] = torch.inf
    cluster.worker(made)
    backend = cluster.trainer() if remote else ColocatedTarget(made, "hidden")
    wanted = dataclasses.replace(settings(tmp_path, "run", max_steps=2), skip_non_finite=1000)
    with pytest.raises(TrainerClientError, match=r"is (the|its) checkpoint whole\?"):
        train(wanted, backend, ByteTokenizer())


def test_the_other_samples_of_its_step_are_learned_as_if_it_were_not_there(tmp_path: Path) -> None:
    """In one run a sample is bad when it comes; in the other it never was in that step."""
    wanted = samples_with_one_bad(tmp_path, batch_size=4)
    bad = ColocatedTarget(with_a_bad_token(250), "probs")
    summary = train(dataclasses.replace(wanted, skip_non_finite=1), bad, ByteTokenizer())
    assert len(summary["samples_not_finite"]) == 1

    class Without(ColocatedTarget):
        def generate_batch(self, *tokens: torch.Tensor) -> Any:
            rows = (tokens[0] != 250).all(-1)
            return super().generate_batch(*(each[rows] for each in tokens))

    other = dataclasses.replace(wanted, output=tmp_path / "other")
    train(other, Without(make_target(), "probs"), ByteTokenizer())
    expected = weights(other.output)
    for name, tensor in weights(wanted.output).items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-5, rtol=1e-4)


# -- several ranks --------------------------------------------------------------------------------


def _rank(
    rank: int, world: int, place: str, meeting: str, wanted: TrainSettings, what: str
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.FileStore(meeting, world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=_PATIENCE)
    ranks = Ranks(rank, world)
    ends = Ends(3 if rank == 1 and what == "stop" else 0)
    said = ""
    made = with_a_bad_token(250) if what == "bad" else make_target()
    try:
        train(
            wanted if rank == 0 else dataclasses.replace(wanted, output=Path(place, f"rank{rank}")),
            ColocatedTarget(made, "probs"),
            ByteTokenizer(),
            ranks=ranks,
            on_step=ends,
            stop=ends.stop,
        )
    except TrainerClientError as error:
        said = f"{type(error).__name__}: {error}"
    Path(place, f"{what}{rank}.txt").write_text(said)
    ranks.leave()


_PATIENCE = timedelta(seconds=60)


def _spawn(tmp_path: Path, wanted: TrainSettings, what: str, world: int = 2) -> list[str]:
    # A new file to meet at each time: one left by ranks that are gone names their addresses.
    meeting = tempfile.mkdtemp(dir=tmp_path) + "/store"
    mp.spawn(_rank, (world, str(tmp_path), meeting, wanted, what), nprocs=world)
    return [(tmp_path / f"{what}{rank}.txt").read_text() for rank in range(world)]


@pytest.mark.heavy
def test_a_signal_to_one_rank_stops_all_and_only_rank_0s_disk_is_read_again(tmp_path: Path) -> None:
    """Hosts of a cluster need share no disk: what rank 0 goes on with, all go on with."""
    wanted = settings(tmp_path, "run", max_steps=8)
    said = _spawn(tmp_path, wanted, "stop")
    assert "stopped by SIGTERM after step" in said[1]
    assert "stopped by " in said[0]
    assert "a checkpoint of it is in" in said[0]
    (kept,) = checkpoints(wanted.output)
    assert kept in ("step-000003", "step-000004")
    again = dataclasses.replace(wanted, resume=True)
    assert _spawn(tmp_path, again, "again") == ["", ""]
    whole = settings(tmp_path, "whole", max_steps=8)
    assert _spawn(tmp_path, whole, "whole") == ["", ""]
    expected = weights(whole.output)
    assert all(torch.equal(t, expected[name]) for name, t in weights(wanted.output).items())


@pytest.mark.heavy
def test_a_bad_sample_on_one_rank_is_named_on_all_and_left_out_on_all(tmp_path: Path) -> None:
    wanted = samples_with_one_bad(tmp_path, batch_size=1)
    said = _spawn(tmp_path, wanted, "bad")
    assert all("NonFiniteError" in text and "data.jsonl:6" in text for text in said)
    again = dataclasses.replace(wanted, resume=True, skip_non_finite=1)
    assert _spawn(tmp_path, again, "bad") == ["", ""]
    summary = json.loads((wanted.output / "summary.json").read_text())
    assert len(summary["samples_not_finite"]) == 1
    assert all(tensor.isfinite().all() for tensor in weights(wanted.output).values())


@pytest.mark.heavy
def test_ranks_measure_together_what_one_measures(tmp_path: Path) -> None:
    changes = {"batch_size": 1, "global_batch": 2, "validation": "0.25", "draft_vocab_size": 256}
    wanted = samples_with_one_bad(tmp_path, **changes)
    assert _spawn(tmp_path, wanted, "measured") == ["", ""]
    alone = dataclasses.replace(wanted, output=tmp_path / "alone")
    summary = run(alone)
    both = json.loads((wanted.output / "summary.json").read_text())
    assert both["best_step"] == summary["best_step"]
    assert both["validation_loss"] == pytest.approx(summary["validation_loss"], abs=1e-4)


# -- signals to real processes ---------------------------------------------------------------------


@pytest.mark.heavy
def test_a_trainer_that_waits_for_a_worker_ends_when_it_is_asked(commands: Commands) -> None:
    commands.broker()
    trainer = commands.trainer()
    log = "trainer_client2"
    eventually(lambda: commands.status().get("clients"), PATIENCE_S)
    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(PATIENCE_S) == 1
    assert "stopped by SIGTERM before the first step" in commands.processes.log(log)


def test_a_typo_in_the_data_is_found_before_a_worker_is_waited_for(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "good"}\n{"txt": "typo"}\n')
    nobody = ["--broker", "tcp://127.0.0.1:1", "--data", data, "--output", tmp_path / "run"]
    done = draftmq("train", *nobody)
    assert done.returncode == 1
    assert f"draftmq: {data}:2 " in done.stderr
    assert "event=settings" in done.stderr.splitlines()[0]
    assert not (tmp_path / "run").exists()


def test_a_measured_file_that_is_missing_is_found_as_early(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "good"}\n')
    nobody = ["--broker", "tcp://127.0.0.1:1", "--data", data, "--output", tmp_path / "run"]
    done = draftmq("train", *nobody, "--validation", tmp_path / "nowhere.jsonl")
    assert done.returncode == 1
    assert "nowhere.jsonl" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("seed", [2**63, -(2**32)])
def test_a_seed_that_torch_does_not_take_is_refused(tmp_path: Path, seed: int) -> None:
    with pytest.raises(ValueError, match=f"seed must lie .*, got {seed}"):
        settings(tmp_path, "run", seed=seed)


def test_log_lines_of_ranks_name_their_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_always", {})
    logs.name_lines(rank=3)
    record = logging.makeLogRecord({"msg": "step", "fields": {"loss": 1}})
    assert "event=step rank=3 loss=1" in logs._Formatter("logfmt").format(record)


def test_a_dry_run_says_what_the_run_would_be_and_writes_nothing(tmp_path: Path) -> None:
    wanted = samples_with_one_bad(tmp_path, epochs=2)
    before = sorted(tmp_path.rglob("*"))
    found = probe(wanted, target(), ByteTokenizer())
    assert sorted(tmp_path.rglob("*")) == before
    summary = run(wanted)
    for name in ("samples", "steps", "global_batch", "draft_vocab_size", "draft_vocab_coverage"):
        assert found[name] == summary[name], name
    assert found["probe_tokens"] == 2 * 5
    assert found["seconds"] > 0
    assert found["peak_memory_bytes"] > 0


@pytest.mark.heavy
def test_the_command_of_a_dry_run_says_it_as_json(commands: Commands, tmp_path: Path) -> None:
    commands.broker()
    commands.worker("w")
    done = draftmq("train", *commands.training(commands.output), "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["encoding"] == "probs"
    assert not commands.output.exists()


def test_held_out_samples_are_measured_and_not_trained_and_the_best_checkpoint_stays(
    tmp_path: Path,
) -> None:
    trained: set[tuple[int, ...]] = set()

    class Seen(ColocatedTarget):
        def generate_batch(self, *tokens: torch.Tensor) -> Any:
            if torch.is_grad_enabled():  # what is measured asks without
                trained.update(tuple(row.tolist()) for row in tokens[0])
            return super().generate_batch(*tokens)

    changes = {"validation": "0.25", "checkpoint_every": 2, "keep_checkpoints": 1, "epochs": 4}
    wanted = samples_with_one_bad(tmp_path, **changes, learning_rate=0.5, draft_vocab_size=256)
    summary = train(wanted, Seen(make_target(), "probs"), ByteTokenizer())
    assert (summary["samples"], summary["samples_held_out"], len(trained)) == (9, 3, 9)
    lines = metrics.read(wanted.output / "validation.jsonl")
    best = min(lines, key=lambda line: line["loss"])
    assert len({line["loss"] for line in lines}) > 1
    assert [line["step"] for line in lines] == list(range(2, summary["steps"] + 1, 2))
    assert (summary["best_step"], summary["validation_loss"]) == (best["step"], best["loss"])
    kept = {f"step-{best['step']:06d}", f"step-{summary['steps']:06d}"}
    assert set(checkpoints(wanted.output)) == kept
    with pytest.raises(RunError, match=r"validation is '0\.25' there"):
        run(dataclasses.replace(wanted, validation="0.5", resume=True))


@pytest.mark.parametrize("remote", [True, False])
def test_a_held_out_sample_without_numbers_is_named_and_not_measured(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture, remote: bool
) -> None:
    wanted = samples_with_one_bad(tmp_path, batch_size=3)
    good = tmp_path / "good.jsonl"
    lines = wanted.data.read_text().splitlines(keepends=True)
    good.write_text("".join(line for line in lines if "250" not in line))
    wanted = dataclasses.replace(wanted, data=good, validation=str(tmp_path / "data.jsonl"))
    made = with_a_bad_token(250)
    cluster.worker(made)
    backend = cluster.trainer(encoding="probs") if remote else ColocatedTarget(made, "probs")
    summary = train(wanted, backend, ByteTokenizer())
    only_good = dataclasses.replace(wanted, validation=str(good), output=tmp_path / "good")
    expected = run(only_good)["validation_loss"]
    assert summary["validation_loss"] == pytest.approx(expected, rel=1e-4)
    (said,) = [each for each in caplog.records if each.message == "held_out_left_out"]
    assert said.fields["samples"].endswith("data.jsonl:6")  # type: ignore[attr-defined]


def test_what_was_measured_is_not_there_twice_when_a_run_was_killed(tmp_path: Path) -> None:
    """It had measured, and was killed before the checkpoint of that step was whole."""
    wanted = samples_with_one_bad(tmp_path, validation="0.25", checkpoint_every=2, epochs=2)
    wanted = dataclasses.replace(wanted, keep_checkpoints=9)
    run(wanted)
    lines = (wanted.output / "validation.jsonl").read_text()
    last = checkpoints(wanted.output)[-1]
    shutil.rmtree(wanted.output / "checkpoints" / last)
    run(dataclasses.replace(wanted, resume=True))
    assert checkpoints(wanted.output)[-1] == last
    assert (wanted.output / "validation.jsonl").read_text() == lines


def test_a_measured_file_may_lie_elsewhere_when_a_run_goes_on(tmp_path: Path) -> None:
    wanted = samples_with_one_bad(tmp_path)
    measured = tmp_path / "measured.jsonl"
    measured.write_text(wanted.data.read_text())
    wanted = dataclasses.replace(wanted, validation=str(measured), epochs=1)
    run(wanted)
    moved = measured.rename(tmp_path / "moved.jsonl")
    longer = dataclasses.replace(wanted, validation=str(moved), epochs=2, resume=True)
    assert run(longer)["steps"] == 12
    moved.write_text(wanted.data.read_text() * 2)
    with pytest.raises(RunError, match="validation_content is "):
        run(dataclasses.replace(longer, epochs=3))


@pytest.mark.parametrize("inside", ["draft", "checkpoints", "checkpoints/step-000001", "other/run"])
def test_a_run_does_not_begin_inside_another(tmp_path: Path, inside: str) -> None:
    wanted = settings(tmp_path, "run", max_steps=1)
    run(wanted)
    with pytest.raises(RunError, match=r"lies in the run .*/run, whose files it would mix with"):
        run(dataclasses.replace(wanted, output=wanted.output / inside))


def test_a_run_whose_held_out_samples_all_lack_numbers_has_no_best_checkpoint(
    cluster: Cluster, tmp_path: Path
) -> None:
    cluster.worker(with_a_bad_token(250))
    wanted = samples_with_one_bad(tmp_path)
    held_out = tmp_path / "bad.jsonl"
    held_out.write_text(json.dumps({"input_ids": [1, 2, 250, 7]}) + "\n")
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"input_ids": [1, 2, 3, 7]}) + "\n")
    measured = dataclasses.replace(wanted, data=good, validation=str(held_out))
    summary = train(measured, cluster.trainer(encoding="probs"), ByteTokenizer())
    assert (summary["best_step"], summary["validation_loss"]) == (None, None)
    (line,) = metrics.read(wanted.output / "validation.jsonl")
    assert line["loss"] is None
