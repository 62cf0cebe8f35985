"""The identity of a training run, which the run writes down at its start: ``run.json``.

A resumed run must have the samples, vocabulary, target and settings with which it began, or its
draft would be a mixture of two runs. :data:`FREE` lists what may differ; any other difference is
refused by name. The ranks of a run agree on the identity before the first request.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist

from trainer_client.errors import TrainerClientError
from trainer_client.training.ranks import summing

T = TypeVar("T")
FILE = "run.json"
#: What may be another when a run is resumed: where things lie, how fast they go, when it ends.
FREE = (
    "output",
    "resume",
    "init_from",
    "checkpoint_every",
    "keep_checkpoints",
    "prefetch",
    "prefetch_mib",
    "data",
    "epochs",
    "max_steps",
    "batch_size",
    "accumulation",
    "pack",
    "skip_non_finite",
    "log_to",
    "verify_share",
    "verify_differs",
)
#: What a run was before it was written down.
_BEFORE = {
    "draft": "eagle3",
    "chat_template": "",
    "chat_template_args": [],
    "init_vocab": "keep",
    "initial_draft": "",
}
#: What is written down for people, and for ranks to agree on, and is not compared when a run is
#: resumed.
_TOLD = (
    "versions",
    "ranks",
    "files",
    "settings",
    "total_steps",
    "skip_non_finite",
    "checkpoint_every",
)
#: What decides which tokens are trained: where those are the same it does not matter.
_OF_DATA = ("max_length", "loss_on", "skip_bad_lines", "chat_template", "chat_template_args")
#: What decides which samples are measured on: where those are the same it does not matter.
_OF_VALIDATION = ("validation",)
#: What may differ between the ranks of one run: each may have its own copy of the data.
_OF_ONE_RANK = ("files", "settings", *_OF_VALIDATION)


class RunError(TrainerClientError):
    """This is not the run that lies in the output directory, or ranks do not train the same."""


def versions() -> dict[str, str]:
    """What the run was made with."""
    names = ("draftmq", "torch", "transformers")
    return {name: importlib.metadata.version(name) for name in names}


def read(output: Path) -> dict[str, Any] | None:
    """The identity of the run in a directory; None where there is none. Raises RunError."""
    try:
        said = json.loads((output / FILE).read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(f"{output / FILE} cannot be read: {error}") from error
    if not isinstance(said, dict):
        raise RunError(f"{output / FILE} is no JSON object; it was not written by draftmq")
    return said


def write(output: Path, identity: Mapping[str, Any]) -> None:
    """Write ``run.json``, whole or not at all. Raises :class:`RunError`."""
    write_whole(output / FILE, json.dumps(dict(identity), indent=1, default=str) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Write a file of a run, so that it is never seen in part. Raises :class:`RunError`."""
    unfinished = path.with_name(f".{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise RunError(
            f"cannot write {path}: {error.strerror}; make room, then --resume"
        ) from error


def check_place(output: Path, *, resume: bool) -> dict[str, Any] | None:
    """What run lies there, for a resumed one; None where a new one may begin.

    Raises :class:`RunError` where a new run would mix with an old one's checkpoints and curves.
    """
    for around in output.resolve().parents:
        if (around / FILE).exists():
            raise RunError(
                f"{output} lies in the run {around}, whose files it would mix with; choose an "
                "--output beside it"
            )
    there = read(output)
    checkpoints = any((output / "checkpoints").glob("step-*"))
    if not resume and (there is not None or checkpoints):
        raise RunError(
            f"{output} has a run in it; go on with it (--resume), or choose another --output"
        )
    if resume and there is None and checkpoints:
        raise RunError(
            f"the checkpoints in {output} are of an older draftmq, which did not write down what "
            "run they are of; export them (draftmq export), and begin a run in another --output"
        )
    return there if resume else None


def compare(there: Mapping[str, Any], here: Mapping[str, Any], output: Path) -> None:
    """Raise :class:`RunError` that names what differs between the run there and the one wanted."""
    there = _BEFORE | dict(there)
    free = set(_TOLD)
    for content, deciding in (("data_content", _OF_DATA), ("validation_content", _OF_VALIDATION)):
        if there.get(content) == here.get(content):
            free |= set(deciding)
    differing = [
        f"{name} is {_shown(there.get(name))} there and {_shown(here[name])} here"
        for name in here
        if name not in free and there.get(name) != here[name]
    ]
    if differing:
        raise RunError(
            f"{output} is another run: {'; '.join(differing)}; resume with what it began with, or "
            "choose another --output"
        )


def agree(
    rank: int, world: int, make: Callable[[], T], shown: Callable[[T], Mapping[str, Any]]
) -> T:
    """Have every rank make its own, and see that all made the same before anything is asked.

    Raises what ``make`` raised here, and :class:`RunError` where another rank failed or differs.
    """
    made, error = None, None
    try:
        made = make()
    except Exception as raised:
        error = raised
    if world > 1:
        mine = {"error": str(error) if error else "", "made": dict(shown(made)) if made else {}}
        everyone: list[Any] = [None] * world
        with summing():
            dist.all_gather_object(everyone, mine)
        if error is None:
            _refuse_others(rank, everyone)
    if error is not None:
        raise error
    assert made is not None
    return made


def _refuse_others(rank: int, everyone: list[dict[str, Any]]) -> None:
    for other, theirs in enumerate(everyone):
        if theirs["error"]:
            raise RunError(f"rank {other} cannot train: {theirs['error']}")
    first = everyone[0]["made"]
    for other, theirs in enumerate(everyone):
        differing = [
            name
            for name in first
            if name not in _OF_ONE_RANK and theirs["made"].get(name) != first[name]
        ]
        if differing:
            said = "; ".join(
                f"{name} is {_shown(first[name])} on rank 0 and "
                f"{_shown(theirs['made'].get(name))} on rank {other}"
                for name in differing
            )
            raise RunError(
                f"the ranks would not train the same: {said}; give all the same files and options"
            )


def tokenizer_hash(tokenizer: Any) -> str:
    """A hash of what a tokenizer is: its tokens, its special ones and its chat template."""
    vocab: Mapping[str, int] = getattr(tokenizer, "get_vocab", dict)()
    said = {
        "vocab": sorted(vocab.items()),
        "special": sorted(map(str, getattr(tokenizer, "all_special_tokens", ()))),
        "chat_template": getattr(tokenizer, "chat_template", None),
    }
    text = json.dumps(said, default=str, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
