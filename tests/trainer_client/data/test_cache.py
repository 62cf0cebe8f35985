"""The token cache: once a node, whole or not there, the same tokens as without it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from broker.commands import cli
from tests.trainer_client.data.chats import tokenizer
from trainer_client.data import cache
from trainer_client.data.building import Progress
from trainer_client.data.files import BLOCK_BYTES
from trainer_client.data.pool import on_all_cores, one_by_one
from trainer_client.data.reading import Options
from trainer_client.data.showing import ReadingProgress
from trainer_client.errors import DataError
from trainer_client.training.data import Dataset, read_dataset, stored_dataset
from trainer_client.training.validation import hold_out

OPTIONS = Options(64)
PROGRAM = """
import json, sys
from pathlib import Path
from tests.trainer_client.data.chats import tokenizer
from trainer_client.data.cache import cached
from trainer_client.data.reading import Options
print("ready", flush=True)
sys.stdin.readline()
found = cached([Path(sys.argv[1])], tokenizer("plain"), Options(64))
print(json.dumps([found.digest, len(found.samples), found.samples[-1].origin]), flush=True)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.DIRECTORY, str(tmp_path / "cache"))
    return tmp_path / "cache"


def write(path: Path, count: int) -> Path:
    words = "the quick brown fox says hello to the lazy dog"
    path.write_text("".join(json.dumps({"text": f"{n} {words}"}) + "\n" for n in range(count)))
    return path


def start(data: Path) -> subprocess.Popen[str]:
    """A process that reads the data when it is told to."""
    root = Path(__file__).parents[3]
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(data)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(root)},
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def go(*children: subprocess.Popen[str]) -> None:
    for child in children:
        assert child.stdin is not None
        child.stdin.write("\n")
        child.stdin.flush()


def entries(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.is_dir() and path.name != "contents"]


def same(one: Dataset, other: Dataset) -> bool:
    return list(one.samples) == list(other.samples) and one.digest == other.digest


def test_what_is_stored_is_what_is_read(tmp_path: Path, place: Path) -> None:
    data = write(tmp_path / "a.jsonl", 50)
    expected = read_dataset(data, tokenizer("plain"), 64)
    for _ in range(2):
        assert same(stored_dataset(data, tokenizer("plain"), OPTIONS), expected)
    kept, held = hold_out(stored_dataset(data, tokenizer("plain"), OPTIONS), 0.1, seed=3)
    also_kept, also_held = hold_out(Dataset(list(expected.samples), 0, 0), 0.1, seed=3)
    assert list(held) == list(also_held)
    assert same(kept, also_kept)
    assert kept.known.counts.tolist() == also_kept.known.counts.tolist()
    assert [kept.n_tokens, kept.known.supervised] == [
        sum(len(sample.input_ids) for sample in also_kept.samples),
        sum(sum(sample.loss_mask[1:]) for sample in also_kept.samples),
    ]
    (entry,) = entries(place)
    size = sum(file.stat().st_size for file in entry.glob("*.u32"))
    assert size == 4 * expected.n_tokens


def test_a_second_start_reads_nothing_and_a_changed_file_is_read(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "a.jsonl", 20)
    first = stored_dataset(data, tokenizer("plain"), OPTIONS)
    before = time.time_ns() - 10**9
    os.utime(data, ns=(before, before))
    stored_dataset(data, tokenizer("plain"), OPTIONS)
    with monkeypatch.context() as patched:
        patched.setattr(cache, "build", None)
        moved = data.rename(tmp_path / "moved.jsonl")
        (sample, *_) = stored_dataset(moved, tokenizer("plain"), OPTIONS).samples
        assert sample.origin == f"{moved}:1"
    write(moved, 21)
    longer = stored_dataset(moved, tokenizer("plain"), OPTIONS)
    assert len(longer.samples) == len(first.samples) + 1
    assert len(entries(place)) == 2


def test_a_file_that_did_not_change_is_not_opened_again(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "a.jsonl", 20)
    monkeypatch.setattr("trainer_client.data.contents._SETTLED_NS", -1)
    stored_dataset(data, tokenizer("plain"), OPTIONS)
    monkeypatch.setattr("trainer_client.data.contents.content_hash", None)
    monkeypatch.setattr(cache, "build", None)
    assert len(stored_dataset(data, tokenizer("plain"), OPTIONS).samples) == 20


@pytest.mark.parametrize(
    "other",
    [
        ("headers", OPTIONS),
        ("plain", Options(32)),
        ("plain", Options(64, skip_bad_lines=True)),
        ("plain", Options(64, template_options={"chat_template": "x"})),
    ],
)
def test_another_tokenizer_or_option_is_another_entry(
    tmp_path: Path, place: Path, other: Any
) -> None:
    data = write(tmp_path / "a.jsonl", 5)
    stored_dataset(data, tokenizer("plain"), OPTIONS)
    stored_dataset(data, tokenizer(other[0]), other[1])
    assert len(entries(place)) == 2


def test_processes_make_the_same_parts_in_the_same_order(tmp_path: Path) -> None:
    from trainer_client.data.files import blocks

    data = write(tmp_path / "a.jsonl", 3 * BLOCK_BYTES // 70)
    found = [
        [
            (block.number, part.words.tobytes(), part.entries.tobytes())
            for block, part in way(
                tokenizer("plain"), OPTIONS, ((block, 7) for block in blocks(data))
            )
        ]
        for way in (one_by_one, on_all_cores)
    ]
    assert len(found[0]) > 2
    assert found[0] == found[1]


def test_ranks_and_runs_that_start_at_once_make_one_cache(tmp_path: Path, place: Path) -> None:
    data = write(tmp_path / "a.jsonl", 3000)
    children = [start(data) for _ in range(4)]
    go(*children)
    told = {child.communicate()[0] for child in children}
    expected = read_dataset(data, tokenizer("plain"), 64)
    ((digest, count, origin),) = map(json.loads, told)
    assert (digest, count, origin) == (expected.digest, 3000, f"{data}:3000")
    assert len(entries(place)) == 1


def test_what_a_killed_process_began_is_made_anew(tmp_path: Path, place: Path) -> None:
    data = write(tmp_path / "a.jsonl", 10_000)
    first, second = start(data), start(data)
    go(first)
    while not list(place.glob("*.unfinished-*")):
        assert first.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert [entry.name.partition(".")[2] for entry in entries(place)] != [""]
    go(second)
    told = json.loads(second.communicate()[0])
    assert told[:2] == [read_dataset(data, tokenizer("plain"), 64).digest, 10_000]
    (entry,) = entries(place)
    assert "unfinished" not in entry.name


def test_who_waits_for_a_process_that_is_killed_makes_it(tmp_path: Path, place: Path) -> None:
    data = write(tmp_path / "a.jsonl", 10_000)
    first, second = start(data), start(data)
    go(first)
    while not list(place.glob("*.unfinished-*")):
        time.sleep(0.001)
    go(second)  # it finds the lock taken, or, in a hurry, what is finished
    first.send_signal(signal.SIGKILL)
    first.communicate()
    told = json.loads(second.communicate()[0])
    assert told[:2] == [read_dataset(data, tokenizer("plain"), 64).digest, 10_000]
    assert len(entries(place)) == 1


@pytest.mark.parametrize("name", ["tokens.u32", "samples.bin", "counts.npy", "facts.json"])
def test_an_entry_that_was_cut_is_made_anew(tmp_path: Path, place: Path, name: str) -> None:
    data = write(tmp_path / "a.jsonl", 20)
    stored_dataset(data, tokenizer("plain"), OPTIONS)
    (entry,) = entries(place)
    os.truncate(entry / name, (entry / name).stat().st_size - 20)
    expected = read_dataset(data, tokenizer("plain"), 64)
    assert same(stored_dataset(data, tokenizer("plain"), OPTIONS), expected)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, place: Path) -> None:
    data = write(tmp_path / "a.jsonl", 2000)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        with pytest.raises(DataError, match=r"cannot write the token cache in .*make room"):
            stored_dataset(data, tokenizer("plain"), OPTIONS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert entries(place) == []


def test_a_place_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.DIRECTORY, str(tmp_path / "file"))
    with pytest.raises(DataError, match=r"cannot write the token cache .*DRAFTMQ_DATA_CACHE=DIR"):
        stored_dataset(write(tmp_path / "a.jsonl", 5), tokenizer("plain"), OPTIONS)


def test_the_least_recently_used_goes_first_and_what_is_used_stays(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.LIMIT, "0")
    used = stored_dataset(write(tmp_path / "used.jsonl", 5), tokenizer("plain"), OPTIONS)
    stored_dataset(write(tmp_path / "old.jsonl", 6), tokenizer("plain"), OPTIONS)
    stored_dataset(write(tmp_path / "new.jsonl", 7), tokenizer("plain"), OPTIONS)
    left = {Path(entry.files[0]).name for entry in cache.listed()}
    assert left == {"used.jsonl", "new.jsonl"}
    assert len(used.samples) == 5
    monkeypatch.setenv(cache.LIMIT, "much")
    with pytest.raises(DataError, match="DRAFTMQ_DATA_CACHE_GIB is 'much'"):
        stored_dataset(write(tmp_path / "b.jsonl", 8), tokenizer("plain"), OPTIONS)


def test_the_command_shows_the_cache_and_clears_it(tmp_path: Path, place: Path) -> None:
    data = write(tmp_path / "a.jsonl", 5)
    stored_dataset(data, tokenizer("plain"), OPTIONS)
    shown = CliRunner().invoke(cli, ["data", "cache"])
    assert shown.exit_code == 0, shown.output
    assert str(data) in shown.output.replace("\n", "")
    assert "1 removed" in CliRunner().invoke(cli, ["data", "cache", "--clear"]).output
    assert entries(place) == []


def test_progress_is_told_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    caplog.set_level("INFO", "draftmq.data")
    with ReadingProgress(clock=lambda: now[0]) as shown:
        for second in range(12):
            now[0] = float(second)
            shown.told(Progress(second * 10, 200, second, second * 100))
    assert len(caplog.records) == 2


def test_a_bad_line_is_the_first_one_also_among_processes(
    tmp_path: Path, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer_client.data.building._FEW_BYTES", 0)
    data = write(tmp_path / "a.jsonl", 2 * BLOCK_BYTES // 70)
    lines = data.read_text().splitlines()
    lines[3000] = lines[-1] = "{}"
    data.write_text("\n".join(lines))
    with pytest.raises(DataError, match=r"a\.jsonl:3001 wants an object"):
        stored_dataset(data, tokenizer("plain"), OPTIONS)
    found = stored_dataset(data, tokenizer("plain"), Options(64, skip_bad_lines=True))
    assert dict(found.left_out) == {"neither text nor messages": 2}
    assert len(found.samples) == len(lines) - 2
