"""In NeMo AutoModel's environment: its wrappers through a broker, against its own server.

Both serve the same wrapper, and are asked the same by their own clients: every tensor must be equal
to the bit, and of the same shape and dtype. Usage: ``PYTHON -m tests.engines.nemo.tensors FOLDER``
(for logs).
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any

os.environ |= {"NEMO_EAGLE_ENABLE_NCCL": "0", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}

import torch
from nemo_automodel.components.speculative.eagle.remote import server as nemo_server
from nemo_automodel.components.speculative.eagle.remote.client import RemoteEagle3TargetModel
from torch import Tensor

from tests.engines.nemo import wrappers
from tests.ports import free_port
from trainer_client.commands.demo import Processes
from trainer_client.nemo import BrokerTarget
from worker.targets import EMBEDDED

Tokens = tuple[Tensor, Tensor, Tensor]
#: D, of a vocabulary of 2,048
DRAFT_VOCABULARIES = (1, 512, 2048)


@dataclass(frozen=True)
class Case:
    """A wrapper, and how it is made."""

    factory: Callable[..., Any]
    dtype: str
    layers: tuple[int, ...]

    def __str__(self) -> str:
        layers = ",".join(map(str, self.layers)) or "default"
        return f"{self.factory.__name__} {self.dtype} layers {layers}"

    def make(self) -> Any:
        return self.factory(str(EMBEDDED), self.dtype, self.layers or None)

    def arguments(self) -> list[str]:
        """How ``draftmq worker`` makes it."""
        made = f"{self.factory.__module__}:{self.factory.__name__}"
        said = ["--target-factory", made, "--factory-arg", f"path={EMBEDDED}"]
        said += ["--dtype", self.dtype]
        return said + (["--aux-layers", ",".join(map(str, self.layers))] if self.layers else [])


CASES = (
    Case(wrappers.hugging_face, "float32", ()),
    Case(wrappers.hugging_face, "bfloat16", (0, 2, 5)),
    Case(wrappers.engine, "float32", (0, 2, 5)),
    Case(wrappers.engine, "bfloat16", ()),
)


@contextmanager
def nemos(target: Any) -> Iterator[RemoteEagle3TargetModel]:
    """NeMo's server in a thread, and its client."""
    logic = nemo_server.TargetModelServer(target, nccl_port=0, host="127.0.0.1")
    handler = nemo_server._make_request_handler(logic)
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    client = RemoteEagle3TargetModel.from_urls(
        [f"http://127.0.0.1:{http.server_address[1]}"], device="cpu", max_retries=0
    )
    yield client
    client.close()
    http.shutdown()
    http.server_close()


@contextmanager
def ours(case: Case, logs: Path) -> Iterator[BrokerTarget]:
    """A broker, two workers and our client; all but the client in processes of their own."""
    logs.mkdir(parents=True)
    clients, workers, http = (f"127.0.0.1:{free_port()}" for _ in range(3))
    with Processes(logs) as processes:
        ends = ["--clients", f"tcp://{clients}", "--workers", f"tcp://{workers}", "--http", http]
        processes.start("broker", ["broker", *ends])
        for number in range(2):
            where = ["worker", "--broker", f"tcp://{workers}", "--threads", 1]
            processes.start(f"worker.{number}", [*where, *case.arguments()])
        with BrokerTarget.from_urls([f"tcp://{clients}"], device="cpu", timeout=120) as client:
            yield client


def batches(vocab_size: int, draw: torch.Generator) -> Iterator[Tokens]:
    """As a loader of NeMo's has them, and worse: rows of all lengths, masks with holes."""
    for rows, length in ((1, 1), (1, 64), (2, 32), (4, 96)):
        ids = torch.randint(0, vocab_size, (rows, length), generator=draw)
        lengths = torch.randint(1, length + 1, (rows, 1), generator=draw)
        attention = (torch.arange(length) < lengths).long()
        loss = attention * torch.randint(0, 2, (rows, length), generator=draw)
        yield ids, attention, loss
        yield ids, torch.ones_like(ids), torch.ones_like(ids)
        yield ids, attention, torch.zeros_like(ids)


def different(got: Any, wanted: Any, used: Tensor) -> list[str]:
    """The fields that are not the same; behind a row's end only shape and dtype must be."""
    found = []
    for name in (field.name for field in fields(wanted)):
        one, other = getattr(got, name), getattr(wanted, name)
        if (one is None) != (other is None):
            found.append(f"{name}: {one} for {other}")
        elif one is not None:
            by_target = name in ("aux_hidden_states", "target_probs")
            same = one.dtype == other.dtype and one.shape == other.shape
            if not same or not torch.equal(*((t[used] if by_target else t) for t in (one, other))):
                found.append(f"{name}: {one.dtype} {tuple(one.shape)}, {other.dtype}")
    return found


def compare(case: Case, logs: Path) -> tuple[int, list[str]]:
    """How many batches were compared, and what differs."""
    draw = torch.Generator().manual_seed(len(str(case)))
    compared = 0
    with nemos(case.make()) as theirs, ours(case, logs) as mine:
        wrong = list(described_otherwise(mine, theirs))
        vocab_size = theirs.model_info()["vocab_size"]
        for size in DRAFT_VOCABULARIES:
            ids = torch.randperm(vocab_size, generator=draw)[:size]
            mask = torch.zeros(vocab_size, dtype=torch.bool).index_fill_(0, ids, True)
            for client in (theirs, mine):
                client.set_vocab_mapping(ids, mask)
            asked = list(batches(vocab_size, draw))
            under_way = [mine.generate_batch_async(*tokens) for tokens in asked]  # all at once
            for tokens, handle in zip(asked, under_way, strict=True):
                wanted, used = theirs.generate_batch(*tokens), tokens[1].bool()
                found = different(handle.result(), wanted, used)
                found += different(mine.generate_batch(*tokens), wanted, used)
                wrong += [f"D={size}, {tuple(used.shape)}: {each}" for each in found]
                compared += 2
    return compared, wrong


def described_otherwise(mine: BrokerTarget, theirs: RemoteEagle3TargetModel) -> Iterator[str]:
    """What NeMo's server says of the model and ours does not."""
    said = mine.model_info()
    for key, value in theirs.model_info().items():
        if said.get(key) != value:
            yield f"model_info {key}: {said.get(key)} for {value}"
    one, other = (each.get_input_embeddings().weight for each in (mine, theirs))
    if one.dtype != other.dtype or not torch.equal(one, other):
        yield "input embeddings"


def main() -> int:
    """Print a line for each case, and return 1 where something differs."""
    torch.set_num_threads(1)
    failed = 0
    for number, case in enumerate(CASES):
        compared, wrong = compare(case, Path(sys.argv[1]) / f"tensors-{number}")
        failed += bool(wrong)
        print(f"{'FAIL' if wrong else 'ok  '}  {case}: {compared} batches as NeMo's own server's")
        print("".join(f"      {each}\n" for each in wrong[:5]), end="", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
