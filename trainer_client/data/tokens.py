"""Text to tokens, with a loss mask that is exact to the character.

A served answer begins with a token of its own: the prompt was tokenized before there was an answer.
Where a tokenizer would merge across the edge of an answer, the text is cut there first.
"""

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
        self._anchor = self._find_anchor()

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
        mask = _mask(offsets, rendered)
        return (tuple(encoded["input_ids"]), mask) if mask else self.pieces(rendered)

    def pieces(self, rendered: Spans) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Each piece by itself, as prompt and answer are when they are served."""
        ids: list[int] = []
        mask: list[int] = []
        for begin, end, said in _cut(rendered.said, len(rendered.text)):
            text = rendered.text[begin:end]
            piece = self._goes_on(text) if begin else self.plain(text)
            ids += piece
            mask += [int(said)] * len(piece)
        return tuple(ids), tuple(mask)

    def _goes_on(self, text: str) -> list[int]:
        """Tokens of a text in the middle of another, without what marks a text's beginning."""
        if self._anchor is None:
            return self.plain(text)
        word, token = self._anchor
        ids = self.plain(word + text)
        return ids[1:] if ids and ids[0] == token else self.plain(text)

    def _find_anchor(self) -> tuple[str, int] | None:
        """A special token that is one token and swallows nothing of the text behind it."""
        for word in map(str, getattr(self._tokenizer, "all_special_tokens", ())):
            ids, spaced = self.plain(word), self.plain(word + " a")
            if len(ids) == 1 and spaced[:1] == ids and spaced != self.plain(word + "a"):
                return word, ids[0]
        return None


def _mask(offsets: Sequence[tuple[int, int]], rendered: Spans) -> tuple[int, ...] | None:
    """Which tokens the assistant says; None where offsets do not show each edge of an answer.

    They do not where a token lies across an edge, or where a tokenizer trims white space off its
    offsets beside one.
    """
    edges = iter([edge for span in rendered.said for edge in span])
    edge: int | None = next(edges)
    said, at = 0, 0
    mask = []
    for first, last in offsets:
        if first == last:
            return None
        while edge is not None and edge <= first:
            if at < first and at <= edge:
                return None
            edge, said = next(edges, None), 1 - said
        if edge is not None and first < edge < last:
            return None
        mask.append(said)
        at = max(at, last)
    return tuple(mask)


def _cut(said: Sequence[tuple[int, int]], length: int) -> list[tuple[int, int, bool]]:
    """A text cut where the assistant begins and ends, with whether it speaks there."""
    pieces, at = [], 0
    for begin, end in said:
        pieces += [(at, begin, False), (begin, end, True)]
        at = end
    return [piece for piece in [*pieces, (at, length, False)] if piece[0] < piece[1]]
