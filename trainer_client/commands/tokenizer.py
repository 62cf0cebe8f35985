"""The tokenizer that a command reads text with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from trainer_client.errors import TrainerClientError

if TYPE_CHECKING:
    from trainer_client.targets.remote import RemoteEagle3TargetModel

#: Help of options that say how text is read, by their names.
TEMPLATE_HELP = {
    "chat_template": "File with a chat template to use in the place of the tokenizer's.",
    "chat_template_args": "What the template is told, name=value; may be repeated.",
}


def served_tokenizer(target: RemoteEagle3TargetModel) -> str:
    """The name of the target's own. Waits for the first worker.

    Raises :class:`TrainerClientError` where the target names none.
    """
    name = str(target.model_info()["tokenizer"])
    if not name:
        raise TrainerClientError("the target names no tokenizer; say --tokenizer")
    return name


def load_tokenizer(name: str, trust_remote_code: bool) -> Any:
    """Of a name on the hub, a path, or 'embedded'.

    Raises :class:`TrainerClientError` where there is none, or where it is code that may not run.
    """
    from transformers import AutoTokenizer

    from worker.targets import resolve

    try:
        return AutoTokenizer.from_pretrained(resolve(name), trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error) and not trust_remote_code:
            raise TrainerClientError(
                f"the tokenizer {name!r} is code of its own; --trust-remote-code runs it"
            ) from error
        why = str(error).strip().splitlines()[0]
        raise TrainerClientError(f"cannot load the tokenizer {name!r}: {why}") from error
