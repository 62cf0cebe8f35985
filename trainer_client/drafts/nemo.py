"""What NeMo AutoModel's EAGLE-3 recipe writes: where its drafts are, and what its config means.

Read from NeMo AutoModel 0.7. A run has ``checkpoints/epoch_E_step_S/`` with ``config.yaml`` (the
recipe's settings) and ``model/consolidated/`` (the draft, whose config is the target's with the
draft's own settings in it).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer_client.errors import ExportError
from worker.errors import TargetError
from worker.targets.contract import choose_aux_layer_ids

#: Beside NeMo's own files in a checkpoint: which target the draft was trained for.
TARGET_FILE = "draftmq_target.json"
#: Where a checkpoint has the draft.
_INSIDE = Path("model", "consolidated")
#: What NeMo's draft does not read of the config that it took from its target.
_OF_THE_TARGET = ("layer_types", "sliding_window")


def is_nemos(config: Mapping[str, Any]) -> bool:
    """Whether NeMo AutoModel has written this ``config.json`` of a draft."""
    said = config.get("architectures")
    names = said if isinstance(said, list) else []
    return "speculators_model_type" not in config and any(
        "Eagle3DraftModel" in str(name) for name in names
    )


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of NeMo's in the form that engines load.

    Its ``num_hidden_layers`` is that of the target, but for P-EAGLE; the draft has one layer, which
    attends to everything.
    """
    plain = {name: value for name, value in config.items() if name not in _OF_THE_TARGET}
    if not config.get("parallel_drafting"):
        plain["num_hidden_layers"] = 1
    plain.setdefault("hidden_act", config.get("hidden_activation"))  # Gemma's name
    return plain


def find_draft(folder: Path) -> Path | None:
    """The draft in a checkpoint of NeMo's, or in the newest checkpoint of a run; None without one.

    Raises :class:`ExportError` where that checkpoint's weights are not put together.
    """
    checkpoints = [folder] if (folder / "model").is_dir() else _checkpoints(folder)
    if not checkpoints:
        return None
    draft = checkpoints[-1] / _INSIDE
    if not (draft / "config.json").is_file():
        raise ExportError(
            f"{checkpoints[-1]} has no {_INSIDE}/config.json: its weights lie in shards; run its "
            "model/consolidate.sh, or train with checkpoint.save_consolidated: true"
        )
    return draft


def _checkpoints(run: Path) -> list[Path]:
    """Oldest first."""
    found = {
        (int(match[2]), int(match[1])): each
        for place in (run, run / "checkpoints")
        for each in place.glob("epoch_*_step_*")
        if (match := re.fullmatch(r"epoch_(\d+)_step_(\d+)", each.name))
    }
    return [found[step] for step in sorted(found)]


def aux_layer_ids(draft: Path, config: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that a draft of NeMo's reads, which its own config never says.

    What lies beside it says so, else they are NeMo's default for a target of that depth. Raises
    :class:`ExportError` where two files disagree, or there is no default.
    """
    said = dict(_said_beside(draft.resolve()))
    if len(set(said.values())) > 1:
        both = " and ".join(f"{list(layers)} in {path}" for path, layers in said.items())
        raise ExportError(f"the aux layers of {draft} are {both}; say which by --aux-layers")
    if said:
        return next(iter(said.values()))
    try:
        return choose_aux_layer_ids(None, int(config["num_hidden_layers"]))
    except (KeyError, TypeError, ValueError, TargetError) as error:
        raise ExportError(
            f"the aux layers of {draft} are not said ({error}); say --aux-layers"
        ) from error


def _said_beside(draft: Path) -> Iterator[tuple[Path, tuple[int, ...]]]:
    import yaml  # which transformers brings

    checkpoint = draft.parents[len(_INSIDE.parts) - 1]
    ours, theirs = checkpoint / TARGET_FILE, checkpoint / "config.yaml"
    try:
        if ours.is_file():
            yield ours, tuple(json.loads(ours.read_text(encoding="utf-8"))["aux_layer_ids"])
        if theirs.is_file():
            recipe = yaml.safe_load(theirs.read_text(encoding="utf-8")).get("recipe_args") or {}
            if recipe.get("aux_layer_ids"):
                yield theirs, tuple(recipe["aux_layer_ids"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ExportError(f"what lies beside {draft} cannot be read: {error}") from error
