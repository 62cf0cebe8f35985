"""What ``draftmq eval`` decodes: prompts, and the layers that a draft was trained on."""

from __future__ import annotations

import json
from pathlib import Path

from trainer_client.errors import DataError, ExportError
from trainer_client.training.data import read_dataset


def load_prompts(
    tokenizer_name: str, target: str, path: Path | None, count: int, prompt_tokens: int
) -> list[list[int]]:
    """The first tokens of ``count`` samples, spread evenly over the file.

    Raises :class:`DataError` when there is no file and the target is not the embedded one.
    """
    from transformers import AutoTokenizer

    from worker.targets import resolve

    if not tokenizer_name:
        raise DataError(f"the target {target!r} has no tokenizer beside it")
    tokenizer = AutoTokenizer.from_pretrained(resolve(tokenizer_name))
    if path is not None:
        ids = [list(sample.input_ids) for sample in read_dataset(path, tokenizer, 4096).samples]
        prompts = [tokens[:prompt_tokens] for tokens in ids if len(tokens) >= 2]
        return prompts[:: max(1, len(prompts) // count)][:count]
    if target != "embedded":
        raise DataError("say --prompts FILE; only the embedded target brings prompts of its own")
    from worker.targets.embedded import heldout

    tokens = tokenizer(heldout(), add_special_tokens=False, verbose=False)["input_ids"]
    stride = max(prompt_tokens, len(tokens) // count)
    return [tokens[at : at + prompt_tokens] for at in range(0, stride * count, stride)][:count]


def aux_layer_ids(draft: Path) -> tuple[int, ...] | None:
    """The layers whose outputs a draft reads, as its config says; None where it does not."""
    try:
        config = json.loads((draft / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise ExportError(f"{draft} is no draft: {error}") from error
    name = "eagle_aux_hidden_state_layer_ids"
    if layers := (config.get("eagle_config") or {}).get(name):
        return tuple(layers)
    return tuple(index - 1 for index in config.get(name) or ()) or None
