"""Samples as they lie on a disk: four bytes a token, and twenty a sample that say where it is."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

import numpy as np

from trainer_client.data.files import origin

#: A token is its id with the loss in the highest bit; uint32, little endian.
WORD = np.dtype("<u4")
LOSS = 1 << 31
#: Of a sample: where its tokens begin, and what it came from (token: -1, or where in that).
ENTRY = np.dtype([("begin", "<u8"), ("file", "<u4"), ("number", "<u4"), ("token", "<i4")])
#: Tokens that are looked at in one go, where all are.
_AT_ONCE = 1 << 20


@dataclass(frozen=True)
class Sample:
    """One sequence of tokens; the loss counts where ``loss_mask`` is 1."""

    input_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    origin: str  # file:line


@dataclass(frozen=True)
class File:
    """Where samples came from, and the kind of its blocks (:mod:`trainer_client.data.files`)."""

    path: str
    kind: str


class Samples(Sequence[Sample]):
    """Packed samples, which become tuples when they are looked at.

    ``words`` is uint32 [tokens], ``entries`` ENTRY [all samples], both in memory or mapped from
    files; ``numbers`` int64 [n] says which of all samples these are, in their order.
    """

    def __init__(
        self, words: Any, entries: Any, files: Sequence[File], numbers: Any = None
    ) -> None:
        self._words, self._entries, self._files = words, entries, files
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._entries if self._numbers is None else self._numbers)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        if isinstance(at, slice):
            return [self[each] for each in range(*at.indices(len(self)))]
        number = range(len(self))[at]
        if self._numbers is not None:
            number = int(self._numbers[number])
        begin, end = self._edges(number)
        words, entry = self._words[begin:end], self._entries[number]
        ids, mask = words & (LOSS - 1), words >> 31
        return Sample(tuple(ids.tolist()), tuple(mask.tolist()), self._origin(entry))

    def _edges(self, number: int) -> tuple[int, int]:
        entries, after = self._entries, number + 1
        end = entries["begin"][after] if after < len(entries) else len(self._words)
        return int(entries["begin"][number]), int(end)

    def _origin(self, entry: Any) -> str:
        file = self._files[int(entry["file"])]
        where = origin(file.path, file.kind, int(entry["number"]))
        return where if entry["token"] < 0 else f"{where}:token {int(entry['token'])}"

    def taking(self, numbers: Any) -> Samples:
        """Those with these numbers of ours, int64 [n], in their order."""
        own = numbers if self._numbers is None else self._numbers[numbers]
        return Samples(self._words, self._entries, self._files, np.asarray(own, dtype=np.int64))

    @property
    def lengths(self) -> Any:
        """Tokens of each sample, int64 [n]."""
        begins = self._entries["begin"].astype(np.int64)
        every = np.diff(begins, append=len(self._words))
        return every if self._numbers is None else every[self._numbers]

    @property
    def origins(self) -> Any:
        """File, number and token of what each sample came from, structured [n]."""
        every = self._entries[["file", "number", "token"]]
        return every if self._numbers is None else every[self._numbers]

    def packed(self) -> Iterator[tuple[Any, Any]]:
        """All samples as ``(words, lengths)``, some at a time; what was looked at is not kept."""
        lengths = self.lengths
        behind = np.cumsum(lengths)
        at = 0
        while at < len(self):
            done = int(behind[at - 1]) if at else 0
            end = max(at + 1, int(np.searchsorted(behind, done + _AT_ONCE, side="right")))
            yield self._together(at, end), lengths[at:end]
            at = end

    def _together(self, at: int, end: int) -> Any:
        if self._numbers is None:
            return np.array(self._words[self._edges(at)[0] : self._edges(end - 1)[1]])
        pieces = (self._words[slice(*self._edges(int(n)))] for n in self._numbers[at:end])
        return np.concatenate(list(pieces))


def predicted(words: Any, lengths: Any) -> Any:
    """The tokens of packed samples that slots learn: ids [m] where the token before has loss.

    Slot t has read token t + 1 and learns token t + 2, so the first two of a sample are no goal.
    """
    ids, mask = words & (LOSS - 1), words >> 31
    learned = np.zeros(len(words), dtype=bool)
    learned[2:] = mask[1:-1].astype(bool)
    begins = np.cumsum(lengths) - lengths
    learned[begins] = False
    seconds = begins + 1
    learned[seconds[lengths > 1]] = False
    return ids[learned]


class Tally:
    """What is known of samples without looking at them again: digest, counts, sums."""

    def __init__(self) -> None:
        self._digest = hashlib.blake2b(digest_size=16)
        #: how often each token is to be predicted, int64 [largest id + 1]
        self.counts: Any = np.zeros(0, dtype=np.int64)
        self.n_tokens = 0
        #: tokens with loss, of those that can be predicted: all but each sample's first
        self.supervised = 0

    def add(self, words: Any, lengths: Any) -> None:
        """Count these samples too."""
        if not len(words):
            return
        ids, mask = words & (LOSS - 1), words >> 31
        largest = int(ids.max()) + 1
        if largest > len(self.counts):
            self.counts = np.pad(self.counts, (0, largest - len(self.counts)))
        self.counts += np.bincount(predicted(words, lengths), minlength=len(self.counts))
        begins = np.cumsum(lengths) - lengths
        self.n_tokens += len(words)
        self.supervised += int(mask.sum()) - int(mask[begins].sum())
        wide, narrow = ids.astype("<i8").tobytes(), mask.astype(np.uint8).tobytes()
        at = 0
        for length in lengths.tolist():
            self._digest.update(length.to_bytes(8, "little"))
            self._digest.update(wide[8 * at : 8 * (at + length)])
            self._digest.update(narrow[at : at + length])
            at += length

    @property
    def digest(self) -> str:
        """A hash of all tokens and loss masks, in their order."""
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Known:
    """A finished :class:`Tally`."""

    digest: str
    counts: Any
    n_tokens: int
    supervised: int


@dataclass(frozen=True)
class Dataset:
    """All samples of a file, and what was cut or left out on the way."""

    samples: Sequence[Sample]
    truncated: int
    without_loss: int
    #: records that were left out, by reason
    left_out: Mapping[str, int] = field(default_factory=dict)
    #: "conversation", "text", "tokens" -> records
    kinds: Mapping[str, int] = field(default_factory=dict)
    #: of all samples, where it was written down; else it is made when it is asked for
    noted: Known | None = None

    @functools.cached_property
    def known(self) -> Known:
        """Digest, counts and sums of the samples."""
        if self.noted is not None:
            return self.noted
        tally = Tally()
        for words, lengths in packed(self.samples):
            tally.add(words, lengths)
        return Known(tally.digest, tally.counts, tally.n_tokens, tally.supervised)

    @property
    def n_tokens(self) -> int:
        return self.known.n_tokens

    @property
    def digest(self) -> str:
        """A hash of what is trained: all tokens and loss masks, in their order."""
        return self.known.digest


def packed(samples: Sequence[Sample]) -> Iterator[tuple[Any, Any]]:
    """Samples of either kind as ``(words, lengths)``, some at a time."""
    if isinstance(samples, Samples):
        yield from samples.packed()
    elif samples:
        words = [pack(sample.input_ids, sample.loss_mask) for sample in samples]
        yield np.concatenate(words), lengths_of(samples)


def taking(samples: Sequence[Sample], numbers: Any) -> Sequence[Sample]:
    """Those of either kind with these numbers, int64 [n], in their order."""
    if isinstance(samples, Samples):
        return samples.taking(numbers)
    return [samples[number] for number in numbers.tolist()]


def lengths_of(samples: Sequence[Sample]) -> Any:
    """Tokens of each, int64 [n]."""
    if isinstance(samples, Samples):
        return samples.lengths
    return np.array([len(sample.input_ids) for sample in samples], dtype=np.int64)


def records_of(samples: Sequence[Sample]) -> Any:
    """Which record each is of, int64 [n], counted from 0; samples of one record are neighbours."""
    if isinstance(samples, Samples):
        origins = samples.origins
    else:
        origins = np.array([sample.origin for sample in samples])
    return np.cumsum(np.append(False, origins[1:] != origins[:-1]))


def pack(ids: Sequence[int], mask: Sequence[int]) -> Any:
    """Tokens with their loss, uint32 [n]."""
    made = np.fromiter(ids, dtype=WORD, count=len(ids))
    made |= np.fromiter(mask, dtype=WORD, count=len(mask)) << np.uint32(31)
    return made


@dataclass
class Part:
    """What became of one block: its samples packed, and what was cut or left out."""

    words: Any
    #: ENTRY [n], whose begins count from this part's
    entries: Any
    truncated: int = 0
    without_loss: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    #: text and reason of the line that ended it
    failed: tuple[str, str] | None = None

    @property
    def lengths(self) -> Any:
        """Tokens of each sample, int64 [n]."""
        return np.diff(self.entries["begin"].astype(np.int64), append=len(self.words))
