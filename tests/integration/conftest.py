"""Real services on real sockets, around a tiny random target."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from broker.core import BrokerConfig
from broker.service import Broker
from tests.vocab import shuffled
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.service import Worker
from worker.supervision.mapping import VocabMapping
from worker.targets.huggingface import HuggingFaceTarget

VOCAB, LENGTH = 256, 64


def make_target(seed: int = 0) -> HuggingFaceTarget:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=32,
        vocab_size=VOCAB,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        max_position_embeddings=LENGTH,
    )
    return HuggingFaceTarget(LlamaForCausalLM(config), name="tiny")


@pytest.fixture(scope="session")
def target() -> HuggingFaceTarget:
    return make_target()


@pytest.fixture(scope="session")
def mapping() -> VocabMapping:
    return VocabMapping(shuffled(torch.arange(0, VOCAB, 2)), VOCAB)


def tokens(seed: int = 0, batch: int = 2, length: int = 16) -> tuple[torch.Tensor, ...]:
    """``input_ids, attention_mask, loss_mask`` [B, T]."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB, (batch, length), generator=generator)
    return ids, torch.ones_like(ids), torch.ones_like(ids)


class Cluster:
    """A broker with its workers and trainers, all stopped at the end of the test."""

    def __init__(self, target: Any, stack: contextlib.ExitStack) -> None:
        self.target = target
        self._stack = stack
        self.broker = self.start_broker()

    def start_broker(
        self, clients: str = "tcp://127.0.0.1:0", workers: str = "tcp://127.0.0.1:0", **config: Any
    ) -> Broker:
        settings = {"heartbeat_s": 0.2, "liveness_s": 2.0, "model_grace_s": 0.5} | config
        broker = Broker(clients, workers, "127.0.0.1:0", BrokerConfig(**settings))
        return self._stack.enter_context(broker)

    def worker(self, target: Any = None, **options: Any) -> Worker:
        worker = Worker(target or self.target, self.broker.worker_endpoint, **options)
        return self._stack.enter_context(worker)

    def trainer(
        self, mapping: VocabMapping | None = None, **options: Any
    ) -> RemoteEagle3TargetModel:
        settings = {"device": "cpu", "timeout": 20, "max_retries": 0} | options
        remote = RemoteEagle3TargetModel.from_urls([self.broker.client_endpoint], **settings)
        self._stack.enter_context(remote)
        if mapping is not None:
            remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
        return remote


@pytest.fixture
def cluster(target: HuggingFaceTarget) -> Iterator[Cluster]:
    with contextlib.ExitStack() as stack:
        yield Cluster(target, stack)
