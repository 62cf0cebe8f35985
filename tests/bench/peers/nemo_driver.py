"""Runs in NeMo AutoModel's environment: its servers in a child process, its clients here.

Reads a line of JSON for each measurement, and writes one. Nothing of draftmq is imported. Tensors
go over HTTP: the direct way wants GPUs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import threading
import time
from collections import deque
from http.server import ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

os.environ |= {"NEMO_EAGLE_ENABLE_NCCL": "0", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import torch
from nemo_automodel.components.speculative.eagle.remote import server as nemo_server
from nemo_automodel.components.speculative.eagle.remote import wire
from nemo_automodel.components.speculative.eagle.remote.client import RemoteEagle3TargetModel

_PATIENCE_S = 120.0


class Paced:
    """A target that takes so long a request, with next to nothing to send."""

    VOCAB, HIDDEN, TOKENS = 64, 16, 512

    def __init__(self, request_s: float) -> None:
        self._request_s = request_s
        self._aux = torch.zeros(1, self.TOKENS, 3 * self.HIDDEN)
        self._logits = torch.zeros(1, self.TOKENS, self.VOCAB)

    def generate_batch(self, input_ids: Any, attention_mask: Any, loss_mask: Any) -> Any:
        time.sleep(self._request_s)
        return SimpleNamespace(
            aux_hidden_states=self._aux,
            logits=self._logits,
            input_ids=input_ids,
            attention_mask=attention_mask,
            loss_mask=loss_mask,
        )


def supervision_of(tokens: int, hidden_size: int, draft_vocab: int) -> dict[str, torch.Tensor]:
    """Random tensors in the place of what a target gives: aux bfloat16, probabilities float32."""
    return {
        "aux_hidden_states": torch.randn(1, tokens, 3 * hidden_size, dtype=torch.bfloat16),
        "target_probs": torch.rand(1, tokens, draft_vocab),
        "position_mask": torch.ones(1, tokens, 1, dtype=torch.bool),
        "input_ids": torch.zeros(1, tokens, dtype=torch.int64),
        "loss_mask": torch.ones(1, tokens, dtype=torch.int64),
    }


class Servers:
    """NeMo's servers, in one process; those that sleep do not get into each other's way."""

    def __init__(self, serve: Any, *arguments: Any) -> None:
        context = multiprocessing.get_context("fork")
        urls: Any = context.SimpleQueue()
        self._process = context.Process(target=serve, args=(urls, *arguments), daemon=True)
        self._process.start()
        self.urls: list[str] = urls.get()

    def __enter__(self) -> Servers:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def _serve_paced(urls: Any, server_s: list[float]) -> None:
    _serve(urls, [Paced(request_s) for request_s in server_s])


def _serve_ready(urls: Any, *shape: int) -> None:
    ready = supervision_of(*shape)
    nemo_server.compute_supervision = lambda *_, **__: dict(ready)
    _serve(urls, [SimpleNamespace()])


def _serve(urls: Any, targets: list[Any]) -> None:
    torch.set_num_threads(1)
    started = []
    for target in targets:
        logic = nemo_server.TargetModelServer(target, nccl_port=0, host="127.0.0.1")
        handler = nemo_server._make_request_handler(logic)
        http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=http.serve_forever, daemon=True).start()
        started.append(f"http://127.0.0.1:{http.server_address[1]}")
    urls.put(started)
    threading.Event().wait()


def _client(urls: list[str], vocab: int) -> RemoteEagle3TargetModel:
    client = RemoteEagle3TargetModel.from_urls(urls, device="cpu", max_retries=0)
    client.set_vocab_mapping(torch.arange(vocab), torch.ones(vocab, dtype=torch.bool))
    return client


def _tokens(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    ones = torch.ones(1, count, dtype=torch.int64)
    return torch.zeros(1, count, dtype=torch.int64), ones, ones


def supervision(tokens: int, hidden_size: int, draft_vocab: int) -> dict[str, float]:
    """One reply; the one before it opened the connection. Bytes are those of its body."""
    shape = (tokens, hidden_size, draft_vocab)
    with Servers(_serve_ready, *shape) as servers:
        client = _client(servers.urls, draft_vocab)
        asked = _tokens(tokens)
        client.generate_batch(*asked)
        began = time.perf_counter()
        batch = client.generate_batch(*asked)
        seconds = time.perf_counter() - began
        names = ("aux_hidden_states", "target_probs", "position_mask", "input_ids", "loss_mask")
        nbytes = len(wire.encode_to_bytes({name: getattr(batch, name) for name in names}))
        client.close()
    return {"seconds": seconds, "bytes": nbytes}


def share(server_s: list[float], ranks: int, seconds: float, warm_s: float) -> dict[str, float]:
    """Ranks that step together, each with a client and as many requests ahead as servers."""
    with Servers(_serve_paced, server_s) as servers:
        clients = [_client(servers.urls, Paced.VOCAB) for _ in range(ranks)]
        begins_at = time.perf_counter() + warm_s
        ends_at = begins_at + seconds
        stepped_at: list[float] = []

        def step() -> None:
            if time.perf_counter() >= begins_at:
                stepped_at.append(time.perf_counter())

        barrier = threading.Barrier(ranks, step, _PATIENCE_S)

        def rank(client: RemoteEagle3TargetModel) -> None:
            asked = _tokens(Paced.TOKENS)
            ahead = deque(client.generate_batch_async(*asked) for _ in server_s)
            while not stepped_at or stepped_at[-1] < ends_at:
                ahead.append(client.generate_batch_async(*asked))
                ahead.popleft().result(_PATIENCE_S)
                barrier.wait()

        threads = [threading.Thread(target=rank, args=(client,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for client in clients:
            client.close()
    return {"steps_per_s": (len(stepped_at) - 1) / (stepped_at[-1] - stepped_at[0])}


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    for line in sys.stdin:
        asked = json.loads(line)
        measure = supervision if asked["do"] == "supervision" else share
        measured = measure(**asked["with"])
        print(json.dumps(measured), file=answers, flush=True)


if __name__ == "__main__":
    main()
