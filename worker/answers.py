"""From a request packet to its answer: the one place where protocol and target meet."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from broker.peer.parts import in_parts
from broker.peer.tensors import from_packet, to_frames
from broker.protocol import Limits, LocalProtocolError, Packet, encode, payload_hash
from broker.protocol import messages as m
from broker.protocol.bounds import plain_text
from broker.protocol.errors import RemoteProtocolError
from broker.protocol.names import bounded
from broker.protocol.wish import Wish
from worker.direct.parts import specs
from worker.direct.sender import Plan, Sender
from worker.errors import BadRequest, TargetGoneError
from worker.staging import Mark, Staging, staging_for
from worker.supervision.batching import compute_together
from worker.supervision.checks import check_shapes, expected_shapes, name_unsound, soundness
from worker.supervision.fp8 import fp8_errors
from worker.supervision.mapping import VocabMapping
from worker.supervision.requests import Tokens, validate_tokens
from worker.supervision.supervision import (
    compute,
    input_embeddings,
    lm_head_rows,
    suited,
)
from worker.targets.contract import Target, TargetFacts, frozen

_logger = logging.getLogger("draftmq.worker")


def description(facts: TargetFacts) -> m.ModelDescription:
    """What the worker tells brokers of its target."""
    return m.ModelDescription(
        model=bounded(facts.model),
        fingerprint=facts.fingerprint,
        num_hidden_layers=facts.num_hidden_layers,
        hidden_size=facts.hidden_size,
        vocab_size=facts.vocab_size,
        max_position_embeddings=facts.max_position_embeddings,
        aux_layer_ids=tuple(facts.aux_layer_ids),
        dtype=facts.dtype,
        encodings=tuple(facts.encodings),
        layers=tuple(facts.layers),
        engine=bounded(facts.engine),
        tokenizer=facts.tokenizer,
        config_json=json.dumps(facts.config),
    )


@dataclass(eq=False)
class Work:
    """A request on its way through the worker's two threads."""

    packet: Packet
    #: how long it has been here when the target was free for it
    waited_s: float = 0.0
    #: what ``generate`` runs on
    tokens: Tokens | None = None
    #: what it is asked for, and over which vocabulary, if any
    wish: Wish | None = None
    mapping: VocabMapping | None = None
    #: the result, on the target's device
    tensors: dict[str, Tensor] | None = None
    #: whether all its values are numbers, there when the tensors are; bool [1]
    sound: Tensor = field(default_factory=lambda: torch.ones(1, dtype=torch.bool))
    info_json: str = ""
    #: tensor -> what fp8 lost of it, where this is the first of its wish
    fp8_errors: dict[str, float] = field(default_factory=dict)
    failure: Packet | None = None
    #: where on the device's time line its forward begins and ends
    began: Mark = None
    done: Mark = None
    #: its part of a forward with others, by tokens
    share: float = 1.0
    compute_s: float = field(default=0.0)

    @property
    def request(self) -> m.Request:
        return cast(m.Request, self.packet.message)


class Answerer:
    """Runs the target for requests and makes the replies, or the failures.

    :meth:`compute` belongs to the thread of the target, :meth:`finish` to the one that copies,
    hashes and encodes; the second's work on one answer runs beside the first's on the next.
    """

    def __init__(
        self, target: Target, facts: TargetFacts, worker: str, sender: Sender | None = None
    ) -> None:
        self.target = target
        self.facts = facts
        self.worker = worker
        self._sender = sender
        self._staging: Staging = staging_for(target.get_input_embeddings().weight.device)
        self.mappings: dict[str, VocabMapping] = {}
        self._description = description(facts)
        #: the wish in fp8 whose error was looked at last
        self._fp8_wish = ""
        self._facts = asdict(facts) | {"offer": self._description.offer}

    def learn(self, offer: Packet) -> None:
        """Keep a mapping. Raises ``ValueError`` if it is not one."""
        assert isinstance(offer.message, m.MappingOffer)
        offer.verify()
        if offer.message.vocab_size != self.facts.vocab_size:  # before memory is taken for it
            raise ValueError(
                f"the mapping is for a vocabulary of {offer.message.vocab_size}, this target has "
                f"{self.facts.vocab_size}"
            )
        ids = from_packet(offer)["selected_token_ids"]
        mapping = VocabMapping(ids, offer.message.vocab_size)
        self.mappings[mapping.id] = mapping

    def forget(self, mapping_id: str) -> None:
        self.mappings.pop(mapping_id, None)

    def answer(self, packet: Packet, limits: Limits, waited_s: float = 0.0) -> tuple[Packet, ...]:
        """The reply to one request, at once; see :meth:`compute` and :meth:`finish`."""
        work = Work(packet, waited_s)
        self.compute([work])
        return self.finish(work, limits)

    # -- in the target's thread -----------------------------------------------------------------

    def compute(self, works: Sequence[Work]) -> None:
        """Run the target for each, in one forward where there are several.

        Whatever goes wrong becomes the failure of its request, and no other's.
        """
        for work in works:
            with _failing(work):
                self._read(work)
        good = [work for work in works if work.failure is None]
        began = self._staging.mark()
        if len(good) < 2 or not self._computed_together(good):
            for work in good:
                with _failing(work), frozen(self.target):
                    self._compute(work)
        for work in good:
            with _failing(work), frozen(self.target):
                self._check(work)
        done = self._staging.mark(
            tensor for work in good if work.tensors for tensor in work.tensors.values()
        )
        sizes = [_size(work) for work in works]
        for work, size in zip(works, sizes, strict=True):
            work.began, work.done = began, done
            work.share = size / max(1, sum(sizes))

    def _read(self, work: Work) -> None:
        tensors: dict[str, Any] = from_packet(work.packet)
        request = work.request
        if request.operation not in m.OPERATIONS:
            known = ", ".join(m.OPERATIONS)
            raise BadRequest(f"unknown operation {request.operation!r}; known are {known}")
        if request.operation != "generate":
            return
        work.mapping = self._mapping(request) if request.mapping_id else None
        work.wish = suited(self.target, work.mapping, request.encoding)
        facts = self.facts
        validate_tokens(tensors, work.wish, facts.vocab_size, facts.max_position_embeddings)
        work.tokens = tensors

    def _computed_together(self, works: Sequence[Work]) -> bool:
        """False where it failed: then each is run alone, and fails alone."""
        try:
            with frozen(self.target):
                made = compute_together(
                    self.target,
                    [work.tokens for work in works if work.tokens is not None],
                    mapping=works[0].mapping,
                    encodings=[work.request.encoding for work in works],
                )
        except TargetGoneError:
            raise
        except Exception as error:
            fields = {"requests": len(works), "error": f"{type(error).__name__}: {error}"}
            _logger.warning("batch_failed", extra={"fields": fields})
            return False
        for work, tensors in zip(works, made, strict=True):
            work.tensors = tensors
        return True

    def _compute(self, work: Work) -> None:
        request = work.request
        if request.operation == "model_info":
            work.info_json, work.tensors = json.dumps(self._facts), {}
        elif request.operation == "input_embeddings":
            work.tensors = input_embeddings(self.target)
        elif request.operation == "lm_head_rows":
            work.tensors = lm_head_rows(self.target, self._mapping(request))
        else:
            work.tensors = self._supervision(work, request.encoding)
            if work.wish is not None and work.wish.lossy and request.encoding != self._fp8_wish:
                self._fp8_wish = request.encoding
                exact = self._supervision(work, str(work.wish.exact()))
                work.fp8_errors = fp8_errors(work.tensors, exact)

    def _supervision(self, work: Work, encoding: str) -> dict[str, Tensor]:
        assert work.tokens is not None
        return compute(self.target, work.tokens, mapping=work.mapping, encoding=encoding)

    def _check(self, work: Work) -> None:
        """Look at sizes now, and ask whether the values are numbers; the answer is waited for
        where the tensors are.
        """
        if work.tensors is None or work.failure is not None:
            return
        if work.tokens is not None and work.wish is not None:
            wanted = expected_shapes(
                work.tokens,
                work.wish,
                hidden_size=self.facts.hidden_size,
                layers=len(self._layers(work)),
                draft_vocab_size=work.mapping.draft_vocab_size if work.mapping else 0,
            )
            check_shapes({name: tensor.shape for name, tensor in work.tensors.items()}, wanted)
        work.sound = soundness(work.tensors)

    def _layers(self, work: Work) -> tuple[int, ...]:
        """Whose states the answer has."""
        wish = work.wish
        return self.facts.aux_layer_ids if wish is None or wish.name else wish.layers

    def _mapping(self, request: m.Request) -> VocabMapping:
        mapping = self.mappings.get(request.mapping_id)
        if mapping is None:
            raise BadRequest(
                f"no usable vocab mapping {request.mapping_id!r} came before the request; "
                "call set_vocab_mapping first"
            )
        return mapping

    # -- in the thread that encodes -------------------------------------------------------------

    def finish(self, work: Work, limits: Limits) -> tuple[Packet, ...]:
        """The messages of the reply to a request that was computed, or its failure.

        A reply whose tensors go directly has no payload; they are on their way when this returns.
        """
        with _failing(work):
            work.compute_s = self._staging.seconds(work.began, work.done) * work.share
        if work.failure is None:
            with _failing(work):
                assert work.tensors is not None
                with self._staging.after(work.done, (*work.tensors.values(), work.sound)):
                    if not bool(work.sound):
                        name_unsound(work.tensors, self.facts.hidden_size, self._layers(work))
                    return self._reply(work, work.tensors, limits)
        assert work.failure is not None
        return (work.failure,)

    def _reply(self, work: Work, tensors: dict[str, Tensor], limits: Limits) -> tuple[Packet, ...]:
        request = work.request
        plan = self._sender.plan(request, tensors) if self._sender else Plan()
        if plan.transfer is None:
            manifest, payload = to_frames(self._staging.to_cpu(tensors))
        else:
            manifest, payload = specs(tensors), []
        reply = m.Reply(
            id=request.id,
            worker=self.worker,
            model=self._description.model,
            fingerprint=self.facts.fingerprint,
            aux_layer_ids=tuple(self._layers(work)),
            tokens_hash=payload_hash(work.packet),
            mapping_id=request.mapping_id,
            encoding=request.encoding,
            compute_s=work.compute_s,
            info_json=work.info_json or json.dumps({"waited_s": work.waited_s}),
            manifest=manifest,
            transfer=plan.transfer,
            invitation=plan.invitation,
            offer=self._description.offer,
        )
        answer = in_parts(reply, payload, limits)
        if self._sender is not None and plan.transfer is not None:
            self._sender.send(request.id.client, plan.transfer, tensors)
        return answer


def _size(work: Work) -> int:
    """B*T, 1 for what is asked without tokens, 0 for what the target never saw."""
    if work.tokens is not None:
        return work.tokens["input_ids"].numel()
    return int(work.failure is None)


@contextlib.contextmanager
def _failing(work: Work) -> Iterator[None]:
    """An error in here becomes the failure that answers the request, but that the target is gone:
    others can answer it.
    """
    try:
        yield
    except BadRequest as error:
        work.failure = _failure(work.request, "bad_request", error)
    except RemoteProtocolError as error:
        work.failure = _failure(work.request, "damaged", error)
    except LocalProtocolError as error:
        work.failure = _failure(work.request, "too_large", error)
    except TargetGoneError:
        raise
    except BaseException as error:  # a target's SystemExit is a failure, not our end
        fields = {"request": str(work.request.id)}
        _logger.exception("target_failed", extra={"fields": fields})
        work.failure = _failure(work.request, "target_failed", error)


def _failure(request: m.Request, code: str, error: BaseException) -> Packet:
    text = str(error) if code != "target_failed" else f"{type(error).__name__}: {error}"
    return encode(m.Failure(request.id, code, plain_text(text)))
