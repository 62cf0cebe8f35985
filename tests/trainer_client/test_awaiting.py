"""Requests and handles in asyncio's own terms."""

from __future__ import annotations

import asyncio
from typing import Any

import torch

from broker.service import Broker
from tests.vocab import shuffled
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.service import Worker
from worker.supervision.mapping import VocabMapping
from worker.targets.stub import StubTarget


def test_requests_and_handles_can_be_awaited() -> None:
    ids = torch.arange(12).view(2, 6)
    ones = torch.ones_like(ids)
    mapping = VocabMapping(shuffled(torch.arange(0, 64, 2)), 64)
    with Broker() as broker, Worker(StubTarget(), broker.worker_endpoint):
        url = broker.client_endpoint
        with RemoteEagle3TargetModel.from_urls([url], device="cpu", timeout=30) as remote:
            remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)

            async def ask() -> list[Any]:
                handles = [remote.generate_batch_async(ids, ones, ones) for _ in range(2)]
                pending = remote._client.submit("model_info", timeout_s=30)
                return [await handles[0], await handles[1], await pending]

            first, second, info = asyncio.run(ask())
            assert torch.equal(first.aux_hidden_states, second.aux_hidden_states)
            assert info.reply.info_json
