"""The remote target: NeMo AutoModel's ``RemoteEagle3TargetModel`` contract, over a broker."""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from broker.keys.addresses import connecting
from broker.peer.credentials import KeyLike
from broker.peer.tensors import to_frames
from broker.protocol import encode
from broker.protocol import messages as m
from broker.protocol.wish import NAMES, Wish, parse_wish
from trainer_client.core import ClientConfig
from trainer_client.errors import BadRequestError, IdentityError
from trainer_client.service import Answer, Client, PendingReply
from trainer_client.targets.batch import Eagle3TargetBatch, LmHeadRows
from trainer_client.targets.facts import model_facts
from trainer_client.targets.wished import (
    TargetSupervision,
    batch_to_send,
    check_for_training,
    check_wish,
    in_parts,
    in_row,
    tokens_to_send,
)
from trainer_client.trace import Trace
from worker.direct.config import DirectConfig
from worker.direct.receiver import Receiver
from worker.errors import BadRequest, TargetError
from worker.supervision.checks import check_shapes, expected_shapes
from worker.supervision.mapping import VocabMapping

_logger = logging.getLogger("draftmq.client")
#: tensor -> its shape
Shapes = Mapping[str, tuple[int, ...]]
T = TypeVar("T")
U = TypeVar("U")

#: How long the first request waits to hear of all brokers that it was given.
_BROKERS_S = 1.0


class RemoteHandle(Generic[T]):
    """Something on its way: ``result(timeout)`` in seconds, ``cancel()``, callbacks."""

    def __init__(self, pending: PendingReply, convert: Callable[[Answer], T]) -> None:
        self._pending = pending
        self._convert = convert

    def result(self, timeout: float | None = None) -> T:
        """Wait for it. Raises what :class:`PendingReply` raises."""
        return self._convert(self._pending.result(timeout))

    def __await__(self) -> Generator[Any, None, T]:
        return self._converted().__await__()

    async def _converted(self) -> T:
        return self._convert(await self._pending)

    def then(self, convert: Callable[[T], U]) -> RemoteHandle[U]:
        """The same request, whose result is made into something else by whoever waits for it."""
        return RemoteHandle(self._pending, lambda answer: convert(self._convert(answer)))

    @property
    def worker(self) -> str:
        """Who answered; waits for it, as :meth:`result` does."""
        return self._pending.result().reply.worker

    def cancel(self) -> bool:
        """Give it up; False when it has already come."""
        return self._pending.cancel()

    def done(self) -> bool:
        return self._pending.done()

    def add_done_callback(self, call: Callable[[RemoteHandle[T]], None]) -> None:
        """Have ``call`` called with this handle once it has ended, in the I/O thread."""
        self._pending.add_done_callback(lambda _: call(self))


class RemoteEagle3TargetModel:
    """An EAGLE-3 target that runs somewhere else.

    ``urls`` are broker endpoints (``tcp://host:5555``); with several, requests are spread over them
    and fail over. ``timeout`` seconds times ``max_retries + 1`` is the deadline of a request: until
    then it survives lost connections, workers and brokers. ``model`` may be empty where the broker
    has one model. ``direct`` says how large tensors may come past the broker (``auto``, a backend,
    ``off``, or all of :class:`DirectConfig`). With ``host_batches`` what came by wire stays on the
    CPU, for a trainer that copies it while it computes. ``key`` and ``broker_key`` are for brokers
    that want keys, as for :class:`trainer_client.service.Client`.

    ``encoding`` is what batches are made of: ``probs``, the contract's ``target_probs``;
    ``hidden``, the last hidden state, a fifth of the bytes; ``topk``, the most likely tokens, fewer
    bytes and not exact; ``auto``, which is ``hidden`` where that is offered, else ``probs``; or any
    wish (:mod:`broker.protocol.wish`) that has layers and one of ``last``, ``probs`` and ``topk``.
    For other families of drafts :meth:`supervise` takes a wish of its own with each call.

    Raises ``ValueError`` for an encoding that is none. Other errors are
    :class:`trainer_client.errors.RequestError`; see there.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        device: torch.device | str = "cpu",
        timeout: float = 120,
        max_retries: int = 3,
        model: str = "",
        encoding: str = "probs",
        name: str | None = None,
        job: str = "",
        rank: int = 0,
        config: ClientConfig | None = None,
        direct: DirectConfig | str = "auto",
        host_batches: bool = False,
        trace: Trace | None = None,
        key: KeyLike | None = None,
        broker_key: KeyLike | Sequence[KeyLike] | None = None,
    ) -> None:
        if not 0 < timeout < math.inf or max_retries < 0:
            raise ValueError(
                "timeout must be finite and above 0, and max_retries at least 0, got "
                f"{timeout}, {max_retries}"
            )
        urls = list(urls)
        for url in urls:
            connecting(url)
        if encoding != "auto":
            check_for_training(encoding)
            encoding = str(parse_wish(encoding))
        if isinstance(direct, str):
            direct = DirectConfig(mode=direct)
        self._client = Client(
            urls,
            name=name,
            job=job,
            rank=rank,
            config=config,
            direct=Receiver(direct, device, urls),
            trace=trace,
            key=key,
            broker_key=broker_key,
        )
        self._device = torch.device(device)
        self._host_batches = host_batches
        self._deadline_s = float(timeout) * (max_retries + 1)
        self._model = model
        self._wanted_encoding = encoding
        self._mapping: VocabMapping | None = None
        self._step = 0

    @classmethod
    def from_urls(
        cls, urls: Sequence[str], *, device: torch.device | str, **options: Any
    ) -> RemoteEagle3TargetModel:
        """The contract's constructor; options as for the class."""
        return cls(urls, device=device, **options)

    @property
    def supports_async(self) -> bool:
        return True

    def model_info(self) -> dict[str, Any]:
        """What the workers say of their model: ``model``, ``fingerprint``, ``num_hidden_layers``,
        ``hidden_size``, ``vocab_size``, ``aux_layer_ids``, ``dtype``, ``max_position_embeddings``,
        ``encodings``, ``layers``, ``engine``, ``tokenizer``, ``config``. Waits for a worker.
        """
        return dict(self._info)

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        info = model_facts(self._ask("model_info").reply)
        self._refuse_other_brokers(info)
        if self._wanted_encoding == "auto":
            return info
        wish = parse_wish(self._wanted_encoding)
        if wish.name and wish.name not in info["encodings"]:
            raise BadRequestError(
                "bad_request",
                f"the model {info['model']!r} is served with the encodings "
                f"{', '.join(info['encodings'])}; {wish.name!r} is not one of them",
            )
        if wish.layers:  # those of this client's batches
            info["aux_layer_ids"] = list(wish.layers)
        return info

    def _refuse_other_brokers(self, info: dict[str, Any]) -> None:
        """Raise :class:`BadRequestError` where one of the urls leads to other models.

        A moment is waited for brokers that do not answer yet. Of one that comes later, or that has
        no workers now, this client takes its own model only.
        """
        deadline = time.monotonic() + _BROKERS_S
        while self._client.connecting and time.monotonic() < deadline:
            time.sleep(0.01)
        offered = self._client.offers()
        others = [url for url, offers in offered.items() if offers and info["offer"] not in offers]
        if others:
            raise BadRequestError(
                "other_model",
                f"{', '.join(others)} serves other models than {info['model']!r} (offer "
                f"{info['offer'][:8]}), which {len(offered) - len(others)} of {len(offered)} "
                "brokers serve; give brokers that serve the same weights, layers and engine, or "
                "--model",
            )

    @property
    def encoding(self) -> str:
        """What batches are made of: ``probs``, ``hidden``, ``topk``, or the text of a wish."""
        if self._wanted_encoding != "auto":
            return self._wanted_encoding
        return "hidden" if "hidden" in self._info["encodings"] else "probs"

    def get_input_embeddings(self) -> SimpleNamespace:
        """An object with ``.weight`` [V, H], fetched once."""
        return self._embeddings

    @functools.cached_property
    def _embeddings(self) -> SimpleNamespace:
        weight = self._ask("input_embeddings").tensors["weight"]
        return SimpleNamespace(weight=weight.to(self._device))

    def set_vocab_mapping(self, selected_token_ids: Tensor, selected_token_mask: Tensor) -> None:
        """Choose the draft vocab: ids int64 [D] distinct, mask bool [V].

        Raises ``ValueError`` for duplicates, ids out of range, or a mask that does not agree.
        """
        mapping = VocabMapping.from_mask_and_ids(selected_token_ids, selected_token_mask)
        if mapping.vocab_size != self._info["vocab_size"]:
            raise ValueError(
                f"the mapping is for a vocabulary of {mapping.vocab_size}, the target "
                f"{self._info['model']!r} has {self._info['vocab_size']}"
            )
        manifest, payload = to_frames({"selected_token_ids": mapping.selected_token_ids})
        offer = m.MappingOffer(mapping.id, mapping.vocab_size, manifest)
        self._client.keep_mapping(encode(offer, payload))
        self._mapping = mapping
        self.__dict__.pop("_lm_head", None)

    def lm_head_rows(self) -> LmHeadRows:
        """The target's ``lm_head`` rows for the draft vocab, fetched once for a mapping."""
        return self._lm_head

    @functools.cached_property
    def _lm_head(self) -> LmHeadRows:
        tensors = self._ask("lm_head_rows", mapping_id=self._mapping_id()).tensors
        bias = tensors.get("bias")
        return LmHeadRows(
            tensors["weight"].to(self._device), None if bias is None else bias.to(self._device)
        )

    def generate_batch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        *,
        lengths: Sequence[int] = (),
    ) -> Eagle3TargetBatch:
        """Supervision for one batch, all three [B, T]. Waits for it."""
        masks = (attention_mask, loss_mask)
        return self.generate_batch_async(input_ids, *masks, lengths=lengths).result()

    def generate_batch_async(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        loss_mask: Tensor,
        *,
        step: int | None = None,
        slots: int = 0,
        avoid: str = "",
        lengths: Sequence[int] = (),
    ) -> RemoteHandle[Eagle3TargetBatch]:
        """Ask for supervision; ``step`` orders it among the ranks of the job (default: counted).
        A worker to ``avoid`` answers only where there is no other. With ``slots`` it is of the
        first so many slots of each row, where all others are padding. With ``lengths`` the one row
        [1, N] is of documents that follow one another, and each has what it has alone.

        Raises :class:`BadRequestError` at once for what no worker would accept.
        """
        wish = parse_wish(self.encoding)
        masks = (attention_mask, loss_mask)
        if not wish.name:
            if slots:
                raise ValueError(f"slots are for {NAMES}, and this client's wish is {wish}")
            tokens = batch_to_send(input_ids, *masks, lengths)
            pending, shapes = self._submit(wish, tokens, step, avoid)
            made = RemoteHandle(pending, lambda answer: self._supervision(answer, shapes, wish))
            return made.then(lambda made: made.to_batch(input_ids, *masks, lengths))
        if slots:
            wish = wish.within(0, slots)
        pending, shapes = self._submit(wish, batch_to_send(input_ids, *masks, lengths), step, avoid)
        mask = attention_mask[:, :slots] if slots else attention_mask
        return RemoteHandle(pending, lambda answer: self._batch(answer, shapes, mask, lengths))

    def supervise(
        self,
        wish: Wish | str,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        *,
        lengths: Tensor | None = None,
        step: int | None = None,
        avoid: str = "",
    ) -> RemoteHandle[TargetSupervision]:
        """Ask for what a wish names, of rows [B, T], or with ``lengths`` int64 [documents] of
        packed documents [N]; a mapping is needed only where the wish is over a vocabulary.

        Raises :class:`BadRequestError` at once for what no worker would accept, and ``ValueError``
        for a text that is no wish, or the name of one, which :meth:`generate_batch` is for.
        """
        wish = in_parts(wish)
        try:
            tokens = tokens_to_send(input_ids, attention_mask, loss_mask, lengths)
        except BadRequest as error:
            raise BadRequestError("bad_request", str(error)) from error
        pending, shapes = self._submit(wish, tokens, step, avoid)
        return RemoteHandle(pending, lambda answer: self._supervision(answer, shapes, wish))

    def _submit(
        self, wish: Wish, tokens: dict[str, Tensor], step: int | None, avoid: str
    ) -> tuple[PendingReply, Shapes]:
        """Ask; also the shapes that the tensors of the reply must have."""
        try:
            check_wish(tokens, wish, self._info)
        except BadRequest as error:
            raise BadRequestError("bad_request", str(error)) from error
        self._step = self._step + 1 if step is None else step
        mapping_id = self._mapping_id() if wish.over_vocabulary else ""
        shapes = expected_shapes(
            tokens,
            wish,
            hidden_size=self._info["hidden_size"],
            layers=len(wish.layers or self._info["aux_layer_ids"]),
            draft_vocab_size=self._mapping.draft_vocab_size if self._mapping else 0,
        )
        pending = self._client.submit(
            "generate",
            tokens,
            timeout_s=self._deadline_s,
            model=self._model,
            offer=self._info["offer"],
            step=self._step,
            n_tokens=tokens["input_ids"].numel(),
            mapping_id=mapping_id,
            encoding=str(wish),
            avoid=avoid,
        )
        return pending, shapes

    @property
    def window(self) -> int:
        """How many requests the brokers take without an answer, all together; 0: not known yet."""
        return self._client.window

    @property
    def num_remote_servers(self) -> int:
        """What NeMo AutoModel caps its prefetch by: the window, since brokers share workers."""
        return max(1, self.window)

    def counters(self) -> dict[str, int]:
        """Requests, replies, resends and the like of this client."""
        return self._client.counters()

    def snapshot(self) -> dict[str, Any]:
        """What a trainer's ``/status`` shows of this client."""
        return self._client.snapshot()

    def close(self) -> None:
        """End this client only; the broker, its workers and other clients go on."""
        self._client.close()

    def __enter__(self) -> RemoteEagle3TargetModel:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, operation: str, mapping_id: str = "") -> Answer:
        return self._client.submit(
            operation,
            timeout_s=self._deadline_s,
            model=self._model,
            mapping_id=mapping_id,
            offer="" if operation == "model_info" else self._info["offer"],
        ).result()

    def _mapping_id(self) -> str:
        if self._mapping is None:
            raise BadRequestError(
                "unknown_mapping",
                "no vocab mapping is set; call set_vocab_mapping(selected_token_ids, "
                "selected_token_mask) before asking for supervision",
            )
        return self._mapping.id

    def _batch(
        self, answer: Answer, shapes: Shapes, attention_mask: Tensor, lengths: Sequence[int]
    ) -> Eagle3TargetBatch:
        _check_answer(answer, shapes)
        _use_here(answer.tensors)
        tensors: dict[str, Any] = in_row(answer.tensors, lengths)
        batch = Eagle3TargetBatch(
            attention_mask=attention_mask, lengths=tuple(lengths) or None, **tensors
        )
        return batch if self._host_batches else batch.map(lambda t: t.to(self._device))

    def _supervision(self, answer: Answer, shapes: Shapes, wish: Wish) -> TargetSupervision:
        _check_answer(answer, shapes)
        _use_here(answer.tensors)
        tensors = dict(answer.tensors)
        if not self._host_batches:  # what is fp8 is made wide where it is used
            tensors = {name: tensor.to(self._device) for name, tensor in tensors.items()}
        return TargetSupervision.of(tensors, wish, self._info["dtype"])


def _check_answer(answer: Answer, shapes: Shapes) -> None:
    """Raise :class:`IdentityError` for tensors that nobody asked for."""
    try:
        got = {name: tensor.shape for name, tensor in answer.tensors.items()}
        check_shapes(got, shapes, f"worker {answer.reply.worker}")
    except TargetError as error:
        raise IdentityError("identity", f"{error}; nothing of it was used") from None


def _use_here(tensors: Mapping[str, Tensor]) -> None:
    """Tensors that came directly, on a stream of their channel's, are used on this one's."""
    for tensor in tensors.values():
        if tensor.is_cuda:
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
