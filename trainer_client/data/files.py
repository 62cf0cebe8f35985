"""Files to blocks to records: the format is what the content is, whatever the name says.

JSON with one value a line, an array of values, values over many lines, or plain text; plain or
packed (gzip, xz, bzip2, zstd); parquet, and Hugging Face's Arrow files. A file is read as a stream
of blocks of about a mebibyte, whose records are parsed wherever the block is taken to. What cannot
be read is an error with file and line.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal

from trainer_client.data.columns import is_columnar, rows_of
from trainer_client.data.optional import needed
from trainer_client.errors import DataError

#: Of a block: a few hundred conversations, some thousandths of what tokenizing them costs to move.
BLOCK_BYTES = 1 << 20
#: Of running text in one piece: beside its end tokens may differ from those of the whole.
TEXT_BYTES = 1 << 21
#: As much as tells a format, where no line ends before.
_HEAD = 1 << 16
#: Of one JSON value: what is longer is no record, but a mistake in an array.
_MOST_OF_A_VALUE = 1 << 28

Kind = Literal["lines", "values", "text"]


class BadLine(DataError):  # noqa: N818 - what it is about
    """One record cannot be used; ``reason`` is the same for all of its kind."""

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


@dataclass(frozen=True)
class Record:
    """One record, from ``origin`` (file:line, or file#number); text has no structure."""

    origin: str
    value: Any
    #: of the line or value in its file, from 1; 0: the whole file
    number: int = 0


@dataclass(frozen=True)
class Block:
    """Some records of a file in a row, not parsed yet where they are lines."""

    path: str
    kind: Kind
    #: of the first record
    number: int
    #: lines as bytes, text as a string, or values
    content: Any
    #: bytes of the file that were read by then
    position: int

    def without_content(self) -> Block:
        """What it is, for whoever counts blocks and does not read them."""
        return replace(self, content=None)

    def records(self) -> Iterator[Record | BadLine]:
        """Its records in order; what is no JSON where JSON is wanted comes as BadLine."""
        if self.kind == "text":
            if self.content.strip():
                yield Record(origin(self.path, self.kind, self.number), self.content, self.number)
            return
        values = self.content.split(b"\n") if self.kind == "lines" else self.content
        for number, value in enumerate(values, start=self.number):
            where = origin(self.path, self.kind, number)
            if self.kind == "values":
                yield Record(where, value, number)
            elif value.strip():
                yield _parsed(where, value, number)


def origin(path: str, kind: str, number: int) -> str:
    """Where a record is: ``file:line`` or ``file#number``."""
    mark = "#" if kind == "values" else ":"
    return f"{path}{mark}{number}" if number else path


def read_records(path: Path) -> Iterator[Record | BadLine]:
    """The records of a file, in order. Raises what :func:`blocks` raises."""
    for block in blocks(path):
        yield from block.records()


def blocks(path: Path) -> Iterator[Block]:
    """A file in blocks. Raises :class:`DataError` for a file that cannot be read."""
    try:
        with path.open("rb") as raw:
            if is_columnar(raw):
                for number, rows, position in rows_of(path, raw):
                    yield Block(str(path), "values", number, rows, position)
                return
            kind = _kind(path, _unpacked(path, raw))
        with path.open("rb") as raw:
            yield from _OF_KIND[kind](path, _unpacked(path, raw), raw)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"cannot read {path}: {error}") from None


# -- what a file is -------------------------------------------------------------------------------


class _Zstd(io.RawIOBase):
    """The content of a zstd file, of one frame or several; a file that was cut is an error."""

    def __init__(self, raw: BinaryIO) -> None:
        library = needed("zstandard", "files packed with zstd")
        self._raw, self._error = raw, library.ZstdError
        self._begin = library.ZstdDecompressor().decompressobj
        self._frame = self._begin()
        self._inside, self._ready = False, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            octets = (self._frame.unused_data if self._frame.eof else b"") or self._raw.read(_HEAD)
            if not octets and self._inside:
                raise EOFError("its last zstd frame has no end")
            if not octets:
                return 0
            if self._frame.eof:
                self._frame = self._begin()
            try:
                self._ready = self._frame.decompress(octets)
            except self._error as error:
                raise OSError(f"damaged zstd data: {error}") from None
            self._inside = not self._frame.eof
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count


#: The first bytes of packed files, and what opens them.
_PACKED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"BZh": bz2.BZ2File,
    b"\x28\xb5\x2f\xfd": _Zstd,
}
_OTHER_ENCODINGS = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}


def _unpacked(path: Path, raw: BinaryIO) -> io.BufferedReader:
    """The content, whatever it is packed with; a byte order mark is no part of it."""
    head = raw.peek(8)[:8] if isinstance(raw, io.BufferedReader) else b""
    opened = next((opens for magic, opens in _PACKED.items() if head.startswith(magic)), None)
    inner: Any = opened(raw) if opened else raw
    file = io.BufferedReader(inner, BLOCK_BYTES)
    start = file.peek(4)
    for mark, name in _OTHER_ENCODINGS.items():
        if start.startswith(mark):
            raise DataError(f"{path}:1 is {name}; convert it (iconv -f {name} -t UTF-8)")
    if start.startswith(codecs.BOM_UTF8):
        file.read(len(codecs.BOM_UTF8))
    return file


def _kind(path: Path, file: io.BufferedReader) -> Kind:
    """What the first lines are."""
    named = path.name.lower()
    for packed in (".gz", ".xz", ".bz2", ".zst"):
        named = named.removesuffix(packed)
    says_json = named.endswith((".json", ".jsonl", ".ndjson"))
    lines = [line for line in _head(path, file).split("\n") if line.strip()]
    first = lines[0].strip() if lines else ""
    second = lines[1].strip() if len(lines) > 1 else ""
    whole = _is_json(first)
    if first.startswith("{") and (whole or not _begins_object(lines)):
        return "lines" if says_json or whole else "text"
    if first.startswith("[") and whole and second.startswith("["):
        return "lines"  # a conversation a line
    if first.startswith(("{", "[")) and (says_json or _begins_json(lines)):
        return "values"
    return "lines" if says_json else "text"


def _head(path: Path, file: io.BufferedReader) -> str:
    """The beginning: whole lines, and with the first that says something."""
    head = b""
    while len(head) < _HEAD and (line := file.readline(_MOST_OF_A_VALUE)):
        head += line
    return head.decode("utf-8", errors="replace")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _begins_object(lines: list[str]) -> bool:
    """Whether an object begins on the first line and goes on behind it."""
    return len(lines) > 1 and lines[0].strip() == "{" and lines[1].lstrip().startswith('"')


def _begins_json(lines: list[str]) -> bool:
    """Whether text that begins with a bracket goes on as JSON does."""
    rest = "".join(lines).lstrip()[1:].lstrip()
    return rest.startswith(("{", '"', "]", "[{", '["')) or _begins_object(lines)


# -- blocks ---------------------------------------------------------------------------------------


def _lines(path: Path, file: io.BufferedReader, raw: BinaryIO) -> Iterator[Block]:
    """Whole lines, about a block of them at a time."""
    number = 1
    while part := file.read(BLOCK_BYTES):
        part += file.readline()
        yield Block(str(path), "lines", number, part, raw.tell())
        number += part.count(b"\n")


def _text(path: Path, file: io.BufferedReader, raw: BinaryIO) -> Iterator[Block]:
    """Running text in pieces, each from the beginning of a line."""
    number, ahead = 0, file.read(TEXT_BYTES)
    while part := ahead:
        part += file.readline()
        ahead = file.read(TEXT_BYTES)
        text = _decoded(path, max(1, number), part).replace("\r\n", "\n")
        yield Block(str(path), "text", number, text, raw.tell())
        number = max(1, number) + part.count(b"\n")


def _decoded(path: Path, number: int, octets: bytes) -> str:
    try:
        return octets.decode()
    except UnicodeDecodeError as error:
        at = number + octets.count(b"\n", 0, error.start)
        raise DataError(f"{path}:{at} is not UTF-8: {error.reason}; convert it") from None


def _values(path: Path, file: io.BufferedReader, raw: BinaryIO) -> Iterator[Block]:
    """JSON values: those of an array, or one behind the other."""
    values: list[Any] = []
    number, begun = 1, raw.tell()
    for value in _decode_each(path, file):
        values.append(value)
        if raw.tell() - begun >= BLOCK_BYTES or len(values) >= _VALUES:
            yield Block(str(path), "values", number, values, raw.tell())
            number, begun, values = number + len(values), raw.tell(), []
    yield Block(str(path), "values", number, values, raw.tell())


#: Of a block: as many conversations as are about a mebibyte.
_VALUES = 256


def _decode_each(path: Path, file: io.BufferedReader) -> Iterator[Any]:
    """The values of an array, or of a file that has one behind the other, one by one."""
    decoder, ahead = json.JSONDecoder(), _Ahead(path, file)
    in_array = ahead.skip(" \t\r\n") == "["
    if in_array:
        ahead.at += 1
    count = 0
    while (mark := ahead.skip(" \t\r\n,")) and not (in_array and mark == "]"):
        count += 1
        yield ahead.value(decoder, count)
    if in_array and mark:
        ahead.at += 1
        if ahead.skip(" \t\r\n"):
            raise DataError(f"{path} is not JSON: something is behind its array")
    if in_array and not mark:
        raise DataError(f"{path} is not JSON: its array has no end, after {count} values")


class _Ahead:
    """Text of a file as far as it was read, from ``at`` on."""

    def __init__(self, path: Path, file: io.BufferedReader) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._text = ""
        self.at = 0

    def skip(self, these: str) -> str:
        """Go on behind these characters; the next one, or nothing at the end."""
        while True:
            rest = len(self._text)
            while self.at < rest and self._text[self.at] in these:
                self.at += 1
            if self.at < rest:
                return self._text[self.at]
            if not self._more(BLOCK_BYTES):
                return ""

    def value(self, decoder: json.JSONDecoder, count: int) -> Any:
        """The JSON value that begins here. Raises :class:`DataError` where there is none."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self.at)
            except (ValueError, RecursionError) as error:
                length = len(self._text) - self.at
                if length > _MOST_OF_A_VALUE or not self._more(max(BLOCK_BYTES, length)):
                    said = f"{self._path} is not JSON: value {count}: {error}"
                    raise DataError(said) from None
                continue
            if end < len(self._text) or not self._more(BLOCK_BYTES):
                self.at = end
                return value

    def _more(self, count: int) -> bool:
        """Read on, and forget what is behind."""
        octets = self._file.read(count)
        try:
            text = self._decoder.decode(octets, final=not octets)
        except UnicodeDecodeError as error:
            raise DataError(f"{self._path} is not UTF-8: {error.reason}; convert it") from None
        self._text, self.at = self._text[self.at :] + text, 0
        return bool(octets)


def _parsed(where: str, line: bytes, number: int) -> Record | BadLine:
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where} is not UTF-8: {error.reason}; convert it") from None
    try:
        return Record(where, json.loads(text.lstrip("\ufeff")), number)
    except (ValueError, RecursionError) as error:
        reason = "not JSON"
        return BadLine(f"{where} is not JSON: {error}; one object a line is wanted", reason)


_OF_KIND = {"lines": _lines, "values": _values, "text": _text}
