"""Every message that trainers, broker and workers exchange, as frozen dataclasses.

The order of the fields is the order on the wire (see ``PROTOCOL.md``). Messages whose class has a
``manifest`` carry tensors, in payload frames behind the header; a tensor never enters a message.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Union

from broker.protocol.bounds import (
    Count,
    Credits,
    Interval,
    Layer,
    LongName,
    Name,
    Port,
    Rank,
    Seconds,
    Size,
    Step,
    Text,
    Tokens,
    VocabSize,
)
from broker.protocol.limits import Limits

#: Bytes per element of every dtype that may travel.
DTYPE_BYTES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "int16": 2,
    "int32": 4,
    "int64": 8,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "float8_e4m3fn": 1,
}

#: Ways of a direct transfer: CUDA IPC within one host, NCCL between GPUs, shared memory within one
#: host, Gloo between CPUs.
BACKENDS = ("ipc", "nccl", "shm", "gloo")

#: Offers that a heartbeat names at the most.
MAX_OFFERS = 16

#: What a worker can be asked for. Only ``generate`` needs token ids.
OPERATIONS = ("generate", "model_info", "input_embeddings", "lm_head_rows")


class RequestId(NamedTuple):
    """Unique for ever: who asks, in which life, and which of its requests this is."""

    client: Name
    incarnation: Count
    number: Count

    def __str__(self) -> str:
        return f"{self.client}#{self.number}"


class Admission(NamedTuple):
    """The number that a life of a peer was given, and by which life of the broker, when it first
    came there. Of two with numbers of one broker, the higher is the newer.
    """

    broker: Name
    number: Count


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a manifest. Its bytes lie in the next ``frames`` payload frames, C order."""

    name: Name
    dtype: Name
    shape: tuple[Count, ...]
    frames: Count

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor; a 0-rank tensor has one element, an empty one has none."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """What a worker serves. Two workers are of one pool when their :meth:`identity` is equal.

    ``aux_layer_ids`` are those of the named wishes; ``layers`` can be had in a wish, empty: all.
    ``engine`` is what runs the model, and its version.
    """

    model: Name
    fingerprint: Name
    num_hidden_layers: Size
    hidden_size: Size
    vocab_size: Size
    max_position_embeddings: Count
    aux_layer_ids: tuple[Size, ...]
    dtype: Name
    encodings: tuple[Name, ...]
    layers: tuple[Layer, ...]
    engine: Name
    tokenizer: LongName
    config_json: str

    def identity(self) -> dict[str, object]:
        """All but what may differ between two hosts that serve the same supervision."""
        differs = ("tokenizer", "config_json")
        return {name: getattr(self, name) for name in self.__slots__ if name not in differs}

    @property
    def offer(self) -> str:
        """The hash of :meth:`identity`: whoever names it gets this supervision, or none."""
        plain = json.dumps(self.identity(), sort_keys=True).encode()
        return hashlib.blake2b(plain, digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class DirectOffer:
    """What a client can do to receive tensors directly from a worker, best first.

    ``backends`` are names of :data:`BACKENDS`; ``host`` names the machine in this boot of it, for
    what works within one machine only.
    """

    backends: tuple[Name, ...]
    host: Name


@dataclass(frozen=True, slots=True)
class Invitation:
    """Where a worker waits for this client to build their direct channel, in the background.

    ``channel`` is unique for a life of the worker and one of the client; ``epoch`` numbers the
    attempts, from 1; ``nonce`` is secret and new in each. The store is at ``host``:``port``.
    """

    channel: LongName
    epoch: Count
    nonce: Name
    backend: Name
    host: Name
    port: Port


@dataclass(frozen=True, slots=True)
class Transfer:
    """The reply's tensors come on this channel, as number ``seq`` (from 0) of this epoch."""

    channel: LongName
    epoch: Count
    seq: Count


@dataclass(frozen=True, slots=True)
class ClientHello:
    """First message of a client on a connection. A newer life fences off the older.

    ``incarnation`` is drawn by each life and only tells it from others; which is the newer is told
    by ``admission``, nil before its first ``Welcome`` from this endpoint.
    """

    KIND: ClassVar[int] = 1
    client: Name
    incarnation: Count
    job: Name
    rank: Rank
    admission: Admission | None = None


@dataclass(frozen=True, slots=True)
class WorkerHello:
    """First message of a worker. ``held`` are requests it still works on, from before a cut;
    ``incarnation`` and ``admission`` are as in :class:`ClientHello`.
    """

    KIND: ClassVar[int] = 2
    worker: Name
    incarnation: Count
    model: ModelDescription
    credits: Credits
    held: tuple[RequestId, ...]
    admission: Admission | None = None


@dataclass(frozen=True, slots=True)
class Welcome:
    """The broker's answer to a hello: the rules of this connection.

    ``window`` is the number of requests a client may have at the broker at once (0 to a worker);
    ``offers`` are those that its heartbeats will name. ``number`` is the peer's
    (:class:`Admission`), or 0 where it came with the number of an earlier life of the broker.
    """

    KIND: ClassVar[int] = 3
    broker: Name
    window: Size
    heartbeat_s: Interval
    liveness_s: Interval
    max_header_bytes: Count
    max_frames: Count
    max_frame_bytes: Count
    max_request_bytes: Count
    max_reply_bytes: Count
    offers: tuple[Name, ...] = ()
    number: Count = 0

    def limits(self) -> Limits:
        """The limits that the broker enforces."""
        return Limits(
            max_header_bytes=self.max_header_bytes,
            max_frames=self.max_frames,
            max_frame_bytes=self.max_frame_bytes,
            max_request_bytes=self.max_request_bytes,
            max_reply_bytes=self.max_reply_bytes,
        )


@dataclass(frozen=True, slots=True)
class HelloWanted:
    """The broker does not know this connection (it restarted, or lost patience): say hello."""

    KIND: ClassVar[int] = 4
    broker: Name


@dataclass(frozen=True, slots=True)
class Refused:
    """The broker will not work with this peer, and why. Nothing is resent after this."""

    KIND: ClassVar[int] = 5
    code: Name
    text: Text


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Sent by peers every ``heartbeat_s`` and answered by the broker.

    The broker's carries ``workers``: how many serve the client's model (-1 from a peer). A peer's
    carries ``direct``: one line about its direct channels, for operators. The broker's to a client
    says in ``offers`` what workers serve here just now, at most :data:`MAX_OFFERS` of them.
    """

    KIND: ClassVar[int] = 6
    workers: Rank
    direct: Text = ""
    offers: tuple[Name, ...] = ()


@dataclass(frozen=True, slots=True)
class Goodbye:
    """The peer leaves on purpose; the connection is forgotten at once."""

    KIND: ClassVar[int] = 7
    reason: Text


@dataclass(frozen=True, slots=True)
class Request:
    """One piece of work for one worker. Resent with the same id, it is still one request.

    ``step`` orders requests within a job. ``n_tokens`` is B*T. ``ttl_s`` is the time after which
    the client no longer wants the answer, counted from this (re)send. ``offer`` is that of
    ``model_info`` (:attr:`ModelDescription.offer`), and who names it is served by nobody else;
    before it is known, ``model`` names a model, and may be empty where the broker has one only.
    ``direct`` is nil where the answer must come on the wire: in a resend, and after a direct
    transfer failed; ``avoid`` then names the worker that it failed with.
    ``encoding`` is the wish (:mod:`broker.protocol.wish`); its ``mapping_id`` is empty where it is
    not over a vocabulary.
    """

    KIND: ClassVar[int] = 8
    id: RequestId
    operation: Name
    model: Name
    step: Step
    n_tokens: Tokens
    mapping_id: Name
    encoding: LongName
    ttl_s: Seconds
    manifest: tuple[TensorSpec, ...]
    direct: DirectOffer | None = None
    avoid: Name = ""
    offer: Name = ""


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer, with its identity, which the client checks before anyone sees a tensor.

    ``tokens_hash`` is that of the request's payload, ``encoding`` its wish, ``aux_layer_ids`` the
    layers whose states these are. ``info_json`` answers ``model_info``; with
    other operations it has ``waited_s``, from the request's arrival until it was computed. The
    tensors are the payload. Or there is none: with ``transfer`` they come directly, and with
    ``parts`` as the payload of so many messages behind this one (:class:`Part`). An
    ``invitation`` begins a direct channel for later replies.
    """

    KIND: ClassVar[int] = 9
    id: RequestId
    worker: Name
    model: Name
    fingerprint: Name
    aux_layer_ids: tuple[Layer, ...]
    tokens_hash: int
    mapping_id: Name
    encoding: LongName
    compute_s: Seconds
    info_json: str
    manifest: tuple[TensorSpec, ...]
    transfer: Transfer | None = None
    invitation: Invitation | None = None
    parts: Count = 0
    offer: Name = ""

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all its tensors, whichever way they come."""
        return sum(spec.nbytes for spec in self.manifest)


@dataclass(frozen=True, slots=True)
class Failure:
    """The request ended without a result. ``code`` is one of :data:`FAILURE_CODES`."""

    KIND: ClassVar[int] = 10
    id: RequestId
    code: Name
    text: Text


@dataclass(frozen=True, slots=True)
class Cancel:
    """The caller no longer wants this request. A worker that has it answers all the same."""

    KIND: ClassVar[int] = 11
    id: RequestId


@dataclass(frozen=True, slots=True)
class Received:
    """These answers are in the caller's hands; the broker may forget them."""

    KIND: ClassVar[int] = 12
    ids: tuple[RequestId, ...]


@dataclass(frozen=True, slots=True)
class MappingWanted:
    """The broker has requests that name this vocab mapping and nobody told it the content."""

    KIND: ClassVar[int] = 13
    mapping_id: Name


@dataclass(frozen=True, slots=True)
class MappingOffer:
    """A vocab mapping by content: one tensor, the selected token ids (int64, distinct, in
    the order of the draft ids).

    ``mapping_id`` is the hash of it, see :func:`broker.protocol.wire.mapping_id`.
    """

    KIND: ClassVar[int] = 14
    mapping_id: Name
    vocab_size: VocabSize
    manifest: tuple[TensorSpec, ...]


@dataclass(frozen=True, slots=True)
class Draining:
    """The worker finishes what it holds and wants nothing new. The broker says it back: behind this
    word comes nothing more.
    """

    KIND: ClassVar[int] = 15


@dataclass(frozen=True, slots=True)
class RequestWanted:
    """The broker had no room for this request's payload, and has it now: send it again."""

    KIND: ClassVar[int] = 16
    id: RequestId


@dataclass(frozen=True, slots=True)
class Part:
    """The next payload frames of a reply in parts, whose manifest they follow. ``number`` counts
    from 0. The broker passes each on when it comes, so a large reply is on both connections at
    once, and heartbeats pass between two parts.
    """

    KIND: ClassVar[int] = 17
    id: RequestId
    number: Count


Message = Union[  # noqa: UP007 - evaluated at run time
    ClientHello,
    WorkerHello,
    Welcome,
    HelloWanted,
    Refused,
    Heartbeat,
    Goodbye,
    Request,
    Reply,
    Failure,
    Cancel,
    Received,
    MappingWanted,
    MappingOffer,
    Draining,
    RequestWanted,
    Part,
]

#: Why a request can end without a result, and who says so.
FAILURE_CODES: dict[str, str] = {
    "bad_request": "the worker: ids out of range, shapes, dtypes, an encoding it does not offer",
    "damaged": "the worker: the request's payload did not match its checksum, it is sent again",
    "unknown_model": "the broker: workers are attached, and none serves this model",
    "unknown_mapping": "the worker: it was never told this mapping, the broker offers it again",
    "too_large": "the worker or the broker: the reply, or the mapping, is over its limit",
    "over_window": "the broker: the client has more requests under way than it was granted",
    "target_failed": "the worker: the target raised",
    "expired": "the broker: nobody answered within the time that the client gave",
    "cancelled": "the worker: cancelled before it began",
    "lost_workers": "the broker: the request was running on each of several workers that died",
}


def comes_directly(message: Message) -> bool:
    """Whether it is a reply that announces a direct transfer, which has begun and must be taken."""
    return isinstance(message, Reply) and message.transfer is not None
