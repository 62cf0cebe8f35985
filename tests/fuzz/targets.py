"""Everything that parses bytes from outside, as functions of bytes.

Each ends in a value or in the package's own error; anything else that comes out of it is a bug.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import lzma
import random
import struct
import tempfile
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file

from broker.commands import cli
from broker.core import BrokerConfig, BrokerCore, Received, Send, Side
from broker.core.inspect import snapshot, validate
from broker.keys.allow import AllowList
from broker.keys.files import KeyFileError, Role, generate, parse
from broker.keys.operators import door, write_token
from broker.peer.link import Arrived, Connected
from broker.peer.tensors import from_packet, to_frames
from broker.protocol import RemoteProtocolError, decode, encode, wire
from broker.protocol import messages as m
from broker.service import Broker
from broker.watch.http import HttpServer
from broker.watch.pages import pages
from tests.broker.core.rig import mapping_offer, model
from tests.fuzz.conversations import talk
from tests.fuzz.frames import seal
from trainer_client.core import ClientCore, Submit
from trainer_client.drafts.lint import check_draft
from trainer_client.errors import DataError, ExportError
from trainer_client.training.data import read_dataset
from worker.answers import Answerer
from worker.core import WorkerCore

#: Longest input: what is wrong with long ones is wrong with these.
MAX_BYTES = 8192


@dataclass(frozen=True)
class Target:
    """``run`` takes any bytes; ``seeds`` are where fuzzing begins."""

    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...] = ()
    #: words that the fuzzer may put in
    words: tuple[str, ...] = field(default=())


# -- the protocol -------------------------------------------------------------------------------


def split(data: bytes) -> list[bytes]:
    """Frames: each begins with its length (u16, little endian); the last may be cut."""
    frames = []
    while len(data) >= 2:
        end = 2 + int.from_bytes(data[:2], "little")
        frames.append(data[2:end])
        data = data[end:]
    return frames


def join(frames: list[bytes]) -> bytes:
    return b"".join(struct.pack("<H", len(frame)) + frame for frame in frames)


def decode_raw(data: bytes) -> None:
    """Frames as they come."""
    with contextlib.suppress(RemoteProtocolError):
        decode(split(data))


def unseal(packet: wire.Packet) -> bytes:
    """What :func:`converse` makes this packet of."""
    header = bytes(packet.frames[0])
    begin = wire._PRELUDE.size + wire._ENTRY.size * len(packet.payload)
    body = header[begin : -wire._CHECKSUM.size]
    payload = [bytes(frame) for frame in packet.payload]
    return join([bytes([packet.message.KIND, 0]) + body, *payload])


def converse(data: bytes) -> None:
    """Sealed messages, one after the other, to a broker, a client and a worker that know someone.

    A message is a frame of its kind, whom it is for, and its body; payload frames follow, and an
    empty frame ends it.
    """
    peers = _Peers()
    message: list[bytes] = []
    for frame in [*split(data), b""]:
        if frame:
            message.append(frame)
        elif message:
            head, *payload = message
            message = []
            if len(head) >= 2:
                peers.tell(head[1], seal(head[0], head[2:], payload))


class _Peers:
    def __init__(self) -> None:
        self._broker = BrokerCore("b", BrokerConfig(held_answer_bytes=1 << 16))
        self._client = ClientCore("c", 1, ["e"], 0.0)
        self._worker = WorkerCore("w", 1, model(), ["e"], 0.0)
        self._now = 1.0
        core: Any
        for side, name, message, core in (
            (Side.CLIENT, b"c", m.ClientHello("c", 1, "job", 0), self._client),
            (Side.WORKER, b"w", m.WorkerHello("w", 1, model(), 2, ()), self._worker),
        ):
            actions = self._broker.handle(Received(side, name, encode(message)), self._now)
            (welcome,) = [decode(action.frames) for action in actions if isinstance(action, Send)]
            core.handle(Connected("e"), self._now)
            core.handle(Arrived("e", welcome), self._now)
        request = m.Request(m.RequestId("c", 1, 1), "generate", "", 0, 1, "", "", 9.0, ())
        self._client.handle(Submit(encode(request), 99.0), self._now)
        self._broker.handle(Received(Side.CLIENT, b"c", encode(request)), self._now)

    def tell(self, whom: int, frames: list[bytes]) -> None:
        self._now += 0.01
        try:
            packet = decode(frames)
        except RemoteProtocolError:
            return
        packet.verify()
        for spec, tensor in zip(
            getattr(packet.message, "manifest", ()), _tensors(packet).values(), strict=True
        ):
            assert (spec.shape, spec.nbytes) == (tuple(tensor.shape), tensor.nbytes)
        again = encode(packet.message, packet.payload)
        assert decode(again.frames).message == packet.message
        if whom & 1:
            side, name = (Side.CLIENT, b"c") if whom & 2 else (Side.WORKER, b"w")
            self._broker.handle(Received(side, name, packet), self._now)
            validate(self._broker)
            json.dumps(snapshot(self._broker, self._now))
        else:
            core: Any = self._client if whom & 2 else self._worker
            core.handle(Arrived("e", packet), self._now)
            core.validate()


def _tensors(packet: wire.Packet) -> dict[str, torch.Tensor]:
    if isinstance(packet.message, m.Part):
        return {}
    return from_packet(packet)


def learn_mapping(data: bytes) -> None:
    """A worker is offered a vocab mapping: one byte of dtype, a vocabulary's size, the ids."""
    if len(data) < 9:
        return
    dtype = list(m.DTYPE_BYTES)[data[0] % len(m.DTYPE_BYTES)]
    vocab_size, ids = int.from_bytes(data[1:9], "little"), data[9:]
    if not ids or len(ids) % m.DTYPE_BYTES[dtype] or not 1 <= vocab_size <= 1 << 31:
        return
    spec = m.TensorSpec("selected_token_ids", dtype, (len(ids) // m.DTYPE_BYTES[dtype],), 1)
    answerer = Answerer.__new__(Answerer)
    answerer.facts = types.SimpleNamespace(vocab_size=64)  # type: ignore[assignment]
    answerer.mappings = {}
    with contextlib.suppress(ValueError):
        answerer.learn(encode(m.MappingOffer("m", vocab_size, (spec,)), [ids]))


def _conversations() -> Iterator[bytes]:
    request_id = m.RequestId("c", 1, 1)
    ids = {"input_ids": torch.arange(6).view(2, 3)}
    manifest, payload = to_frames(ids)
    said: list[tuple[int, wire.Packet]] = [
        (3, encode(m.ClientHello("c", 2, "job", 0))),
        (1, encode(m.WorkerHello("w", 2, model(), 2, (request_id,)))),
        (3, encode(m.Heartbeat(-1))),
        (3, encode(m.Request(request_id, "generate", "", 0, 6, "", "", 9.0, manifest), payload)),
        (3, encode(m.Cancel(request_id))),
        (3, encode(m.Received((request_id,)))),
        (3, mapping_offer(1, 2)),
        (1, encode(m.Failure(request_id, "bad_request", "no"))),
        (1, encode(m.Draining())),
        (1, encode(m.Goodbye("bye"))),
        (2, encode(m.MappingWanted("m"))),
        (2, encode(m.Refused("fenced", "no"))),
        (2, encode(m.HelloWanted("b"))),
        (0, encode(m.Request(request_id, "generate", "", 0, 6, "", "", 9.0, manifest), payload)),
    ]
    reply = m.Reply(request_id, "w", "tiny", "f0", (1, 3, 4), 0, "", "", 1.0, "{}", manifest)
    said += [(whom, encode(reply, payload)) for whom in (1, 2)]
    for whom, packet in said:
        sealed = bytearray(unseal(packet))
        sealed[3] = whom
        yield bytes(sealed)
    yield b"".join(_ended(whom, packet) for whom, packet in said if whom & 1)


def _ended(whom: int, packet: wire.Packet) -> bytes:
    sealed = bytearray(unseal(packet))
    sealed[3] = whom
    return bytes(sealed) + b"\0\0"


# -- HTTP ---------------------------------------------------------------------------------------


def ask_http(data: bytes) -> None:
    """A request line and headers, parsed as waitress does, to the broker's application."""
    from waitress.adjustments import Adjustments
    from waitress.parser import HTTPRequestParser

    parser = HTTPRequestParser(Adjustments(max_request_header_size=16384))
    while data and not parser.completed:
        taken = parser.received(data)
        if taken <= 0:
            break
        data = data[taken:]
    if not parser.completed or parser.error or parser.empty:
        return
    environ = {"PATH_INFO": parser.path, "REQUEST_METHOD": parser.command}
    environ |= {f"HTTP_{name}": value for name, value in parser.headers.items()}
    statuses: list[str] = []
    body = _application()(environ, lambda status, headers: statuses.append(status))
    assert len(statuses) == 1
    assert b"".join(body)


@functools.cache
def _application() -> Callable[..., Any]:
    directory = Path(tempfile.mkdtemp())
    server = HttpServer.__new__(HttpServer)
    broker = Broker()
    server._admits = door("0.0.0.0:0", write_token(directory, "o"))
    server._pages = pages(broker.snapshot, broker.trace, lambda: True)
    return server._application


# -- files --------------------------------------------------------------------------------------


@functools.cache
def _folder() -> Path:
    return Path(tempfile.mkdtemp())


def read_keys(data: bytes) -> None:
    """A key file, and an allow-list."""
    path = _folder() / "list.public"
    path.write_bytes(data)
    for use in (lambda: AllowList([path]), lambda: parse(data.decode("latin-1"), "x")):
        with contextlib.suppress(KeyFileError):
            use()


def read_settings(data: bytes) -> None:
    """A ``--config`` file, up to the options of each command that it names."""
    path = _folder() / "config.toml"
    path.write_bytes(data)
    for command in ("broker", "train", "worker"):
        try:
            group = cli.make_context("draftmq", ["--config", str(path), command])
            assert cli.callback is not None
            group.invoke(cli.callback, **group.params)
            _, found, rest = cli.resolve_command(group, [command])
            assert found is not None
            found.make_context(command, rest, parent=group)
        except click.ClickException:
            pass


@functools.cache
def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from worker.targets import EMBEDDED

    return AutoTokenizer.from_pretrained(EMBEDDED)


def read_data(data: bytes) -> None:
    """Training data; the first byte says which kind of file."""
    names = ("d.jsonl", "d.txt", "d.jsonl.gz", "d.jsonl.xz")
    if not data:
        return
    path = _folder() / names[data[0] % len(names)]
    path.write_bytes(data[1:])
    with contextlib.suppress(DataError):
        read_dataset(path, _tokenizer(), 64)


def lint_config(data: bytes) -> None:
    """A draft's config.json, beside tensors that are well."""
    (_draft() / "config.json").write_bytes(data)
    with contextlib.suppress(ExportError):
        check_draft(_draft())


@functools.cache
def _draft() -> Path:
    folder = Path(tempfile.mkdtemp())
    tensors = {
        "fc.weight": torch.zeros(8, 24),
        "midlayer.self_attn.q_proj.weight": torch.zeros(8, 16),
        "lm_head.weight": torch.zeros(16, 8),
        "d2t": torch.zeros(16, dtype=torch.int64),
        "t2d": torch.ones(16, dtype=torch.bool),
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


def lint_weights(data: bytes) -> None:
    """A draft's weights as safetensors or as PyTorch's own format, beside a config."""
    folder = _folder() / "weights"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(_CONFIG)
    names = ("model.safetensors", "pytorch_model.bin")
    for name in names:
        (folder / name).unlink(missing_ok=True)
    (folder / names[bool(data[:1] > b"\x7f")]).write_bytes(data[1:])
    with contextlib.suppress(ExportError):
        check_draft(folder)


_CONFIG = json.dumps(
    {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": 16,
        "draft_vocab_size": 16,
        "hidden_size": 8,
        "target_hidden_size": 8,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "num_hidden_layers": 1,
        "max_position_embeddings": 64,
        "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 3, 4]},
    }
)
_CHAT = json.dumps(
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]}
).encode()
_KEY = str(generate(Role.TRAINER, "a").public)


def _weights() -> bytes:
    path = _draft() / "model.safetensors"
    return b"\0" + path.read_bytes()


TARGETS: dict[str, Target] = {
    "frames": Target(
        decode_raw,
        (join([bytes(f) for f in mapping_offer(1, 2).frames]),),
        ("DRMQ",),
    ),
    "conversation": Target(converse, tuple(_conversations()), ("generate", "probs", "int64")),
    "talk": Target(talk, tuple(random.Random(n).randbytes(3000) for n in range(6))),
    "mapping": Target(learn_mapping, (b"\0" + struct.pack("<QQQ", 64, 1, 2),)),
    "http": Target(
        ask_http,
        (
            b"GET /status HTTP/1.1\r\nAuthorization: Bearer draftmq-secret:a:b:c\r\n\r\n",
            b"POST /readyz HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        ),
        ("Authorization", "Bearer", "Basic", "/healthz"),
    ),
    "keys": Target(read_keys, (_KEY.encode(), f"# all\n{_KEY}\n\n".encode()), ("worker",)),
    "settings": Target(
        read_settings,
        (
            b'[broker]\nclients = "tcp://127.0.0.1:1"\nwindow = 4\ninsecure = true\n',
            b'[worker]\nbroker = ["tcp://a:1"]\naux_layers = "1,2,3"\ncredits = 2\n',
            b'[train]\nbroker = ["tcp://a:1"]\ndata = "d"\noutput = "o"\nepochs = 2\n',
            b"broker = " + b"[" * 4000,
            b"broker = " + b"9" * 5000,
        ),
        ("heartbeat_s", "allow", "[[broker]]"),
    ),
    "data": Target(
        read_data,
        (
            b"\0" + _CHAT,
            b'\0{"text": "a b c"}\n{"text": "d"}',
            b'\0{"text": "\\ud800"}',
            b'\0{"text": ' + b"9" * 5000 + b"}",
            b"\0" + b"[" * 4000,
            b"\1plain text of some length",
            b"\2" + gzip.compress(_CHAT, mtime=0),
            b"\3" + lzma.compress(_CHAT),
        ),
        ('"text"', '"messages"', '"role"', "assistant"),
    ),
    "draft-config": Target(
        lint_config,
        (_CONFIG.encode(), b"{}", b"[" * 8000, b'{"hidden_size": ' + b"9" * 5000 + b"}"),
        ("rope_parameters", "eagle_config", "null"),
    ),
    "draft-weights": Target(lint_weights, (_weights(),), ("F32", "data_offsets", "shape")),
}
