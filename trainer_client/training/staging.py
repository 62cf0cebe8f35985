"""Batches brought to the training device; on a GPU the copy of the next overlaps this step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from trainer_client.targets.batch import Eagle3TargetBatch
from trainer_client.training.refused import PartialBatch

Given = Eagle3TargetBatch | PartialBatch


def staged(batches: Iterable[Given], device: torch.device) -> Iterator[Given]:
    """The same batches, in order, on ``device``.

    On CUDA one batch is taken ahead, and copied from pinned memory on a stream of its own while the
    consumer computes with the one before. Elsewhere nothing is taken ahead.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.map(lambda tensor: tensor.to(device))
        return
    copies = torch.cuda.Stream(device)

    def copy(batch: Given) -> tuple[Given, torch.cuda.Event]:
        with torch.cuda.stream(copies):
            return batch.map(lambda tensor: _copy(tensor, device)), copies.record_event()

    # a thread pins: that copies within the host, and the training thread has kernels to launch
    with ThreadPoolExecutor(1, "draftmq-pin") as pinning:
        ahead: list[Future[tuple[Given, torch.cuda.Event]]] = []
        for batch in batches:
            ahead.append(pinning.submit(copy, batch))
            if len(ahead) > 1:
                yield _ready(*ahead.pop(0).result(), device)
        for last in ahead:
            yield _ready(*last.result(), device)


def _copy(tensor: Tensor, device: torch.device) -> Tensor:
    if tensor.is_cuda or tensor.is_pinned():
        return tensor.to(device, non_blocking=True)
    return tensor.pin_memory().to(device, non_blocking=True)


def _ready(batch: Given, arrived: torch.cuda.Event, device: torch.device) -> Given:
    """Have the consumer's stream wait for the copy, and the allocator know who uses it."""
    stream = torch.cuda.current_stream(device)
    stream.wait_event(arrived)

    def used(tensor: Tensor) -> Tensor:
        tensor.record_stream(stream)
        return tensor

    return batch.map(used)
