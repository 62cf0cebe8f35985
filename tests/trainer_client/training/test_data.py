from __future__ import annotations

import gzip
import json
import lzma
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trainer_client.errors import DataError
from trainer_client.training.data import Dataset, Sample, Schedule, collate, read_dataset
from trainer_client.training.vocab import frequent_tokens, token_counts
from worker.targets import EMBEDDED


@pytest.fixture(scope="module")
def tokenizer() -> object:
    return AutoTokenizer.from_pretrained(EMBEDDED)


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_text_lines_are_samples_with_loss_everywhere(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "one two"}, {"text": "three"})
    one, two = read_dataset(path, tokenizer, 64).samples
    assert tokenizer.decode(one.input_ids) == "one two"
    assert set(one.loss_mask) == {1}
    assert two.origin == f"{path}:2"


def test_loss_is_on_what_the_assistant_says_only(tmp_path: Path, tokenizer: object) -> None:
    messages = [
        {"role": "user", "content": "What is a list?"},
        {"role": "assistant", "content": "A sequence."},
        {"role": "user", "content": "And a tuple?"},
        {"role": "assistant", "content": "The same, but immutable."},
    ]
    path = write(tmp_path / "a.jsonl", {"messages": messages})
    (sample,) = read_dataset(path, tokenizer, 256).samples
    learned = tokenizer.decode(
        [t for t, on in zip(sample.input_ids, sample.loss_mask, strict=True) if on]
    )
    assert "A sequence." in learned
    assert "immutable" in learned
    assert "What is" not in learned
    assert "tuple?" not in learned


@pytest.mark.parametrize("pack", [None, gzip, lzma])
def test_plain_text_is_cut_into_samples(tmp_path: Path, tokenizer: object, pack: object) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 40
    path = tmp_path / {None: "a.txt", gzip: "a.txt.gz", lzma: "a.txt.xz"}[pack]
    path.write_bytes(text.encode() if pack is None else pack.compress(text.encode()))
    dataset = read_dataset(path, tokenizer, 32)
    assert all(len(sample.input_ids) == 32 for sample in dataset.samples[:-1])
    together = [token for sample in dataset.samples for token in sample.input_ids]
    assert tokenizer.decode(together).startswith(text[:-40])


def test_long_samples_are_cut_and_counted(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "word " * 100}, {"text": "short one"})
    dataset = read_dataset(path, tokenizer, 16)
    assert dataset.truncated == 1
    assert len(dataset.samples[0].input_ids) == 16


@pytest.mark.parametrize(
    ("line", "match"),
    [
        ("{not json", r"a\.jsonl:2 is not JSON"),
        ("[1]", r'a\.jsonl:2 wants an object with either "text" or "messages"'),
        ("{}", r'a\.jsonl:2 wants an object with either "text" or "messages"'),
        ('{"text": "a", "messages": []}', r'a\.jsonl:2 wants .* either "text" or "messages"'),
        ('{"text": 3}', r'a\.jsonl:2: "text" must be a string'),
        ('{"text": ""}', r'a\.jsonl:2: "text" must be a string that is not empty'),
        ('{"messages": []}', r'a\.jsonl:2: "messages" must be a list that is not empty'),
        ('{"messages": ["hi"]}', r"a\.jsonl:2: message 1 is not an object"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', "message 1 has the role 'robot'"),
        ('{"messages": [{"role": "user", "content": 1}]}', "message 1 has no content"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "has no assistant turn"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, tokenizer: object, line: str, match: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine here"}\n' + line + "\n")
    with pytest.raises(DataError, match=match):
        read_dataset(path, tokenizer, 64)


def test_files_that_cannot_be_read_are_named(tmp_path: Path, tokenizer: object) -> None:
    with pytest.raises(DataError, match=r"cannot read .*missing"):
        read_dataset(tmp_path / "missing.txt", tokenizer, 64)
    binary = tmp_path / "a.jsonl"
    binary.write_bytes(b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1 is not UTF-8"):
        read_dataset(binary, tokenizer, 64)
    cut = tmp_path / "a.txt.xz"
    cut.write_bytes(lzma.compress(b"text " * 1000)[:50])
    with pytest.raises(DataError, match="cannot read"):
        read_dataset(cut, tokenizer, 64)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(DataError, match="no sample with anything to learn"):
        read_dataset(tmp_path / "empty.txt", tokenizer, 64)


def test_a_batch_is_padded_on_the_right(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a b c d e f"}, {"text": "a b"})
    dataset = read_dataset(path, tokenizer, 64)
    batch = collate(dataset.samples)
    lengths = [len(sample.input_ids) for sample in dataset.samples]
    assert batch.attention_mask.sum(1).tolist() == lengths
    assert batch.loss_mask.equal(batch.attention_mask)
    assert batch.input_ids[1, lengths[1] :].tolist() == [0] * (lengths[0] - lengths[1])


@given(
    samples=st.integers(1, 60),
    global_batch=st.integers(1, 12),
    worlds=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3)), min_size=1, max_size=4),
    seed=st.integers(0, 5),
)
def test_an_epoch_trains_each_sample_once_on_any_numbers_of_ranks(
    samples: int, global_batch: int, worlds: list[tuple[int, int]], seed: int
) -> None:
    """Also where a run is resumed at any step on another number of ranks."""
    schedule = Schedule(samples, global_batch, seed)
    seen: list[int] = []
    for step in range(schedule.steps_per_epoch):
        world, batch_size = worlds[step % len(worlds)]
        of_ranks = [schedule.micro_batches(step, rank, world, batch_size) for rank in range(world)]
        counts = [sum(map(len, mine)) for mine in of_ranks]
        assert max(counts) - min(counts) <= 1
        assert all(len(micro) <= batch_size for mine in of_ranks for micro in mine)
        taken = [number for mine in of_ranks for micro in mine for number in micro]
        assert sorted(taken) == sorted(schedule.samples(step))
        seen += taken
    assert sorted(seen) == list(range(samples))


def test_what_counts_for_the_vocabulary_is_what_slots_learn() -> None:
    """Slot t reads token t + 1, counts where that has loss, and learns token t + 2."""
    ids, mask = (5, 6, 7, 8, 9, 9), (1, 0, 1, 1, 0, 1)
    expected = torch.zeros(16, dtype=torch.int64)
    for slot in range(len(ids) - 2):
        if mask[slot + 1]:
            expected[ids[slot + 2]] += 1
    assert torch.equal(token_counts(Dataset([Sample(ids, mask, "a:1")], 0, 0), 16), expected)
    assert int(expected.sum()) == 2


def test_the_draft_vocab_is_the_most_frequent_tokens(tmp_path: Path, tokenizer: object) -> None:
    path = write(tmp_path / "a.jsonl", {"text": "a a a a b b c"})
    counts = token_counts(read_dataset(path, tokenizer, 64), 2048)
    mapping, coverage = frequent_tokens(counts, 2)
    assert mapping.draft_vocab_size == 2
    kept = counts[mapping.selected_token_ids]
    assert int(kept.min()) >= int(counts.sort(descending=True).values[2])
    assert coverage == float(kept.sum() / counts.sum())
    everything, all_of_it = frequent_tokens(counts, 5000)
    assert (everything.draft_vocab_size, all_of_it) == (2048, 1.0)
