"""A backend's promises. The GPU's are held to them over stand-ins, and in tests/gpu for real."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from broker.peer.tensors import shaped
from broker.protocol.messages import DTYPE_BYTES, TensorSpec
from tests.worker.direct import standins
from tests.worker.direct.pairs import both, pair
from tests.worker.direct.standins import standing_in
from worker.direct import gloo
from worker.direct.backend import TransferError
from worker.direct.parts import TRANSFER_PART_BYTES, octets, specs


@pytest.fixture(params=["gloo", "shm", "ipc", "nccl"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """All of them; the GPU's run over stand-ins for what the GPU does."""
    with standing_in(request.param):
        yield str(request.param)


def tensors_of_all_kinds() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    bits = torch.randint(0, 2, (3, 5, 8), generator=draw)
    made = {name: bits.to(getattr(torch, name)) for name in DTYPE_BYTES}
    strided = torch.arange(24.0).view(4, 6).T
    return made | {"empty": torch.empty(0, 4), "scalar": torch.tensor(7), "strided": strided}


def test_every_dtype_and_shape_arrives_as_it_was(backend: str) -> None:
    sent = tensors_of_all_kinds()
    manifest = specs(sent)
    with pair(backend) as (worker, client):
        flat = [octets(tensor) for tensor in sent.values()]
        sizes = [spec.nbytes for spec in manifest]
        _, got = both(lambda: worker.send(0, flat, 5.0), lambda: client.receive(0, sizes, 5.0))
    for spec, flat, (name, tensor) in zip(manifest, got, sent.items(), strict=True):
        received = shaped(flat, spec)
        assert (spec.name, received.dtype) == (name, tensor.dtype)
        assert torch.equal(received, tensor)


def test_many_transfers_in_several_parts(backend: str) -> None:
    sizes = [TRANSFER_PART_BYTES + 7, 0, 3 * TRANSFER_PART_BYTES, 5]
    with pair(backend) as (worker, client):
        for seq in range(4):
            sent = [torch.full((size,), seq, dtype=torch.uint8) for size in sizes]
            send = lambda seq=seq, sent=sent: worker.send(seq, sent, 5.0)  # noqa: E731
            _, got = both(send, lambda seq=seq: client.receive(seq, sizes, 5.0))
            assert all(torch.equal(a, b) for a, b in zip(sent, got, strict=True))


def test_ends_that_are_out_of_step_notice_at_once(backend: str) -> None:
    sent = [torch.ones(100, dtype=torch.uint8)]
    with pair(backend) as (worker, client):
        # NCCL's sender hears of it no later than with its next transfer
        told = contextlib.suppress if backend == "nccl" else pytest.raises

        def send() -> None:
            with told(TransferError):
                worker.send(4, sent, 60.0)

        sending = threading.Thread(target=send)
        sending.start()
        with pytest.raises(TransferError, match=r"part \(5, 0\) was expected, \(4, 0\) came"):
            client.receive(5, [100], 60.0)
        sending.join(10)
        assert not sending.is_alive()


def _suppressed(call: object) -> None:
    with pytest.raises(TransferError):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("side", ["send", "receive"])
def test_a_peer_that_does_nothing_is_waited_for_no_longer_than_the_limit(
    backend: str, side: str
) -> None:
    with pair(backend) as (worker, client):
        calls = {
            "send": lambda: worker.send(0, [torch.ones(8, dtype=torch.uint8)], 0.2),
            "receive": lambda: client.receive(0, [8], 0.2),
        }
        began = time.monotonic()
        with pytest.raises(TransferError, match=r"(?i)timed out"):
            calls[side]()
        assert time.monotonic() - began < 10


@pytest.mark.parametrize("interrupter", ["itself", "its peer"])
def test_a_waiter_is_freed_at_once(backend: str, interrupter: str) -> None:
    with pair(backend) as (worker, client):
        failed = threading.Event()

        def wait() -> None:
            _suppressed(lambda: client.receive(0, [1 << 20], 60.0))
            failed.set()

        waiting = threading.Thread(target=wait)
        waiting.start()
        (client if interrupter == "itself" else worker).interrupt()
        assert failed.wait(10.0)
        waiting.join()


def test_a_peer_that_left_is_known_without_a_transfer(backend: str) -> None:
    with pair(backend) as (worker, client):
        assert not worker.gone
        client.close()
        for _ in range(1000):
            if worker.gone:
                break
        assert worker.gone


def test_tags_go_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo, "_NEVER", 11)
    with pair("gloo") as (worker, client):
        for seq in range(10):
            sent = [torch.full((9,), seq, dtype=torch.uint8)]
            send = lambda seq=seq, sent=sent: worker.send(seq, sent, 5.0)  # noqa: E731
            _, got = both(send, lambda seq=seq: client.receive(seq, [9], 5.0))
            assert torch.equal(got[0], sent[0])


def test_a_dtype_that_does_not_travel_is_an_error() -> None:
    with pytest.raises(KeyError):
        specs({"complex": torch.zeros(2, dtype=torch.complex64)})
    assert specs({"a": torch.zeros(2, 3)}) == (TensorSpec("a", "float32", (2, 3), 0),)


# -- the GPU's, over stand-ins ------------------------------------------------------------------


def test_a_ring_is_made_and_mapped_once_and_let_go_of_at_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runtime = standins.cuda(monkeypatch)
    with pair("ipc") as (worker, client):
        for seq in range(3):
            sent = [torch.full((TRANSFER_PART_BYTES + seq,), seq, dtype=torch.uint8)]
            send = lambda seq=seq, sent=sent: worker.send(seq, sent, 5.0)  # noqa: E731
            both(send, lambda seq=seq, sent=sent: client.receive(seq, [sent[0].numel()], 5.0))
            assert (len(runtime.memory), len(runtime.mapped)) == (1, 1)
        both(worker.close, client.close)
        assert not runtime.memory
        assert not runtime.mapped


def test_ends_that_cannot_share_memory_do_not_join(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = standins.cuda(monkeypatch)
    runtime.refuse_mapping = True
    with pytest.raises(TransferError, match=r"cudaIpcOpenMemHandle: invalid device context"):
        pair("ipc").__enter__()
    assert not runtime.memory


def test_a_gpu_that_is_not_visible_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = standins.cuda(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(TransferError, match=r"GPU-stand-in is not visible.*CUDA_VISIBLE_DEVICES"):
        pair("ipc").__enter__()
    assert not runtime.memory


def test_memory_that_is_not_the_workers_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = standins.cuda(monkeypatch)
    other = (ctypes.c_ubyte * (64 << 20))()

    def map_another(pointer: Any, handle: object, flags: object) -> int:
        pointer._obj.value = ctypes.addressof(other)
        runtime.mapped.append(pointer._obj.value)
        return 0

    monkeypatch.setattr(runtime, "cudaIpcOpenMemHandle", map_another)
    with pytest.raises(TransferError):
        pair("ipc").__enter__()
    assert not runtime.mapped


def test_a_communicator_that_failed_is_not_taken_for_a_part_that_came(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    standins.nccl(monkeypatch)
    with pair("nccl") as (_, client):
        monkeypatch.setattr(standins.NcclGroup, "fails", "NCCL error: remote process exited")
        with pytest.raises(TransferError, match="remote process exited"):
            client.receive(0, [8], 5.0)  # the note of part (0, 0) would be zeros


def test_what_never_came_does_not_look_like_the_first_part(monkeypatch: pytest.MonkeyPatch) -> None:
    standins.nccl(monkeypatch)
    nothing = standins._Work([])
    monkeypatch.setattr(standins.NcclGroup, "_end_coalescing", lambda group: nothing)
    monkeypatch.setattr(standins.NcclGroup, "recv", lambda *arguments: None)
    with pair("nccl") as (_, client), pytest.raises(TransferError, match=r"\(-1, -1\) came"):
        client.receive(0, [8], 5.0)
