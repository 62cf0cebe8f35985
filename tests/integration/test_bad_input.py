"""Wrong input gets a clear error at the right place, and everybody else goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import struct
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
import torch
import xxhash
import zmq

from broker.core import BrokerConfig
from broker.errors import BrokerError
from broker.protocol import Limits, LocalProtocolError, decode, encode, wire
from broker.protocol import messages as m
from broker.service import Broker
from tests.integration.conftest import LENGTH, VOCAB, Cluster, make_target, tokens
from tests.waiting import eventually
from trainer_client.core import ClientConfig
from trainer_client.errors import (
    BadRequestError,
    DeadlineError,
    IdentityError,
    RefusedError,
    TargetFailedError,
)
from trainer_client.service import Client
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.answers import Answerer, Work
from worker.errors import WorkerError
from worker.supervision.mapping import VocabMapping
from worker.targets.foreign import ForeignTarget


def test_token_ids_beyond_the_vocabulary(cluster: Cluster, mapping: VocabMapping) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping)
    ids, *masks = tokens()
    ids[1, 3] = VOCAB
    with pytest.raises(BadRequestError, match=r"input_ids\[1, 3\] is 256.*has 256 tokens"):
        remote.generate_batch(ids, *masks)
    remote.generate_batch(*tokens())


def test_a_worker_checks_what_a_client_did_not(cluster: Cluster, mapping: VocabMapping) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping)
    ids, attention_mask, loss_mask = tokens()
    asked = {"timeout_s": 20.0, "mapping_id": mapping.id, "encoding": "probs"}
    for bad, match in (
        ({"input_ids": ids + VOCAB}, "the target's vocabulary has 256"),
        ({"loss_mask": loss_mask[:, :3]}, r"loss_mask has shape \(2, 3\)"),
        ({"attention_mask": attention_mask.double()}, "attention_mask is torch.float64"),
    ):
        tensors = {"input_ids": ids, "attention_mask": attention_mask, "loss_mask": loss_mask}
        pending = remote._client.submit("generate", tensors | bad, **asked)
        with pytest.raises(BadRequestError, match=match):
            pending.result(20)
    with pytest.raises(BadRequestError, match="unknown operation 'dance'"):
        remote._client.submit("dance", timeout_s=20.0).result(20)
    with pytest.raises(BadRequestError, match="wants the tensors"):
        remote._client.submit("generate", {"input_ids": ids}, **asked).result(20)
    remote.generate_batch(*tokens())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda i, a, m: (i, a[:, :5], m), r"has shape \(2, 5\), input_ids \(2, 16\)"),
        (lambda i, a, m: (i[0], a, m), r"must be \[batch, tokens\]"),
        (lambda i, a, m: (i.float(), a, m), "input_ids is torch.float32"),
        (lambda i, a, m: (i[:, :0], a[:, :0], m[:, :0]), "the batch is empty"),
    ],
)
def test_shapes_and_dtypes(
    cluster: Cluster, mapping: VocabMapping, change: Callable[..., tuple], match: str
) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping)
    with pytest.raises(BadRequestError, match=match):
        remote.generate_batch(*change(*tokens()))


def test_a_sequence_longer_than_the_target(cluster: Cluster, mapping: VocabMapping) -> None:
    cluster.worker()
    with pytest.raises(BadRequestError, match=f"{LENGTH + 1} tokens, the target has .* {LENGTH}"):
        cluster.trainer(mapping).generate_batch(*tokens(length=LENGTH + 1))


def test_an_unknown_model_names_those_that_are_there(cluster: Cluster) -> None:
    cluster.worker()
    with pytest.raises(BadRequestError, match="'huge'; the models here are: tiny"):
        cluster.trainer(model="huge").model_info()


def test_an_encoding_that_is_not_offered(cluster: Cluster, mapping: VocabMapping) -> None:
    theirs = ForeignTarget(cluster.target, "tiny")
    vars(theirs)["encodings"] = ("probs", "topk")
    cluster.worker(theirs)
    with pytest.raises(BadRequestError, match="encodings probs, topk; 'hidden' is not one"):
        cluster.trainer(mapping, encoding="hidden")
    with pytest.raises(ValueError, match="'float8' is no wish of supervision"):
        cluster.trainer(mapping, encoding="float8")


def test_no_mapping(cluster: Cluster) -> None:
    cluster.worker()
    with pytest.raises(BadRequestError, match="call set_vocab_mapping"):
        cluster.trainer().generate_batch(*tokens())


def test_a_mapping_with_duplicates_or_of_another_vocabulary(cluster: Cluster) -> None:
    cluster.worker()
    remote = cluster.trainer()
    mask = torch.zeros(VOCAB, dtype=torch.bool)
    mask[[3, 5]] = True
    with pytest.raises(ValueError, match=r"duplicates: \[5\]"):
        remote.set_vocab_mapping(torch.tensor([3, 5, 5]), mask)
    with pytest.raises(ValueError, match="vocabulary of 300, the target 'tiny' has 256"):
        remote.set_vocab_mapping(torch.tensor([3]), torch.arange(300) == 3)


def test_a_worker_with_other_weights_is_refused(cluster: Cluster) -> None:
    cluster.worker()
    eventually(lambda: cluster.broker.snapshot()["workers"])
    stranger = cluster.worker(make_target(seed=1))
    with pytest.raises(WorkerError, match=r"serves fingerprint=.*this worker has fingerprint="):
        stranger.wait(20)
    assert len(cluster.broker.snapshot()["workers"]) == 1


def test_a_target_that_raises_is_told_with_its_story(
    cluster: Cluster, mapping: VocabMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = make_target()

    def forward(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(target, "forward", forward)
    cluster.worker(target, name="w1")
    with pytest.raises(TargetFailedError, match=r"1 attempt: worker w1 .*out of memory"):
        cluster.trainer(mapping).generate_batch(*tokens())


def test_a_reply_over_the_limit(target: object, mapping: VocabMapping) -> None:
    from worker.service import Worker

    config = BrokerConfig(limits=Limits(max_reply_bytes=50_000))
    with (
        Broker(config=config) as broker,
        Worker(target, broker.worker_endpoint),  # type: ignore[arg-type]
        RemoteEagle3TargetModel([broker.client_endpoint], timeout=20) as remote,
    ):
        remote.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
        with pytest.raises(BadRequestError, match="bytes, the limit is 50000"):
            remote.generate_batch(*tokens(batch=8, length=LENGTH))
        remote.generate_batch(*tokens(batch=1, length=8))


def test_a_request_over_the_limit_is_not_sent(cluster: Cluster) -> None:
    cluster.worker()
    remote = cluster.trainer()
    remote.model_info()
    with pytest.raises(LocalProtocolError, match="the limit is 67108864"):
        remote._client.submit(
            "generate", {"a": torch.empty(65 << 20, dtype=torch.uint8)}, timeout_s=1
        )


def connect(endpoint: str) -> socket.socket:
    where = urlsplit(endpoint)
    return socket.create_connection((where.hostname, where.port), timeout=20)


def greet(sock: socket.socket) -> None:
    """A ZMTP 3.0 NULL handshake as a DEALER, by hand."""
    sock.sendall(b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(23, b"\0") + bytes(32))
    ready = b"\x05READY\x0bSocket-Type" + struct.pack(">I", 6) + b"DEALER"
    sock.sendall(b"\x04" + bytes([len(ready)]) + ready)
    theirs = sock.recv(64 + 2, socket.MSG_WAITALL)  # their greeting, and how long their READY is
    sock.recv(theirs[-1], socket.MSG_WAITALL)


@pytest.mark.parametrize("port", ["client_endpoint", "worker_endpoint"])
@pytest.mark.parametrize("what", ["noise", "a frame that is none", "2 GB announced"])
def test_garbage_on_a_port_hurts_nobody(
    cluster: Cluster, mapping: VocabMapping, port: str, what: str
) -> None:
    cluster.worker()
    remote = cluster.trainer(mapping)
    remote.model_info()
    sock = connect(getattr(cluster.broker, port))
    if what == "noise":
        sock.sendall(os.urandom(4096))
        sock.shutdown(socket.SHUT_WR)
    else:
        greet(sock)
        if what == "2 GB announced":
            sock.sendall(b"\x02" + struct.pack(">Q", 2 << 30))
        else:
            sock.sendall(b"\x00\x07garbage")
    if what == "a frame that is none":
        eventually(lambda: cluster.broker.snapshot()["counters"]["bad_messages"] == 1)
    else:  # the broker hangs up
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(4096):
                pass
    sock.close()
    remote.generate_batch(*tokens())


def in_the_next_version(header: bytes) -> bytes:
    later = bytearray(header[:-8])
    later[4] = wire.VERSION + 1
    return bytes(later) + struct.pack("<Q", xxhash.xxh3_64_intdigest(later))


def test_another_protocol_version_is_refused_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broker of a later release, played by a ROUTER that answers in version 2."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with RemoteEagle3TargetModel([f"tcp://127.0.0.1:{port}"], timeout=20) as remote:
            pending = remote._client.submit("model_info", timeout_s=20.0)
            name, header = router.recv_multipart()
            assert isinstance(decode([header]).message, m.ClientHello)
            router.send_multipart([name, in_the_next_version(header)])
            with pytest.raises(RefusedError, match="speaks version 4, this side speaks version 3"):
                pending.result(20)


def test_a_damaged_message_makes_a_peer_say_hello_again() -> None:
    """The broker is played by a ROUTER; a peer would wait 300 s for it to say anything else."""
    rules = (16, 60.0, 300.0, 1 << 20, 8192, 64 << 20, 64 << 20, 4 << 30)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.linger = 0
        router.rcvtimeo = 10_000
        port = router.bind_to_random_port("tcp://127.0.0.1")
        with Client([f"tcp://127.0.0.1:{port}"]) as client:
            name, _ = router.recv_multipart()
            welcome = encode(m.Welcome("b1", *rules)).frames[0]
            router.send_multipart([name, welcome])
            (link,) = client.core.links.values()
            eventually(lambda: link.ready)
            router.send_multipart([name, welcome[:-1] + bytes([welcome[-1] ^ 1])])
            _, header = router.recv_multipart()
            assert isinstance(decode([header]).message, m.ClientHello)


def test_the_broker_tells_a_peer_of_another_version(cluster: Cluster) -> None:
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(cluster.broker.client_endpoint)
        dealer.send(in_the_next_version(bytes(encode(m.Heartbeat(-1)).frames[0])))
        refused = decode(dealer.recv_multipart()).message
        assert isinstance(refused, m.Refused)
        assert "speaks version 4, this side speaks version 3" in refused.text


def test_a_reply_with_another_identity_never_reaches_the_trainer(
    cluster: Cluster, mapping: VocabMapping, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker that mixes up two requests: it answers with the hash of other tokens."""
    from worker import answers

    monkeypatch.setattr(answers, "payload_hash", lambda packet: 12345)
    cluster.worker()
    with pytest.raises(IdentityError, match="tokens_hash is 12345 where"):
        cluster.trainer(mapping).generate_batch(*tokens())


def test_no_broker_at_the_address_is_said_and_waited_for(
    target: object, mapping: VocabMapping, caplog: pytest.LogCaptureFixture
) -> None:
    from worker.service import Worker

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        endpoint = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    config = ClientConfig(notice_s=0.2, notice_again_s=60)
    with (
        caplog.at_level(logging.WARNING, "draftmq.client"),
        RemoteEagle3TargetModel([endpoint], timeout=30, config=config) as remote,
    ):
        pending = remote._client.submit("model_info", timeout_s=30.0)
        eventually(lambda: "waiting" in caplog.messages)
        (record,) = [record for record in caplog.records if record.message == "waiting"]
        assert f"no broker answers at {endpoint}" in record.fields["why"]  # type: ignore[attr-defined]
        with Broker(endpoint) as broker, Worker(target, broker.worker_endpoint):  # type: ignore[arg-type]
            assert pending.result(30).reply.model == "tiny"


def test_no_worker_is_said_and_waited_for(
    cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    remote = cluster.trainer(config=ClientConfig(notice_s=0.5))
    with caplog.at_level(logging.WARNING, "draftmq.client"):
        pending = remote._client.submit("model_info", timeout_s=30.0)
        eventually(lambda: "waiting" in caplog.messages)
    (record,) = [record for record in caplog.records if record.message == "waiting"]
    assert "has no worker for this; start a draftmq worker" in record.fields["why"]  # type: ignore[attr-defined]
    cluster.worker()
    assert pending.result(20).reply.model == "tiny"


def test_a_deadline_tells_the_story(cluster: Cluster) -> None:
    remote = cluster.trainer(timeout=0.6)
    with pytest.raises(DeadlineError, match=r"no answer within 0\.\d s: it was sent 1 time"):
        remote.model_info()


def test_a_second_process_with_the_same_name_fences_off_the_first(cluster: Cluster) -> None:
    cluster.worker()
    first = cluster.trainer(name="rank0")
    first.model_info()
    second = cluster.trainer(name="rank0")
    second.model_info()
    with pytest.raises(RefusedError, match="is fenced off: two processes use one name"):
        first._client.submit("model_info", timeout_s=20.0).result(20)


def test_an_address_that_is_taken_or_open_to_others(cluster: Cluster) -> None:
    with pytest.raises(BrokerError, match=r"cannot listen for clients .*choose another"):
        Broker(cluster.broker.client_endpoint).start()
    with pytest.raises(BrokerError, match="can be reached from other machines"):
        Broker("tcp://0.0.0.0:0").start()
    with pytest.raises(BrokerError, match="cannot serve HTTP"):
        Broker(http=cluster.broker.http_address).start()


@pytest.mark.parametrize("said", ["no JSON", "[]", "{}"])
def test_a_worker_that_says_nonsense_of_its_model_is_named(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    def hostile(answerer: Answerer, work: Work) -> None:
        work.info_json, work.tensors = said, {}

    monkeypatch.setattr(Answerer, "_compute", hostile)
    worker = cluster.worker()
    with pytest.raises(IdentityError, match=f"worker {worker.name} answered model_info with"):
        cluster.trainer().model_info()
