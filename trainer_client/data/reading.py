"""Blocks of a file to packed samples: records understood, rendered, tokenized, cut."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer_client.data.files import BadLine, Block, Record
from trainer_client.data.records import Chat, Text, Tokens, understand
from trainer_client.data.rendering import Renderer, Spans, sound
from trainer_client.data.samples import ENTRY, LOSS, WORD, Part, pack
from trainer_client.data.tokens import Encoder
from trainer_client.errors import DataError


@dataclass(frozen=True)
class Options:
    """What decides, beside the data and the tokenizer, which samples there are."""

    #: tokens of a sample; what is longer is cut
    max_length: int
    #: leave out what cannot be used, and count it by reason
    skip_bad_lines: bool = False
    #: assistant turns with loss: all, or each conversation's last
    loss_on: str = "all"
    #: for the chat template; ``chat_template`` among them is another template
    template_options: Mapping[str, Any] | None = None


def template_options(file: str, pairs: Sequence[str]) -> dict[str, Any]:
    """What a chat template is told, of ``name=value`` pairs; and the template itself, of a file.

    Raises :class:`DataError` for a file that cannot be read, and for what is no pair.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        name, mark, value = pair.partition("=")
        if not mark or not name.isidentifier():
            raise DataError(f"chat-template-args wants name=value, got {pair!r}")
        try:
            options[name] = json.loads(value)
        except ValueError:
            options[name] = value
    if file:
        try:
            options["chat_template"] = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"cannot read the chat template {file}: {error}") from None
    return options


class Reader:
    """Blocks to parts, with one tokenizer."""

    def __init__(self, tokenizer: Any, options: Options) -> None:
        self._encoder = Encoder(tokenizer)
        self._renderer = Renderer(
            tokenizer, loss_on=options.loss_on, options=options.template_options
        )
        self._options = options

    def read(self, block: Block, file: int) -> Part:
        """The samples of a block of the file with this number.

        The first record that cannot be used ends the part, unless such are to be left out.
        """
        part = Part(np.empty(0, WORD), np.empty(0, ENTRY))
        entries: list[tuple[int, int, int, int]] = []
        pieces: list[Any] = []
        length = 0
        for record in block.records():
            try:
                if isinstance(record, BadLine):
                    raise record
                known = understand(record)
                found = list(self._samples(record, known))
            except BadLine as error:
                if not self._options.skip_bad_lines:
                    part.failed = str(error), error.reason
                    break
                part.left_out[error.reason] += 1
                continue
            part.kinds[_KINDS[type(known)]] += 1
            for token, words in found:
                if len(words) > self._options.max_length:
                    part.truncated += 1
                    words = words[: self._options.max_length]
                if not (words[1:] >= LOSS).any():  # the first token is never predicted
                    part.without_loss += 1
                    continue
                entries.append((length, file, record.number, token))
                pieces.append(words)
                length += len(words)
        part.entries = np.array(entries, ENTRY)
        part.words = np.concatenate([*pieces, part.words])
        return part

    def _samples(self, record: Record, known: Text | Tokens | Chat) -> Iterator[tuple[int, Any]]:
        """What a record has to train on, each with its place in running text, or -1."""
        origin = record.origin
        if isinstance(known, Tokens):
            yield -1, pack(known.input_ids, known.loss_mask)
        elif isinstance(known, Chat):
            for each in self._renderer.samples(origin, known, self._too_long):
                yield -1, pack(*self._encoder.spans(each))
        elif isinstance(record.value, str):
            yield from self._cut(sound(origin, known.text))
        elif known.said:  # in pieces, as it is served: what was asked, then the rest
            spans = Spans(sound(origin, known.text), known.said)
            ids, mask = self._encoder.pieces(spans)
            begins = self._encoder.missing(ids)
            yield -1, pack((*begins, *ids), (*(0 for _ in begins), *mask))
        else:
            ids = tuple(self._encoder.text(sound(origin, known.text)))
            yield -1, pack(ids, (1,) * len(ids))

    def _too_long(self, prompt: str) -> bool:
        most = self._options.max_length
        return len(prompt) > most and len(self._encoder.plain(prompt)) >= most

    def _cut(self, text: str) -> Iterator[tuple[int, Any]]:
        """Running text in samples of full length, each with the beginning of sequence."""
        begins, ids = self._encoder.begins, self._encoder.plain(text)
        size = max(1, self._options.max_length - len(begins))
        for at in range(0, len(ids) - 1, size):
            cut = (*begins, *ids[at : at + size])
            yield at, pack(cut, (1,) * len(cut))


_KINDS: Mapping[type, str] = {Chat: "conversation", Tokens: "tokens", Text: "text"}
