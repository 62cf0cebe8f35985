"""From a request packet to its answer: the one place where protocol and target meet."""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict
from typing import Any

from torch import Tensor

from broker.protocol import Limits, LocalProtocolError, Packet, encode, payload_hash
from broker.protocol import messages as m
from broker.protocol.errors import RemoteProtocolError
from broker.protocol.tensors import from_frames, to_frames
from worker.direct.parts import specs
from worker.direct.sender import Plan, Sender
from worker.errors import BadRequest
from worker.mapping import VocabMapping
from worker.supervision import (
    compute_supervision,
    input_embeddings,
    lm_head_rows,
    validate_request,
)
from worker.targets.contract import Target, TargetFacts

_logger = logging.getLogger("draftmq.worker")
_TOKENS = ("input_ids", "attention_mask", "loss_mask")


def description(facts: TargetFacts) -> m.ModelDescription:
    """What the worker tells brokers of its target."""
    return m.ModelDescription(
        model=facts.model,
        fingerprint=facts.fingerprint,
        num_hidden_layers=facts.num_hidden_layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        max_position_embeddings=facts.max_position_embeddings,
        aux_layer_ids=tuple(facts.aux_layer_ids),
        dtype=facts.dtype,
        encodings=tuple(facts.encodings),
        tokenizer=facts.tokenizer,
        config_json=json.dumps(facts.config),
    )


class Answerer:
    """Runs the target for one request at a time and makes the reply, or the failure."""

    def __init__(
        self, target: Target, facts: TargetFacts, worker: str, sender: Sender | None = None
    ) -> None:
        self.target = target
        self.facts = facts
        self.worker = worker
        self._sender = sender
        self.mappings: dict[str, VocabMapping] = {}

    def learn(self, offer: Packet) -> None:
        """Keep a mapping. Raises ``ValueError`` if it is not one."""
        assert isinstance(offer.message, m.MappingOffer)
        offer.verify()
        if offer.message.vocab_size != self.facts.vocab_size:  # before memory is taken for it
            raise ValueError(
                f"the mapping is for a vocabulary of {offer.message.vocab_size}, this target has "
                f"{self.facts.vocab_size}"
            )
        ids = from_frames(offer.message.manifest, offer.payload)["selected_token_ids"]
        mapping = VocabMapping(ids, offer.message.vocab_size)
        self.mappings[mapping.id] = mapping

    def forget(self, mapping_id: str) -> None:
        self.mappings.pop(mapping_id, None)

    def answer(self, packet: Packet, limits: Limits, waited_s: float = 0.0) -> Packet:
        """The reply to a request; whatever goes wrong becomes a :class:`Failure`.

        ``waited_s`` is how long the request has been here; the reply says it, for a trace.
        A reply whose tensors go directly has no payload; they are on their way when this returns.
        """
        request = packet.message
        assert isinstance(request, m.Request)
        began = time.perf_counter()
        try:
            packet.verify()
        except RemoteProtocolError as error:
            return _failure(request, "damaged", error)
        try:
            info, tensors = self._serve(request, packet)
            plan = self._sender.plan(request, tensors) if self._sender else Plan()
            if plan.transfer is None:
                manifest, payload = to_frames(tensors)
            else:
                manifest, payload = specs(tensors), []
            reply = m.Reply(
                id=request.id,
                worker=self.worker,
                model=self.facts.model,
                fingerprint=self.facts.fingerprint,
                aux_layer_ids=tuple(self.facts.aux_layer_ids),
                tokens_hash=payload_hash(packet),
                mapping_id=request.mapping_id,
                encoding=request.encoding,
                compute_s=time.perf_counter() - began,
                info_json=info or json.dumps({"waited_s": waited_s}),
                manifest=manifest,
                transfer=plan.transfer,
                invitation=plan.invitation,
            )
            answer = encode(reply, payload, limits)
            if self._sender is not None and plan.transfer is not None:
                self._sender.send(request.id.client, plan.transfer, tensors)
            return answer
        except BadRequest as error:
            return _failure(request, "bad_request", error)
        except RemoteProtocolError as error:
            return _failure(request, "damaged", error)
        except LocalProtocolError as error:
            return _failure(request, "too_large", error)
        except Exception as error:
            _logger.exception("target_failed", extra={"fields": {"request": str(request.id)}})
            return _failure(request, "target_failed", error)

    def _serve(self, request: m.Request, packet: Packet) -> tuple[str, dict[str, Tensor]]:
        if request.operation == "model_info":
            return json.dumps(asdict(self.facts)), {}
        if request.operation == "input_embeddings":
            return "", input_embeddings(self.target)
        if request.operation == "lm_head_rows":
            return "", lm_head_rows(self.target, self._mapping(request))
        if request.operation == "generate":
            return "", self._generate(request, packet)
        known = ", ".join(m.OPERATIONS)
        raise BadRequest(f"unknown operation {request.operation!r}; known are {known}")

    def _generate(self, request: m.Request, packet: Packet) -> dict[str, Tensor]:
        if request.encoding not in self.facts.encodings:
            offered = ", ".join(self.facts.encodings)
            raise BadRequest(f"encoding {request.encoding!r} is not offered here; choose {offered}")
        tensors: dict[str, Any] = from_frames(request.manifest, packet.payload)
        if tuple(tensors) != _TOKENS:
            raise BadRequest(f"wants the tensors {_TOKENS}, got {tuple(tensors)}")
        facts = self.facts
        validate_request(
            **tensors, vocab_size=facts.vocab_size, max_tokens=facts.max_position_embeddings
        )
        return compute_supervision(
            self.target, **tensors, mapping=self._mapping(request), encoding=request.encoding
        )

    def _mapping(self, request: m.Request) -> VocabMapping:
        mapping = self.mappings.get(request.mapping_id)
        if mapping is None:
            raise BadRequest(
                f"no usable vocab mapping {request.mapping_id!r} came before the request; "
                "call set_vocab_mapping first"
            )
        return mapping


def _failure(request: m.Request, code: str, error: Exception) -> Packet:
    text = str(error) if code != "target_failed" else f"{type(error).__name__}: {error}"
    return encode(m.Failure(request.id, code, text[:4000]))
