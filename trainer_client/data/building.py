"""Files to one stream of packed samples, in the files' order, whoever makes the parts."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from trainer_client.data.files import BadLine, Block, blocks
from trainer_client.data.pool import on_all_cores, one_by_one
from trainer_client.data.reading import Options
from trainer_client.data.samples import ENTRY, WORD, Dataset, File, Known, Samples, Tally
from trainer_client.errors import DataError

#: Below this, processes take longer to start than they save.
_FEW_BYTES = 8 << 20


@dataclass(frozen=True)
class Progress:
    """How far reading is: bytes of the files, and what came of them."""

    done_bytes: int
    total_bytes: int
    samples: int
    tokens: int


Told = Callable[[Progress], None]


@dataclass(frozen=True)
class Built:
    """What was written, and all that is known of it."""

    files: tuple[File, ...]
    n_samples: int
    known: Known
    truncated: int
    without_loss: int
    left_out: Mapping[str, int]
    kinds: Mapping[str, int]

    def dataset(self, words: Any, entries: Any) -> Dataset:
        """The samples in these arrays, uint32 [tokens] and ENTRY [n]."""
        samples = Samples(words, entries, self.files)
        counts = self.truncated, self.without_loss, self.left_out, self.kinds
        return Dataset(samples, *counts, self.known)


def build(
    files: Sequence[Path],
    tokenizer: Any,
    options: Options,
    words: BinaryIO,
    entries: BinaryIO,
    told: Told = lambda progress: None,
) -> Built:
    """Write the samples of all files, as ``words`` and ``entries`` of them.

    Raises :class:`DataError` with the first line that is wrong, unless such are left out, and where
    there is nothing to learn from. Memory is that of some blocks, however large the files.
    """
    source = _Source(files)
    made = on_all_cores if source.total_bytes > _FEW_BYTES else one_by_one
    tally, truncated, without_loss, n_samples = Tally(), 0, 0, 0
    left_out: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    for block, part in made(tokenizer, options, source.blocks()):
        if part.failed is not None:
            raise BadLine(*part.failed)
        begins = part.entries
        lengths = part.lengths
        begins["begin"] += tally.n_tokens
        tally.add(part.words, lengths)
        words.write(part.words.tobytes())
        entries.write(begins.tobytes())
        n_samples += len(begins)
        truncated += part.truncated
        without_loss += part.without_loss
        left_out += part.left_out
        kinds += part.kinds
        done = source.done_bytes(block)
        told(Progress(done, source.total_bytes, n_samples, tally.n_tokens))
    if not n_samples:
        said = "".join(f", {count} {reason}" for reason, count in left_out.items())
        named = str(files[0]) if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
        raise DataError(
            f"{named} has no sample with anything to learn from ({without_loss} had no loss within "
            f"{options.max_length} tokens{said}); give more data or a larger --max-length"
        )
    known = Known(tally.digest, tally.counts, tally.n_tokens, tally.supervised)
    counts = truncated, without_loss, dict(left_out), dict(kinds)
    return Built(source.found(), n_samples, known, *counts)


class _Source:
    """The blocks of some files, one file behind the other."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = files
        sizes = [_size(file) for file in files]
        self.total_bytes = sum(sizes)
        #: bytes of the files before each
        self._before = {str(file): sum(sizes[:at]) for at, file in enumerate(files)}
        self._kinds: dict[str, str] = {}

    def blocks(self) -> Iterator[tuple[Block, int]]:
        for number, file in enumerate(self._files):
            for block in blocks(file):
                self._kinds[block.path] = block.kind
                yield block, number

    def done_bytes(self, block: Block) -> int:
        return self._before[block.path] + block.position

    def found(self) -> tuple[File, ...]:
        return tuple(File(str(f), self._kinds.get(str(f), "text")) for f in self._files)


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror}") from None


def in_memory(files: Sequence[Path], tokenizer: Any, options: Options) -> Dataset:
    """The samples of small files, kept nowhere. Raises what :func:`build` raises."""
    words, entries = io.BytesIO(), io.BytesIO()
    built = build(files, tokenizer, options, words, entries)
    return built.dataset(
        np.frombuffer(words.getvalue(), WORD), np.frombuffer(entries.getvalue(), ENTRY)
    )
