"""Runs that begin from a draft: ours, or another trainer's."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.integration.conftest import make_target
from tests.integration.test_runs import run, stopped, target
from tests.integration.test_training import ByteTokenizer, settings, weights
from tests.trainer_client.drafts.test_variants import as_speculators, change, outside
from trainer_client.drafts.export import read_draft
from trainer_client.errors import ExportError
from trainer_client.targets.colocated import ColocatedTarget
from trainer_client.training import plan
from trainer_client.training.identity import RunError
from trainer_client.training.run import train
from trainer_client.training.settings import TrainSettings


@pytest.fixture
def first(tmp_path: Path) -> TrainSettings:
    """A short run; its draft is what the others begin from."""
    wanted = settings(tmp_path, "first", max_steps=4, draft_vocab_size=48)
    run(wanted)
    return wanted


def begun(wanted: TrainSettings, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """The weights that a run begins with, and its summary."""
    made: list[dict[str, torch.Tensor]] = []
    fresh = plan.make_draft

    def noted(*arguments: Any) -> Any:
        draft = fresh(*arguments)
        made.append({name: tensor.clone() for name, tensor in draft.state_dict().items()})
        return draft

    monkeypatch.setattr("trainer_client.training.run.make_draft", noted)
    return made, run(wanted)


def test_a_run_begins_with_the_weights_and_the_vocabulary_of_a_draft(
    tmp_path: Path, first: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever family and size the new run's settings name."""
    wanted = settings(tmp_path, "second", max_steps=1, draft="eagle3", draft_vocab_size=99)
    wanted = dataclasses.replace(wanted, init_from=str(first.output))
    (made,), _ = begun(wanted, monkeypatch)
    expected = read_draft(first.output).state_dict()
    assert made.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())


def test_rows_of_the_head_follow_their_tokens_into_another_vocabulary(
    tmp_path: Path, first: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = settings(tmp_path, "second", max_steps=1, draft_vocab_size=64)
    wanted = dataclasses.replace(wanted, init_from=str(first.output), init_vocab="data")
    (made,), _ = begun(wanted, monkeypatch)
    before = read_draft(first.output)
    rows = dict(zip(before.selected_token_ids.tolist(), before.lm_head.weight, strict=True))
    ids = (made["d2t"] + torch.arange(64)).tolist()
    known = [place for place, token in enumerate(ids) if token in rows]
    assert 0 < len(known) < 64
    for place in known:
        assert torch.equal(made["lm_head.weight"][place], rows[ids[place]])
    assert torch.equal(made["fc.weight"], before.fc.weight)


def test_a_draft_of_speculators_is_begun_from(
    tmp_path: Path, first: TrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = first.output / "draft"
    expected = read_draft(theirs).state_dict()
    change(theirs, as_speculators)
    wanted = settings(tmp_path, "second", max_steps=1)
    (made,), _ = begun(dataclasses.replace(wanted, init_from=str(theirs)), monkeypatch)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in made.items())


def test_a_resumed_run_has_the_network_of_the_draft_that_it_began_from(
    tmp_path: Path, first: TrainSettings
) -> None:
    wanted = settings(tmp_path, "second", max_steps=4, draft="eagle3", checkpoint_every=2)
    wanted = dataclasses.replace(wanted, init_from=str(first.output))
    run(wanted)
    whole = weights(wanted.output)
    half = dataclasses.replace(wanted, output=tmp_path / "half")
    stopped(half, 2)
    moved = (first.output / "draft").rename(tmp_path / "moved")
    run(dataclasses.replace(half, resume=True, init_from=str(moved)))
    again = weights(half.output)
    assert whole.keys() == again.keys()
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
    (moved / "notes.txt").write_text("another draft now")
    with pytest.raises(RunError, match="initial_draft is "):
        run(dataclasses.replace(half, max_steps=5, resume=True, init_from=str(moved)))


def test_a_draft_that_does_not_fit_is_one_sentence(tmp_path: Path, first: TrainSettings) -> None:
    wanted = dataclasses.replace(settings(tmp_path, "second"), init_from=str(first.output))
    info = target().model_info()
    other = [layer + 1 for layer in info["aux_layer_ids"]]

    class Elsewhere(ColocatedTarget):
        def model_info(self) -> dict[str, Any]:
            return {**super().model_info(), "aux_layer_ids": other}

    with pytest.raises(ExportError, match=r"reads the layers .* start them with --aux-layers"):
        train(wanted, Elsewhere(make_target(), "probs"), ByteTokenizer())
    change(first.output / "draft", outside(hidden_size=8, target_hidden_size=8))
    with pytest.raises(ExportError, match="was not made for"):
        run(wanted)
    with pytest.raises(ExportError, match="cannot be read as a draft"):
        run(dataclasses.replace(wanted, init_from=str(tmp_path / "nowhere")))
