"""Training data: JSONL with ``text`` or ``messages``, or plain text; also ``.gz`` and ``.xz``.

Every sample says where it came from, and what cannot be used is an error with file and line.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import lzma
import math
import zlib
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from trainer_client.errors import DataError

_OPENERS: dict[str, Callable[..., IO[str]]] = {".gz": gzip.open, ".xz": lzma.open}
_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens; the loss counts where ``loss_mask`` is 1."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    origin: str  # file:line


@dataclass(frozen=True)
class Dataset:
    """All samples of a file, and what was cut or left out on the way."""

    samples: list[Sample]
    truncated: int
    without_loss: int

    @property
    def n_tokens(self) -> int:
        return sum(len(sample.input_ids) for sample in self.samples)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of what is trained: all tokens and loss masks, in their order."""
        content = hashlib.blake2b(digest_size=16)
        for sample in self.samples:
            content.update(len(sample.input_ids).to_bytes(8, "little"))
            content.update(array("q", sample.input_ids).tobytes())
            content.update(bytes(sample.loss_mask))
        return content.hexdigest()


@dataclass(frozen=True)
class MicroBatch:
    """Samples padded on the right to the longest; int64 [B, T] each."""

    input_ids: Tensor
    attention_mask: Tensor
    loss_mask: Tensor
    origins: tuple[str, ...]


def read_dataset(path: Path, tokenizer: Any, max_length: int) -> Dataset:
    """Read and tokenize a data file. Raises :class:`DataError` with the line that is wrong."""
    samples, truncated, without_loss = [], 0, 0
    for sample in _samples(path, tokenizer, max_length):
        if len(sample.input_ids) > max_length:
            truncated += 1
            ids, mask = sample.input_ids[:max_length], sample.loss_mask[:max_length]
            sample = Sample(ids, mask, sample.origin)
        if any(sample.loss_mask[1:]):  # the first token is never predicted
            samples.append(sample)
        else:
            without_loss += 1
    if not samples:
        raise DataError(
            f"{path} has no sample with anything to learn from ({without_loss} had no loss within "
            f"{max_length} tokens); give more data or a larger --max-length"
        )
    return Dataset(samples, truncated, without_loss)


def _samples(path: Path, tokenizer: Any, max_length: int) -> Iterator[Sample]:
    name = path.name
    for suffix in _OPENERS:
        name = name.removesuffix(suffix)
    if name.endswith(".jsonl"):
        for number, line in _lines(path):
            if line.strip():
                yield _from_json(f"{path}:{number}", line, tokenizer)
    else:
        text = "".join(line for _, line in _lines(path))
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        for at in range(0, len(ids) - 1, max_length):
            part = tuple(ids[at : at + max_length])
            yield Sample(part, (1,) * len(part), f"{path}:token {at}")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    try:
        with _OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number + 1} is not UTF-8: {error.reason}; convert it") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


def _from_json(origin: str, line: str, tokenizer: Any) -> Sample:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{origin} is not JSON: {error}; one object a line is wanted") from None
    if not isinstance(record, dict) or ("text" in record) == ("messages" in record):
        raise DataError(f'{origin} wants an object with either "text" or "messages"')
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str) or not text:
            raise DataError(f'{origin}: "text" must be a string that is not empty')
        _check_text(origin, text)
        ids = tuple(tokenizer(text, verbose=False)["input_ids"])
        return Sample(ids, (1,) * len(ids), origin)
    return _from_messages(origin, record["messages"], tokenizer)


def _from_messages(origin: str, messages: Any, tokenizer: Any) -> Sample:
    """Tokens of a conversation, with loss on what the assistant says."""
    _check_messages(origin, messages)
    text = _render(origin, messages, tokenizer)
    _check_text(origin, text)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _render(origin, messages[:index], tokenizer, add_generation_prompt=True)
            after = _render(origin, messages[: index + 1], tokenizer)
            if not (text.startswith(before) and text.startswith(after)):
                raise DataError(
                    f"{origin}: the chat template renders message {index + 1} differently when "
                    "more follow, so its tokens cannot be told; train on one assistant turn a line"
                )
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    mask = tuple(
        int(any(begin < last and first < end for first, last in spans))
        for begin, end in encoded["offset_mapping"]
    )
    return Sample(tuple(encoded["input_ids"]), mask, origin)


def _check_text(origin: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ascii(text[error.start])
        raise DataError(f"{origin} has {half}, half of a surrogate pair; repair the text") from None


def _render(origin: str, messages: Sequence[Any], tokenizer: Any, **options: Any) -> str:
    if not messages:
        return ""
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))
    except Exception as error:  # jinja's errors, and what templates raise on purpose
        raise DataError(f"{origin}: the chat template does not take this: {error}") from None


def _check_messages(origin: str, messages: Any) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f'{origin}: "messages" must be a list that is not empty')
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise DataError(f"{origin}: message {number} is not an object")
        if message.get("role") not in _ROLES:
            raise DataError(
                f"{origin}: message {number} has the role {message.get('role')!r}; roles are "
                f"{', '.join(_ROLES)}"
            )
        if not isinstance(message.get("content"), str):
            raise DataError(f"{origin}: message {number} has no content that is a string")
    if all(message["role"] != "assistant" for message in messages):
        raise DataError(f"{origin} has no assistant turn, so there is nothing to learn from")


def collate(samples: Sequence[Sample]) -> MicroBatch:
    """Pad samples on the right to the longest of them."""
    length = max(len(sample.input_ids) for sample in samples)
    shape = (len(samples), length)
    ids, attention, loss = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    for row, sample in enumerate(samples):
        count = len(sample.input_ids)
        ids[row, :count] = torch.tensor(sample.input_ids)
        attention[row, :count] = 1
        loss[row, :count] = torch.tensor(sample.loss_mask)
    return MicroBatch(ids, attention, loss, tuple(sample.origin for sample in samples))


@dataclass(frozen=True)
class Schedule:
    """Which samples make each step, and who trains on which: a pure function of the step.

    Every epoch is a permutation of its own (seed and epoch alone decide), cut into global batches,
    of which the last of an epoch may be smaller: each sample is trained once an epoch. A global
    batch is dealt round, so ranks differ by one sample at the most, and the same samples make the
    same steps on any number of ranks.
    """

    n_samples: int
    #: samples of one optimizer step, over all ranks
    global_batch: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.n_samples / self.global_batch)

    def samples(self, step: int) -> list[int]:
        """Sample numbers of a step, from 0, in their order."""
        epoch, within = divmod(step, self.steps_per_epoch)
        begin = within * self.global_batch
        order = _order(self.n_samples, self.seed, epoch)
        mine: list[int] = order[begin : begin + self.global_batch].tolist()
        return mine

    def micro_batches(self, step: int, rank: int, world: int, batch_size: int) -> list[list[int]]:
        """Sample numbers of each micro-batch of ``rank`` of ``world`` at ``step``, all from 0."""
        mine = self.samples(step)[rank::world]
        return [mine[at : at + batch_size] for at in range(0, len(mine), batch_size)]


@functools.lru_cache(maxsize=2)
def _order(n_samples: int, seed: int, epoch: int) -> Tensor:
    """The permutation of one epoch; made once, for it takes as long as there are samples."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(n_samples, generator=generator)
