"""Tables of columns, as rows: parquet, and Arrow files as Hugging Face's ``datasets`` has them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from trainer_client.data.optional import needed
from trainer_client.errors import DataError

_PARQUET, _ARROW_FILE = b"PAR1", b"ARROW1"
#: What an Arrow stream begins with: a continuation mark, then the length of its schema.
_ARROW_STREAM = b"\xff\xff\xff\xff"
#: Rows that are in memory as Python objects at once.
_ROWS = 256


def is_columnar(raw: BinaryIO) -> bool:
    """Whether a file at its beginning is one of these."""
    head = raw.read(8)
    raw.seek(0)
    return head.startswith((_PARQUET, _ARROW_FILE, _ARROW_STREAM))


def rows_of(path: Path, raw: BinaryIO) -> Iterator[tuple[int, list[dict[str, Any]], int]]:
    """``(number of the first row from 1, rows, bytes behind)``, some rows at a time.

    Raises :class:`DataError` for a file that cannot be read, or where pyarrow is missing.
    """
    pyarrow = needed("pyarrow", "parquet files and Hugging Face data sets")
    magic = raw.read(8)
    raw.seek(0)
    size, number = path.stat().st_size, 1
    try:
        if magic.startswith(_PARQUET):
            table = needed("pyarrow.parquet", "parquet files").ParquetFile(raw)
            batches, count = table.iter_batches(_ROWS), table.metadata.num_rows
        elif magic.startswith(_ARROW_FILE):
            opened = pyarrow.ipc.open_file(raw)
            batches, count = map(opened.get_batch, range(opened.num_record_batches)), 0
        else:
            batches, count = pyarrow.ipc.open_stream(raw), 0
        for batch in batches:
            for at in range(0, batch.num_rows, _ROWS):
                rows = batch.slice(at, _ROWS).to_pylist()
                behind = raw.tell() if not count else size * (number + len(rows) - 1) // count
                yield number, rows, behind
                number += len(rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"cannot read {path}: {error}") from None
