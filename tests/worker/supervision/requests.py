"""Requests as a worker gets them, with real token ids in their payload."""

from __future__ import annotations

import torch

from broker.peer.tensors import to_frames
from broker.protocol import Packet, encode
from broker.protocol import messages as m
from worker.supervision.mapping import VocabMapping


def offer(mapping: VocabMapping) -> Packet:
    """The vocab mapping, as a broker passes it on."""
    manifest, payload = to_frames({"selected_token_ids": mapping.selected_token_ids})
    return encode(m.MappingOffer(mapping.id, mapping.vocab_size, manifest), payload)


def generate(
    number: int,
    ids: torch.Tensor,
    mapping: VocabMapping,
    *,
    encoding: str = "probs",
    **tensors: torch.Tensor,
) -> Packet:
    """A request for supervision of ids [B, T]; masks are ones unless given."""
    ones = torch.ones_like(ids)
    given = {"input_ids": ids, "attention_mask": ones, "loss_mask": ones} | tensors
    manifest, payload = to_frames(given)
    request = m.Request(
        id=m.RequestId("c", 1, number),
        operation="generate",
        model="",
        step=number,
        n_tokens=ids.numel(),
        mapping_id=mapping.id,
        encoding=encoding,
        ttl_s=60.0,
        manifest=manifest,
    )
    return encode(request, payload)
