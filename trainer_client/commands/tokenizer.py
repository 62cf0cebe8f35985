"""The tokenizer that a command reads text with."""

from __future__ import annotations

from typing import Any

from trainer_client.errors import TrainerClientError
from trainer_client.targets.remote import RemoteEagle3TargetModel


def served_tokenizer(target: RemoteEagle3TargetModel) -> str:
    """The name of the target's own. Waits for the first worker.

    Raises :class:`TrainerClientError` where the target names none.
    """
    name = str(target.model_info()["tokenizer"])
    if not name:
        raise TrainerClientError("the target names no tokenizer; say --tokenizer")
    return name


def load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """Of a name on the hub, a path, or 'embedded'."""
    from transformers import AutoTokenizer

    from worker.targets import resolve

    return AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
