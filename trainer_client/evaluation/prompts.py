"""What ``draftmq eval`` decodes: prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from trainer_client.errors import DataError
from trainer_client.training.data import Sample, read_dataset


def load_prompts(
    tokenizer: Any,
    target: str,
    path: Path | None,
    count: int,
    prompt_tokens: int,
    template_options: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """``count`` prompts, spread evenly over the file.

    Of a conversation a prompt ends where an assistant's turn begins, as it is served; of running
    text it is the first ``prompt_tokens``. ``template_options`` are those of training
    (:func:`trainer_client.data.reading.template_options`). Raises :class:`DataError` when there is
    no file and the target is not the embedded one.
    """
    if path is not None:
        samples = read_dataset(path, tokenizer, 4096, template_options=template_options).samples
        found = [tuple(each) for sample in samples for each in _prompts(sample, prompt_tokens)]
        prompts = [list(prompt) for prompt in dict.fromkeys(found)]
        return prompts[:: max(1, len(prompts) // count)][:count]
    if target != "embedded":
        raise DataError("say --prompts FILE; only the embedded target brings prompts of its own")
    from worker.targets.embedded import heldout

    tokens = tokenizer(heldout(), add_special_tokens=False, verbose=False)["input_ids"]
    stride = max(prompt_tokens, len(tokens) // count)
    return [tokens[at : at + prompt_tokens] for at in range(0, stride * count, stride)][:count]


def _prompts(sample: Sample, prompt_tokens: int) -> Iterator[list[int]]:
    """What stands before each answer of a sample; the beginning of one that is all text."""
    ids, mask = list(sample.input_ids), sample.loss_mask
    begins = [at for at in range(1, len(ids)) if mask[at] and not mask[at - 1]]
    if begins:
        yield from (ids[:at] for at in begins)
    elif len(ids) >= 2:
        yield ids[:prompt_tokens]
