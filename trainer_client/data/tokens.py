"""Text to tokens, with a loss mask that comes from characters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from trainer_client.data.rendering import Spans


class Encoder:
    """One tokenizer. Tokens that it puts before a text come once, wherever they come from."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        bare, dressed = self.plain("a"), list(tokenizer("a", verbose=False)["input_ids"])
        count = len(dressed) - len(bare)
        #: the ids of a beginning of sequence, where the tokenizer has one
        self.begins = tuple(dressed[:count]) if count > 0 and dressed[count:] == bare else ()

    def plain(self, text: str) -> list[int]:
        """Tokens of a text and nothing else."""
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return list(ids)

    def text(self, text: str) -> list[int]:
        """Tokens of a document, with the beginning of sequence once."""
        ids = self.plain(text)
        return [*self.missing(ids), *ids]

    def missing(self, ids: Sequence[int]) -> tuple[int, ...]:
        """The beginning of sequence, where these tokens do not have it."""
        return () if tuple(ids[: len(self.begins)]) == self.begins else self.begins

    def spans(self, rendered: Spans) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """``(input_ids, loss_mask)`` of a rendered conversation, which has its own beginning."""
        try:
            encoded = self._tokenizer(
                rendered.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            offsets = encoded["offset_mapping"]
        except (KeyError, NotImplementedError):  # a tokenizer in Python knows no offsets
            return self.pieces(rendered)
        mask = tuple(
            int(any(begin < last and first < end for first, last in rendered.said))
            for begin, end in offsets
        )
        return tuple(encoded["input_ids"]), mask

    def pieces(self, rendered: Spans) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Each piece by itself, as prompt and answer are when they are served."""
        ids: list[int] = []
        mask: list[int] = []
        for begin, end, said in _cut(rendered.said, len(rendered.text)):
            piece = self.plain(rendered.text[begin:end])
            ids += piece
            mask += [int(said)] * len(piece)
        return tuple(ids), tuple(mask)


def _cut(said: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int, bool]]:
    """A text cut where the assistant begins and ends, with whether it speaks there."""
    pieces, at = [], 0
    for begin, end in said:
        pieces += [(at, begin, False), (begin, end, True)]
        at = end
    return [piece for piece in [*pieces, (at, length, False)] if piece[0] < piece[1]]
