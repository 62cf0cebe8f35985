"""Files of all formats are known by their content; names, shards, patterns and directories."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pytest

from tests.trainer_client.data.chats import tokenizer
from trainer_client.data import files
from trainer_client.data.files import read_records
from trainer_client.data.sources import files_of
from trainer_client.errors import DataError
from trainer_client.training.data import Dataset, read_dataset

ROWS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"Hello {number}"},
            {"role": "assistant", "content": "Hi \u2028!"},
        ]
    }
    for number in range(600)
]
LINES = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()


def read(path: Path | list[Path], **options: Any) -> Dataset:
    return read_dataset(path, tokenizer("plain"), 4096, **options)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    path.write_bytes(LINES)
    return read(path).digest


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.data", "a", "a.jsonl.gz"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress, lzma.compress, bz2.compress])
def test_lines_whatever_the_name_says(tmp_path: Path, expected: str, name: str, pack: Any) -> None:
    (tmp_path / name).write_bytes(pack(LINES))
    assert read(tmp_path / name).digest == expected


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS).encode(),
        json.dumps(ROWS, indent=2).encode(),
        b"\xef\xbb\xbf" + json.dumps(ROWS, ensure_ascii=False).encode(),
        "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
        LINES.replace(b"\n", b"\r\n"),
        b"\n\n" + LINES.replace(b"\n", b"\n\n") + b"\n",
        "\n".join(json.dumps(row["messages"]) for row in ROWS).encode(),
        json.dumps([row["messages"] for row in ROWS]).encode(),
        b"\xef\xbb\xbf" + LINES.replace(b"\n", b"\n\xef\xbb\xbf", 1),
    ],
)
def test_json_in_any_arrangement(
    tmp_path: Path, expected: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    assert read(tmp_path / "a.json").digest == expected
    monkeypatch.setattr(files, "BLOCK_BYTES", 100)  # an edge within every record
    monkeypatch.setattr(files, "_VALUES", 7)
    found = read(tmp_path / "a.json")
    assert found.digest == expected
    assert len({sample.origin for sample in found.samples}) == len(ROWS)


@pytest.mark.parametrize(
    "content", [b"[", b"[{}", b'[{"text": "a"}, {"te', b'{\n"text": nothing}', b'[{"text": "a"}] b']
)
def test_an_array_without_an_end_is_an_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.json.* is not JSON"):
        list(read_records(tmp_path / "a.json"))


def test_text_is_read_in_pieces_that_begin_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "TEXT_BYTES", 50)
    text = "".join(f"line {number} été\r\n" for number in range(40))
    (tmp_path / "a.txt").write_bytes(text.encode())
    records = list(read_records(tmp_path / "a.txt"))
    assert len(records) > 5
    assert "".join(record.value for record in records) == text.replace("\r\n", "\n")
    last = records[-1]
    number = int(last.origin.rpartition(":")[2])
    assert last.value.startswith(f"line {number - 1} ")


def test_other_encodings_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES.decode().encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.jsonl:1 is UTF-16; convert it \(iconv"):
        read(tmp_path / "a.jsonl")
    (tmp_path / "b.txt").write_bytes(b"one\ntwo\n\xff\n")
    with pytest.raises(DataError, match=r"b\.txt:3 is not UTF-8"):
        read(tmp_path / "b.txt")


def test_several_files_patterns_and_directories(tmp_path: Path, expected: str) -> None:
    lines = LINES.split(b"\n")
    (tmp_path / "b").mkdir()
    for name, part in (("b/1.jsonl", lines[:100]), ("b/2.jsonl", lines[100:])):
        (tmp_path / name).write_bytes(b"\n".join(part))
    (tmp_path / "b" / "README.md").write_text("about it")
    (tmp_path / "b" / ".hidden.jsonl").write_text("{}")
    one, two = tmp_path / "b" / "1.jsonl", tmp_path / "b" / "2.jsonl"
    for given in (
        [one, two],
        tmp_path / "b" / "*.jsonl",
        tmp_path / "b",
        tmp_path / "**" / "[12]*",
    ):
        assert read(given).digest == expected
    assert read([two, one]).samples[0].origin == f"{two}:1"


def test_names_of_nothing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no-such-\*: no file matches this pattern"):
        files_of(tmp_path / "no-such-*")
    with pytest.raises(DataError, match="has no data file in it"):
        files_of(tmp_path)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["a", "b"]}')
    with pytest.raises(DataError, match="has the splits a, b; name one"):
        files_of(tmp_path)


@pytest.mark.parametrize(
    ("magic", "library"), [(b"PAR1", "pyarrow"), (b"\x28\xb5\x2f\xfd", "zstandard")]
)
def test_a_missing_library_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, magic: bytes, library: str
) -> None:
    monkeypatch.setitem(__import__("sys").modules, library, None)
    (tmp_path / "a").write_bytes(magic + b" and more")
    with pytest.raises(DataError, match=rf"need {library}, .* pip install 'draftmq\[data\]'"):
        read(tmp_path / "a")


def test_zstd_of_several_frames_and_what_was_cut(tmp_path: Path, expected: str) -> None:
    zstandard = pytest.importorskip("zstandard")
    at = LINES.index(b"\n") + 1
    packed = zstandard.compress(LINES[:at]) + zstandard.compress(LINES[at:])
    (tmp_path / "a").write_bytes(packed)
    assert read(tmp_path / "a").digest == expected
    for damaged in (packed[:-40], packed + b"more"):
        (tmp_path / "a").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot read"):
            read(tmp_path / "a")


def test_parquet_and_data_sets_of_hugging_face(tmp_path: Path, expected: str) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist(ROWS)
    parquet.write_table(table, tmp_path / "a.bin", row_group_size=250)
    found = read(tmp_path / "a.bin")
    assert (found.digest, found.samples[-1].origin) == (expected, f"{tmp_path / 'a.bin'}#600")
    # as datasets' save_to_disk writes it
    saved = tmp_path / "saved" / "train"
    saved.mkdir(parents=True)
    shards = {"data-00001.arrow": table.slice(0, 400), "data-00000.arrow": table.slice(400)}
    for name, part in shards.items():
        with pyarrow.ipc.new_stream(saved / name, table.schema) as stream:
            stream.write_table(part, max_chunksize=300)
    state = {"_data_files": [{"filename": name} for name in shards]}
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "dataset_info.json").write_text("{}")
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
    for directory in (saved, saved.parent):
        assert read(directory).digest == expected
    (tmp_path / "a.bin").write_bytes((tmp_path / "a.bin").read_bytes()[:3000])
    with pytest.raises(DataError, match=r"cannot read .*a\.bin"):
        read(tmp_path / "a.bin")


def test_conversations_as_columns_of_a_table(tmp_path: Path) -> None:
    columns = {"from": ["human", "gpt"], "value": ["Hello", "Hi!"]}
    as_rows = [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi!"}]
    digests = set()
    for said in (columns, as_rows):
        (tmp_path / "a.jsonl").write_text(json.dumps({"conversations": said}))
        digests.add(read(tmp_path / "a.jsonl").digest)
    assert len(digests) == 1
