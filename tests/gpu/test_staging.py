"""Batches copied to a GPU on a stream of their own arrive whole, in order and in time."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from trainer_client.targets.batch import Eagle3TargetBatch
from trainer_client.training.staging import staged

T, H, D = 2048, 256, 8192


def batch(number: int) -> Eagle3TargetBatch:
    ids = torch.full((1, T), number)
    return Eagle3TargetBatch(
        aux_hidden_states=torch.full((1, T, 3 * H), float(number)),
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        loss_mask=torch.ones_like(ids),
        target_probs=torch.full((1, T, D), float(number)),
        position_mask=torch.ones(1, T, 1, dtype=torch.bool),
    )


def test_copies_have_ended_when_they_are_used() -> None:
    device = torch.device("cuda")
    sums = []
    for staged_batch in staged(map(batch, range(12)), device):
        assert staged_batch.target_probs is not None
        assert staged_batch.target_probs.is_cuda
        sums.append((staged_batch.target_probs.amin(), staged_batch.target_probs.amax()))
        del staged_batch  # its memory may be taken by the next copy only after this use
    assert [(int(low), int(high)) for low, high in sums] == [(n, n) for n in range(12)]


def test_the_next_batch_is_copied_while_this_one_is_computed_with() -> None:
    device = torch.device("cuda")
    taken: list[int] = []

    def batches() -> Iterator[Eagle3TargetBatch]:
        for number in range(4):
            taken.append(number)
            yield batch(number)

    busy = torch.randn(8192, 8192, device=device)
    for number, given in enumerate(staged(batches(), device)):
        assert len(taken) == min(number + 2, 4)
        assert int(given.input_ids[0, 0]) == number
        for _ in range(20):
            busy = busy @ busy / 8192
    computed = torch.cuda.Event()
    feed = staged(batches(), device)
    next(feed)
    for _ in range(200):
        busy = busy @ busy / 8192
    computed.record()
    next(feed)  # the copy of batch 2 began behind a long computation, and did not wait for it
    assert not computed.query()
    torch.cuda.synchronize()


def test_what_is_on_the_device_already_stays_there() -> None:
    device = torch.device("cuda", 0)
    there = batch(1).map(lambda tensor: tensor.to(device))
    (same,) = staged([there], device)
    assert same.aux_hidden_states.data_ptr() == there.aux_hidden_states.data_ptr()
