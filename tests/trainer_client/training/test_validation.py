from __future__ import annotations

import pytest

from trainer_client.errors import DataError
from trainer_client.training.data import Dataset, Sample
from trainer_client.training.validation import hold_out


def of_records(*samples_of_each: int) -> Dataset:
    made = [
        Sample((record, turn), (1, 1), f"chats.jsonl:{record + 1}")
        for record, count in enumerate(samples_of_each)
        for turn in range(count)
    ]
    return Dataset(made, 0, 0)


@pytest.mark.parametrize("seed", range(8))
def test_the_samples_of_one_record_are_trained_or_held_out_together(seed: int) -> None:
    """Turns of one conversation repeat each other: one that was trained measures nothing."""
    whole = of_records(1, 4, 2, 3, 1, 5, 2, 2)
    kept, held = hold_out(whole, 0.25, seed)
    assert not {sample.origin for sample in kept.samples} & {sample.origin for sample in held}
    assert sorted(s.input_ids for s in [*kept.samples, *held]) == sorted(
        s.input_ids for s in whole.samples
    )
    assert 5 <= len(held) < 5 + 5  # the share, and no more than the record that completes it
    assert hold_out(whole, 0.25, seed) == (kept, held)


def test_something_is_left_to_train_whatever_the_share() -> None:
    kept, held = hold_out(of_records(1, 1, 1), 0.99, 0)
    assert (len(kept.samples), len(held)) == (1, 2)


def test_one_record_cannot_be_shared() -> None:
    with pytest.raises(DataError, match=r"--validation 0\.1 .* the data has 1;"):
        hold_out(of_records(3), 0.1, 0)
