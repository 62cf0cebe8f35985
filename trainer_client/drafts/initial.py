"""A draft that a run begins from, of any trainer: whether it fits, and what is taken from it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer_client.drafts.export import draft_folder, read_config, read_draft
from trainer_client.drafts.layers import aux_layer_ids
from trainer_client.eagle3.draft import Eagle3Draft
from trainer_client.errors import ExportError

#: What a draft has by its vocabulary or from its target, and not by training alone.
_OF_THE_RUN = ("embed_tokens.weight", "lm_head.weight", "d2t", "t2d")


@dataclass(frozen=True)
class Initial:
    """A draft as it was before the run."""

    draft: Eagle3Draft
    #: a hash of all its files
    content: str


def read_initial(folder: Path, info: Mapping[str, Any], embeddings: Tensor) -> Initial:
    """Read a draft of ours, NeMo AutoModel's, SpecForge's or speculators'.

    ``info`` describes the target (``model_info()``), whose ``embeddings`` are [V, H]. Raises
    :class:`ExportError` for a draft that was made for another target or for other layers of it.
    """
    check_fit(folder, info["model"], info["hidden_size"], info["vocab_size"])
    draft = read_draft(draft_folder(folder), embeddings)
    _check_layers(folder, aux_layer_ids(folder), info["aux_layer_ids"])
    _check_count(folder, draft.config.num_aux_hidden_states, info["aux_layer_ids"])
    content = hashlib.blake2b(digest_size=16)
    for file in sorted(each for each in draft_folder(folder).iterdir() if each.is_file()):
        content.update(file.name.encode())
        with file.open("rb") as opened:
            while block := opened.read(1 << 20):
                content.update(block)
    return Initial(draft, content.hexdigest())


@torch.no_grad()
def begin_from(draft: Eagle3Draft, given: Eagle3Draft) -> int:
    """Give ``draft`` the weights of ``given``, whose network it has; return how many tokens of its
    vocabulary have their row of the head from there. The other rows stay as they are.
    """
    taken = {n: t for n, t in given.state_dict().items() if n not in _OF_THE_RUN}
    draft.load_state_dict(taken, strict=False)
    place = torch.full((draft.config.vocab_size,), -1)
    place[given.selected_token_ids] = torch.arange(given.config.draft_vocab_size)
    rows = place[draft.selected_token_ids]
    known = rows >= 0
    draft.lm_head.weight[known] = given.lm_head.weight[rows[known]].to(draft.lm_head.weight.dtype)
    return int(known.sum())


def _check_layers(folder: Path, reads: Sequence[int] | None, sent: Sequence[int]) -> None:
    if reads is not None and list(reads) != list(sent):
        said = ",".join(map(str, reads))
        raise ExportError(
            f"{folder} reads the layers {list(reads)} of its target, and the workers send "
            f"{list(sent)}; start them with --aux-layers {said}"
        )


def _check_count(folder: Path, reads: int, sent: Sequence[int]) -> None:
    if reads != len(sent):
        raise ExportError(f"{folder} reads {reads} layers of its target; workers send {len(sent)}")


def check_fit(draft: Path, target: str, hidden_size: int, vocab_size: int) -> None:
    """Raise :class:`ExportError` where a draft was made for a target of other sizes."""
    config: dict[str, Any] = read_config(draft)
    hidden = config.get("target_hidden_size") or config.get("hidden_size")
    sizes = {
        "hidden size": (hidden, hidden_size),
        "vocabulary": (config.get("vocab_size"), vocab_size),
    }
    differing = [
        f"{name} {of_draft} and the target {of_target}"
        for name, (of_draft, of_target) in sizes.items()
        if of_draft is not None and of_draft != of_target
    ]
    if differing:
        raise ExportError(
            f"{draft} was not made for {target!r}: the draft has a {', and a '.join(differing)}; "
            "name the target that it was trained with"
        )
