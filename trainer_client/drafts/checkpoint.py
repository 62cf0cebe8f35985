"""Checkpoints: written whole or not at all, read without pickle.

``checkpoints/step-000100/`` holds ``draft.safetensors`` (the weights), ``optimizer.pt`` (read with
``weights_only``), ``state.json`` (the step, and the settings that a resumed run must share), and
``draft.json`` and ``target.json`` (sizes and target facts, for an export). All else that a run
needs is a function of these: data order and learning rate follow from the step.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.errors import TrainerClientError


class CheckpointError(TrainerClientError):
    """A checkpoint cannot be written or read."""


@dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint on disk."""

    directory: Path
    step: int
    settings: Mapping[str, Any]

    def selected_token_ids(self) -> Tensor:
        """Its vocabulary: target ids, int64 [D]. Raises :class:`CheckpointError`."""
        try:
            with safe_open(self.directory / "draft.safetensors", framework="pt") as file:
                offsets: Tensor = file.get_tensor("d2t")
        except Exception as error:  # what a damaged file makes safetensors raise is anything
            raise self._damaged(error) from error
        return offsets + torch.arange(offsets.numel())

    def restore(self, draft: Eagle3Draft, optimizer: torch.optim.Optimizer | None) -> None:
        """Load weights and optimizer state in place. Raises :class:`CheckpointError`."""
        try:
            draft.load_state_dict(load_file(self.directory / "draft.safetensors"))
            if optimizer is not None:
                path = self.directory / "optimizer.pt"
                # by way of the CPU: the run may go on where there is no GPU, or another one
                state = torch.load(path, map_location="cpu", weights_only=True)
                optimizer.load_state_dict(state)
        except Exception as error:  # what a damaged file makes torch raise is anything
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"cannot resume from {self.directory}: {error!r}; remove it, to go on from the one "
            "before it"
        )


def save(
    directory: Path,
    step: int,
    draft: Eagle3Draft,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    target_info: Mapping[str, Any],
    keep: int,
    best: int | None = None,
) -> Path:
    """Write a checkpoint beside its place and move it there; keep the newest ``keep``, and the one
    of the step ``best``.

    Raises :class:`CheckpointError`; the older checkpoints are then as they were.
    """
    final = directory / f"step-{step:06d}"
    unfinished = directory / f".{final.name}.{os.getpid()}"
    try:
        unfinished.mkdir(parents=True)
        save_file(draft.state_dict(), unfinished / "draft.safetensors")
        torch.save(optimizer.state_dict(), unfinished / "optimizer.pt")
        for name, content in {
            "draft.json": asdict(draft.config),
            "target.json": dict(target_info),
            "state.json": {"step": step, "settings": dict(settings)},
        }.items():
            (unfinished / name).write_text(json.dumps(content, indent=1))
        for file in unfinished.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        if final.exists():
            _remove(final)
        unfinished.rename(final)
    except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk is turned into
        shutil.rmtree(unfinished, ignore_errors=True)
        free = shutil.disk_usage(directory).free >> 20 if directory.exists() else 0
        raise CheckpointError(
            f"cannot write the checkpoint {final} ({free} MiB are free there): {error}; older "
            "checkpoints are untouched; make room, then --resume"
        ) from error
    for old in complete(directory)[:-keep]:
        if old.step != best:
            _remove(old.directory)
    return final


def clean(directory: Path) -> None:
    """Remove what processes that were killed have left unfinished; no other may be writing."""
    for left in directory.glob(".step-*"):
        shutil.rmtree(left, ignore_errors=True)


def _remove(checkpoint: Path) -> None:
    """So that it is never seen in part, whenever this process is killed."""
    gone = checkpoint.with_name(f".{checkpoint.name}.gone")
    checkpoint.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def complete(directory: Path) -> list[Checkpoint]:
    """All complete checkpoints, oldest first; unfinished ones (leading dot) are not looked at."""
    found = []
    for path in sorted(directory.glob("step-*/state.json")):
        try:
            state = json.loads(path.read_text())
            found.append(Checkpoint(path.parent, int(state["step"]), state["settings"]))
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path} is damaged: {error}; remove {path.parent}") from None
    return sorted(found, key=lambda checkpoint: checkpoint.step)
