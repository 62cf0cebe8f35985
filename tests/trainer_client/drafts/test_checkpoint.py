from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer_client.drafts.test_export import INFO, make_draft
from trainer_client.drafts import checkpoint
from trainer_client.drafts.checkpoint import CheckpointError, complete, save
from trainer_client.drafts.export import export_checkpoint, read_draft
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.errors import ExportError
from trainer_client.training.trainer import learning_rate, make_optimizer

SETTINGS = {"seed": 0}


def stepped(draft: Eagle3Draft) -> torch.optim.Optimizer:
    """An optimizer with a state to lose."""
    optimizer = make_optimizer(draft, 0.1, 0.0)
    draft.logits(torch.ones(1, 16)).sum().backward()
    optimizer.step()
    return optimizer


def write(directory: Path, step: int, keep: int = 2) -> Eagle3Draft:
    draft = make_draft()
    draft.fc.weight.data.fill_(step)
    save(directory, step, draft, stepped(draft), SETTINGS, INFO, keep)
    return draft


def test_weights_and_optimizer_come_back_as_they_were(tmp_path: Path) -> None:
    draft = make_draft()
    optimizer = stepped(draft)
    save(tmp_path, 7, draft, optimizer, SETTINGS, INFO, 2)
    other = make_draft()
    fresh = make_optimizer(other, 0.1, 0.0)
    (found,) = complete(tmp_path)
    found.restore(other, fresh)
    assert (found.step, found.settings) == (7, SETTINGS)
    for name, tensor in draft.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name
    expected = optimizer.state_dict()["state"]
    for key, state in fresh.state_dict()["state"].items():
        assert torch.equal(state["exp_avg_sq"], expected[key]["exp_avg_sq"])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 10):
        write(tmp_path, step)
    assert [found.step for found in complete(tmp_path)] == [2, 10]


def test_a_full_disk_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint.torch, "save", full)
    said = r"step-000002 \(\d+ MiB are free there\): .*No space left.*older checkpoints"
    with pytest.raises(CheckpointError, match=said):
        write(tmp_path, 2)
    assert [found.step for found in complete(tmp_path)] == [1]
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("name", ["draft.safetensors", "optimizer.pt"])
def test_a_file_that_cannot_be_written_whole_is_said(tmp_path: Path, name: str) -> None:
    """By a real limit: what safetensors and torch make of it is their own."""
    write(tmp_path, 1)
    size = (tmp_path / "step-000001" / name).stat().st_size
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"step-000002 .*older checkpoints"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_an_unfinished_checkpoint_is_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (tmp_path / ".step-000002.123").mkdir()
    assert [found.step for found in complete(tmp_path)] == [1]


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    write(tmp_path, 1)
    (found,) = complete(tmp_path)
    (found.directory / "optimizer.pt").write_bytes(b"\x80\x02.")  # a pickle, not loaded
    draft = make_draft()
    with pytest.raises(CheckpointError, match=r"cannot resume from .*step-000001"):
        found.restore(draft, make_optimizer(draft, 0.1, 0.0))
    (found.directory / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state.json is damaged.*remove"):
        complete(tmp_path)


def test_a_checkpoint_is_exported_as_the_draft_that_it_holds(tmp_path: Path) -> None:
    draft = write(tmp_path / "run" / "checkpoints", 5)
    for source in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-000005"):
        export_checkpoint(source, tmp_path / "out")
        back = read_draft(tmp_path / "out").state_dict()
        for name, tensor in draft.state_dict().items():
            assert torch.equal(back[name], tensor), name
    with pytest.raises(ExportError, match="neither a run with a complete"):
        export_checkpoint(tmp_path / "nothing", tmp_path / "out2")


def test_the_learning_rate_warms_up_and_falls_along_a_cosine() -> None:
    rates = [learning_rate(step, peak=1.0, warmup=4, total=20) for step in range(21)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert rates[20] == pytest.approx(0.1)


def test_norms_are_not_decayed_and_the_embeddings_not_trained() -> None:
    draft = make_draft()
    decayed, spared = make_optimizer(draft, 1e-3, 0.1).param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in spared["params"]} == {1}
    every = [*decayed["params"], *spared["params"]]
    assert not any(p is draft.embed_tokens.weight for p in every)


def test_a_checkpoint_from_a_gpu_is_resumed_on_a_cpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft = make_draft()
    optimizer = stepped(draft)
    with monkeypatch.context() as patch:  # its tensors say where they were
        patch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        save(tmp_path, 7, draft, optimizer, SETTINGS, INFO, 2)
    path = tmp_path / "step-000007" / "optimizer.pt"
    with pytest.raises(RuntimeError, match="CUDA device"):
        torch.load(path, weights_only=True)
    fresh = make_optimizer(make_draft(), 0.1, 0.0)
    (found,) = complete(tmp_path)
    found.restore(make_draft(), fresh)
    expected = optimizer.state_dict()["state"]
    for key, state in fresh.state_dict()["state"].items():
        assert torch.equal(state["exp_avg"], expected[key]["exp_avg"])
