"""Reading training data: cores used, memory, the second start, four ranks beside one.

``python -m tests.bench.data [--tokens 200000000] [--json]``

Synthetic conversations are tokenized by processes that do what a rank does: find the data set in
the token cache, or make it, and look at their share of the samples. Memory is the proportional set
size (PSS) of all processes, sampled while they run, less that of as many that have only imported
and loaded the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Conversations that differ; a line's number makes each line another.
_DISTINCT = 4096
_RANKS = 4
_MIB = 1 << 20


def write_data(path: Path, tokens: int, tokenizer: Any) -> None:
    """Conversations of about so many tokens together."""
    chance = random.Random(0)
    words = [
        "the",
        "draft",
        "guesses",
        "what",
        "its",
        "target",
        "says",
        "next",
        "and",
        "is",
        "right",
        "more",
        "often",
        "than",
        "not",
    ]

    def said() -> str:
        return " ".join(chance.choices(words, k=chance.randint(20, 400)))

    lines, count = [], 0
    for _ in range(_DISTINCT):
        turns = [{"role": role, "content": said()} for role in ("user", "assistant") * 2]
        count += sum(len(tokenizer(turn["content"])["input_ids"]) for turn in turns)
        lines.append(json.dumps({"messages": turns})[1:])
    with path.open("w") as file:
        for number in range(round(tokens / count * _DISTINCT)):
            file.write(f'{{"number": {number}, ' + lines[number % _DISTINCT] + "\n")


def load_tokenizer() -> Any:
    from transformers import AutoTokenizer

    from worker.targets import EMBEDDED

    made = AutoTokenizer.from_pretrained(EMBEDDED)
    made.chat_template = (
        "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    return made


def be_rank(data: Path, rank: int, world: int, idle: bool) -> None:
    """What a rank does before and in an epoch; tells what it took when it is told to end."""
    from trainer_client.training.data import Options, collate, stored_dataset

    tokenizer = load_tokenizer()
    began, found = time.perf_counter(), {}
    if not idle:
        read_before = _read_bytes()
        dataset = stored_dataset(data, tokenizer, Options(2048))
        seconds = time.perf_counter() - began
        found = {
            "seconds": seconds,
            "cpu_s": sum(_cpu_s(who) for who in _WHO),
            "read_bytes": _read_bytes() - read_before,
            "samples": len(dataset.samples),
            "tokens": dataset.n_tokens,
            "digest": dataset.digest,
        }
        for number in range(rank, len(dataset.samples), world):
            collate([dataset.samples[number]])
    print(json.dumps(found), flush=True)
    sys.stdin.read()


_WHO = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)


def _cpu_s(who: int) -> float:
    used = resource.getrusage(who)
    return used.ru_utime + used.ru_stime


def _read_bytes() -> int:
    """Bytes that this process and its ended children have read, from the page cache too."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["rchar"])


class Memory:
    """The most proportional memory that some processes and their children had together."""

    def __init__(self, pids: list[int]) -> None:
        self._pids, self.peak_bytes = pids, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            self.peak_bytes = max(self.peak_bytes, sum(map(pss_bytes, tree(self._pids))))


def tree(pids: list[int]) -> list[int]:
    """These processes and all that they have started."""
    found = list(pids)
    for pid in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{pid}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def pss_bytes(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    return 0


@contextlib.contextmanager
def ranks(data: Path, cache: Path, count: int, *options: str) -> Iterator[tuple[Any, list[Any]]]:
    """Start so many at once; gives their peak of memory, and what each told."""
    command = [sys.executable, "-m", "tests.bench.data", "--data", str(data), *options]
    environment = os.environ | {
        "DRAFTMQ_DATA_CACHE": str(cache),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    children = [
        subprocess.Popen(
            [*command, "--rank", str(rank), "--world", str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        for rank in range(count)
    ]
    try:
        with Memory([child.pid for child in children]) as memory:
            told = [json.loads(child.stdout.readline()) for child in children]
            time.sleep(0.5)  # the memory that they stay with is sampled too
        yield memory.peak_bytes, told
    finally:
        for child in children:
            child.communicate()


def measure(tokens: int, folder: Path) -> dict[str, Any]:
    """All figures, in a folder with room for the data and two caches."""
    data = folder / "chats.jsonl"
    write_data(data, tokens, load_tokenizer())
    idle = {}
    for count in (1, _RANKS):
        with ranks(data, folder / "none", count, "--idle") as (peak, _):
            idle[count] = peak
    with ranks(data, folder / "one", 1) as (peak, (cold,)):
        memory = peak - idle[1]
    with ranks(data, folder / "one", 1) as (_, (warm,)):
        pass
    with ranks(data, folder / "four", _RANKS) as (peak, four):
        memory_of_four = peak - idle[_RANKS]
    assert {told["digest"] for told in (cold, warm, *four)} == {cold["digest"]}
    sizes = [_size(folder / name) for name in ("one", "four")]
    return {
        "tokens": cold["tokens"],
        "samples": cold["samples"],
        "data_mib": data.stat().st_size / _MIB,
        "seconds": cold["seconds"],
        "tokens_per_s": cold["tokens"] / cold["seconds"],
        "cpu_over_wall": cold["cpu_s"] / cold["seconds"],
        "bytes_per_token": sizes[0] / cold["tokens"],
        "memory_mib": memory / _MIB,
        "second_start_seconds": warm["seconds"],
        "second_start_read_mib": warm["read_bytes"] / _MIB,
        "four_ranks_seconds": max(told["seconds"] for told in four),
        "four_ranks_cpu_s": sum(told["cpu_s"] for told in four),
        "one_rank_cpu_s": cold["cpu_s"],
        "four_ranks_memory_mib": memory_of_four / _MIB,
        "four_ranks_disk_share": sizes[1] / sizes[0],
    }


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=200_000_000)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, help="Where there is room: 15 bytes a token.")
    for name in ("rank", "world"):
        parser.add_argument(f"--{name}", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--idle", action="store_true", help=argparse.SUPPRESS)
    wanted = parser.parse_args()
    if wanted.data:
        be_rank(wanted.data, wanted.rank, wanted.world, wanted.idle)
        return
    with tempfile.TemporaryDirectory(dir=wanted.folder, prefix="draftmq-bench-") as folder:
        figures = measure(wanted.tokens, Path(folder))
    if wanted.json:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name.replace('_', ' '):24} {value:,.{3 if value < 10 else 0}f}")


if __name__ == "__main__":
    main()
