"""A cluster with keys: who gets in, who does not, and what each is told."""

from __future__ import annotations

import base64
import contextlib
import json
import logging
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import zmq
from click.testing import CliRunner

import broker.service
from broker.commands import cli
from broker.core import BrokerConfig
from broker.errors import BrokerError
from broker.keys.files import Role
from broker.keys.operators import write_token
from broker.peer.credentials import credentials
from broker.protocol import Packet, decode, encode
from broker.protocol import messages as m
from broker.service import Broker
from broker.transport.dealer import Dealer
from tests.integration.conftest import Cluster, tokens
from tests.keyring import Keyring
from tests.waiting import eventually
from trainer_client.core import ClientConfig
from trainer_client.errors import DeadlineError, TrainerClientError
from trainer_client.targets.remote import RemoteEagle3TargetModel
from trainer_client.watch.metrics import served
from worker.errors import WorkerError
from worker.service import Worker
from worker.supervision.mapping import VocabMapping
from worker.targets.stub import StubTarget

PATIENCE = ClientConfig(notice_s=0.2)


class KeyedCluster(Cluster):
    """A cluster in which everyone has a key: the workers ``w``, the trainers ``t``."""

    def __init__(self, target: Any, stack: contextlib.ExitStack, keys: Keyring) -> None:
        self.keys = keys
        self.secrets = {
            name: keys.make(name, role)
            for name, role in (("w", Role.WORKER), ("t", Role.TRAINER), ("thief", Role.TRAINER))
        }
        super().__init__(target, stack)

    def start_broker(
        self,
        clients: str = "tcp://127.0.0.1:0",
        workers: str = "tcp://127.0.0.1:0",
        **config: Any,
    ) -> Broker:
        settings = {"heartbeat_s": 0.2, "liveness_s": 2.0, "model_grace_s": 0.5} | config
        keys = {"key": self.keys.broker, "allow": [self.keys.allow]}
        broker = Broker(clients, workers, "127.0.0.1:0", BrokerConfig(**settings), **keys)
        return self._stack.enter_context(broker)

    def worker(self, target: Any = None, **options: Any) -> Worker:
        keys = {"key": self.secrets["w"], "broker_key": self.keys.broker_public}
        return super().worker(target, **(keys | options))

    def trainer(
        self, mapping: VocabMapping | None = None, **options: Any
    ) -> RemoteEagle3TargetModel:
        keys = {"key": self.secrets["t"], "broker_key": self.keys.broker_public}
        return super().trainer(mapping, **(keys | options))


@pytest.fixture
def keyed(target: Any, tmp_path: Path) -> Iterator[KeyedCluster]:
    with (
        contextlib.ExitStack() as stack,
        mock.patch.object(broker.service, "REREAD_S", 0.1),
    ):
        yield KeyedCluster(target, stack, Keyring(tmp_path))


class Peer:
    """A trainer by hand, with a key: says what it likes."""

    def __init__(self, keyed: KeyedCluster, secret: Path) -> None:
        endpoint = keyed.broker.client_endpoint
        shown = credentials(
            Role.TRAINER, [endpoint], secret, keyed.keys.broker_public, logging.getLogger("test")
        )
        self.context = zmq.Context()
        self.dealer = Dealer(self.context, endpoint, shown.curves[endpoint])

    def say(self, message: m.Message) -> None:
        self.dealer.send(encode(message).frames)

    def hear(self, seconds: float = 20.0) -> Packet:
        assert self.dealer.socket.poll(int(1000 * seconds)), "nothing came"
        frames = self.dealer.receive()
        assert frames is not None
        return decode(frames)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.dealer.close()
        self.context.term()


def cannot_connect(keyed: KeyedCluster, match: str, **options: Any) -> None:
    """A trainer that waits in vain is told why, in its notice and at its deadline."""
    with keyed.trainer(timeout=1.5, config=PATIENCE, **options) as remote:
        knows_why(remote, match)
        with pytest.raises(DeadlineError, match=match):
            remote.model_info()


def knows_why(remote: RemoteEagle3TargetModel, match: str) -> None:
    """Wait for the transport's last word: the first may be that the handshake broke off."""
    (link,) = remote._client.core.links.values()
    eventually(lambda: re.search(match, link.trouble))


def test_everything_works_with_keys(keyed: KeyedCluster, mapping: VocabMapping) -> None:
    worker = keyed.worker()
    remote = keyed.trainer(mapping)
    batch = remote.generate_batch(*tokens())
    assert torch.isfinite(batch.aux_hidden_states).all()
    shown = keyed.broker.snapshot()
    assert shown["workers"][0]["worker"] == worker.name
    assert worker.name.endswith(f"@{keyed.keys.fingerprint('w')}")
    assert shown["clients"][0]["client"].endswith(f"@{keyed.keys.fingerprint('t')}")


def test_what_is_on_the_way_is_encrypted(keyed: KeyedCluster) -> None:
    """A proxy in the middle sees the greeting and nothing of a hello."""
    import socket
    import threading
    from urllib.parse import urlsplit

    where = urlsplit(keyed.broker.client_endpoint)
    listener = socket.create_server(("127.0.0.1", 0))
    seen = bytearray()

    def pump(source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while octets := source.recv(65536):
                seen.extend(octets)
                sink.sendall(octets)
            sink.shutdown(socket.SHUT_WR)

    def forward() -> None:
        theirs, _ = listener.accept()
        ours = socket.create_connection((where.hostname, where.port))
        with theirs, ours:
            back = threading.Thread(target=pump, args=(ours, theirs))
            back.start()
            pump(theirs, ours)
            back.join()

    thread = threading.Thread(target=forward)
    thread.start()
    endpoint = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
    keys = {"key": keyed.secrets["t"], "broker_key": keyed.keys.broker_public}
    keyed.worker()
    try:
        with RemoteEagle3TargetModel([endpoint], timeout=20, job="visible", **keys) as remote:
            assert remote.model_info()["model"] == "tiny"
    finally:
        thread.join()
        listener.close()
    assert b"CURVE" in seen
    assert b"visible" not in seen
    assert b"DRMQ" not in seen


# -- who does not get in ------------------------------------------------------------------------


def test_a_workers_key_does_not_open_the_trainers_port(keyed: KeyedCluster) -> None:
    """The key of a worker, its role rewritten by its holder."""
    forged = keyed.secrets["w"].with_name("forged.secret")
    forged.touch(0o600)
    forged.write_text(keyed.secrets["w"].read_text().replace(":worker:", ":trainer:"))
    cannot_connect(keyed, "does not accept this key here.*another role", key=forged)
    assert not keyed.broker.snapshot()["clients"]


def test_a_trainers_key_does_not_open_the_workers_port(
    keyed: KeyedCluster, caplog: pytest.LogCaptureFixture
) -> None:
    forged = keyed.secrets["t"].with_name("forged.secret")
    forged.touch(0o600)
    forged.write_text(keyed.secrets["t"].read_text().replace(":trainer:", ":worker:"))
    keyed.worker(key=forged)
    eventually(lambda: "key_refused" in caplog.messages)
    refused = next(record for record in caplog.records if record.message == "key_refused")
    assert refused.fields["why"] == "it is allowed as trainer, and this is the port for workers"
    eventually(lambda: "cannot_connect" in caplog.messages)
    assert not keyed.broker.snapshot()["workers"]


def test_an_unknown_key(keyed: KeyedCluster) -> None:
    unknown = keyed.keys.make("x", Role.TRAINER, allowed=False)
    cannot_connect(keyed, "does not accept this key here: it is not on its allow-list", key=unknown)


def test_another_brokers_key(keyed: KeyedCluster) -> None:
    other = keyed.keys.make("other", Role.BROKER, allowed=False).with_suffix(".public")
    cannot_connect(
        keyed, "its key is probably not the one given with --broker-key", broker_key=other
    )


def test_a_trainer_without_a_key(keyed: KeyedCluster) -> None:
    cannot_connect(
        keyed, "lets only keys in.*give --key and --broker-key", key=None, broker_key=None
    )


def test_a_trainer_with_a_key_and_a_broker_without(
    cluster: Cluster, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = Keyring(tmp_path)
    own = {"key": keys.make("t", Role.TRAINER), "broker_key": keys.broker_public}
    remote = cluster.trainer(timeout=1.5, config=PATIENCE, **own)
    knows_why(remote, r"has no key \(draftmq broker --key\)")
    with pytest.raises(DeadlineError, match=r"has no key \(draftmq broker --key\)"):
        remote.model_info()
    assert 1 <= caplog.messages.count("cannot_connect") <= 2  # as it changes, not as it repeats


def test_a_healthy_trainer_does_not_notice_those_who_are_refused(
    keyed: KeyedCluster, mapping: VocabMapping
) -> None:
    keyed.worker()
    remote = keyed.trainer(mapping)
    unknown = keyed.keys.make("x", Role.TRAINER, allowed=False)
    refused = [keyed.trainer(key=unknown, name=f"x{number}") for number in range(8)]
    for seed in range(5):
        remote.generate_batch(*tokens(seed))
    assert len(keyed.broker.snapshot()["clients"]) == 1
    assert len(refused) == 8


# -- keys that come and go ----------------------------------------------------------------------


def test_a_key_allowed_later_connects_without_a_restart(keyed: KeyedCluster) -> None:
    keyed.worker()
    late = keyed.keys.make("late", Role.TRAINER, allowed=False)
    remote = keyed.trainer(key=late)
    pending = remote._client.submit("model_info", timeout_s=20.0)
    eventually(lambda: any(link.trouble for link in remote._client.core.links.values()))
    keyed.keys.allow_again("late")
    assert pending.result(20).reply.model == "tiny"
    assert not any(link.trouble for link in remote._client.core.links.values())


def test_a_revoked_trainer_is_cut_off_and_the_others_are_served(
    keyed: KeyedCluster, mapping: VocabMapping
) -> None:
    keyed.worker()
    other = keyed.keys.make("other", Role.TRAINER)
    revoked = keyed.trainer(mapping, timeout=3, config=PATIENCE)
    remote = keyed.trainer(mapping, key=other)
    revoked.generate_batch(*tokens())
    remote.generate_batch(*tokens())
    keyed.keys.revoke("t")
    eventually(lambda: sum(c["connected"] for c in keyed.broker.snapshot()["clients"]) == 1)
    with pytest.raises(DeadlineError, match="does not accept this key"):
        revoked.generate_batch(*tokens())
    remote.generate_batch(*tokens(1))


def test_a_revoked_workers_requests_go_to_another(
    keyed: KeyedCluster, mapping: VocabMapping
) -> None:
    keyed.worker(name="first")
    remote = keyed.trainer(mapping)
    remote.generate_batch(*tokens())
    second = keyed.worker(name="second", key=keyed.keys.make("w2", Role.WORKER))
    keyed.keys.revoke("w")
    eventually(lambda: [w["worker"] for w in keyed.broker.snapshot()["workers"]] == [second.name])
    assert remote.generate_batch(*tokens(1)) is not None


def test_a_broken_allow_list_changes_nothing(
    keyed: KeyedCluster, mapping: VocabMapping, caplog: pytest.LogCaptureFixture
) -> None:
    keyed.worker()
    remote = keyed.trainer(mapping)
    remote.generate_batch(*tokens())
    (keyed.keys.allow / "typo.public").write_text("draftmq-public:trainer")
    keyed.broker.reread_keys()
    eventually(lambda: "allow_list_kept" in caplog.messages)
    remote.generate_batch(*tokens(1))
    keyed.trainer().model_info()


def test_a_restarted_broker_with_the_same_key_goes_on(
    keyed: KeyedCluster, mapping: VocabMapping
) -> None:
    keyed.worker()
    remote = keyed.trainer(mapping)
    before = remote.generate_batch(*tokens())
    clients, workers = keyed.broker.client_endpoint, keyed.broker.worker_endpoint
    keyed.broker.stop()
    keyed.broker = keyed.start_broker(clients, workers)
    after = remote.generate_batch(*tokens())
    assert torch.equal(before.target_probs, after.target_probs)


# -- identities ---------------------------------------------------------------------------------


def test_a_name_cannot_be_taken_with_another_key(
    keyed: KeyedCluster, mapping: VocabMapping
) -> None:
    """Neither while its owner is there, nor where nobody of that name is known (as to a broker that
    was restarted), nor in a newer incarnation.
    """
    keyed.worker()
    remote = keyed.trainer(mapping, name="rank0")
    remote.generate_batch(*tokens())
    with Peer(keyed, keyed.secrets["thief"]) as thief:
        for name in (remote._client.name, "rank0", f"rank9@{keyed.keys.fingerprint('t')}"):
            thief.say(m.ClientHello(name, time.time_ns(), "job", 0))
            refused = thief.hear().message
            assert isinstance(refused, m.Refused)
            assert refused.code == "foreign_name"
            assert f"end in '@{keyed.keys.fingerprint('thief')}'" in refused.text
            assert str(remote._client.core.incarnation) not in refused.text
    assert [c["client"] for c in keyed.broker.snapshot()["clients"]] == [remote._client.name]
    remote.generate_batch(*tokens(1))


def test_replies_never_go_to_a_thief(keyed: KeyedCluster, mapping: VocabMapping) -> None:
    """Who knows another's request id, and even asks for it, gets nothing of its answer."""
    keyed.worker()
    remote = keyed.trainer(mapping, name="rank0")
    remote.generate_batch(*tokens())
    with Peer(keyed, keyed.secrets["thief"]) as thief:
        name = f"thief@{keyed.keys.fingerprint('thief')}"
        thief.say(m.ClientHello(name, 1, "job", 0))
        assert isinstance(thief.hear().message, m.Welcome)
        ids = [
            m.RequestId(remote._client.name, remote._client.core.incarnation, number)
            for number in range(1, 9)
        ]
        for request_id in ids:
            thief.say(m.Request(request_id, "generate", "", 0, 1, mapping.id, "probs", 9.0, ()))
            thief.say(m.Cancel(request_id))
            thief.say(m.Received((request_id,)))
        for seed in range(4):
            remote.generate_batch(*tokens(seed))
        thief.say(m.Heartbeat(-1))
        assert isinstance(thief.hear().message, m.Heartbeat)
        assert thief.dealer.receive() is None


# -- operators ----------------------------------------------------------------------------------


def fetch(address: str, token: str = "") -> int:
    request = urllib.request.Request(f"http://{address}/status")
    if token:
        request.add_header("Authorization", token)
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        return error.code


def basic(user: str, password: str) -> str:
    """What a browser sends when its user has logged in."""
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def test_status_beyond_loopback_is_for_operators(tmp_path: Path) -> None:
    keys = Keyring(tmp_path)
    operator, trainer = write_token(tmp_path, "o"), keys.make("t", Role.TRAINER)
    with Broker(
        http="0.0.0.0:0", key=keys.broker, allow=[keys.allow], http_token=operator
    ) as service:
        assert service.http_address is not None
        address = f"127.0.0.1:{service.http_address.rpartition(':')[2]}"
        secret = operator.read_text().strip()
        assert fetch(address, f"Bearer {secret}") == 200
        assert fetch(address, basic("whoever", secret)) == 200
        stolen = trainer.read_text().strip()
        wrong = [f"Bearer {stolen}", f"Bearer {secret[:-1]}", basic("o", stolen), basic(secret, "")]
        for shown in ("", "Bearer", "Basic", "Basic !", "Digest x", f"Basic {secret}", *wrong):
            assert fetch(address, shown) == 401
        with urllib.request.urlopen(f"http://{address}/healthz", timeout=10) as response:
            assert response.read() == b"ok\n"
        asked = ["status", "--http", address]
        run = CliRunner().invoke(cli, [*asked, "--http-token", str(operator), "--json"])
        assert run.exit_code == 0
        assert json.loads(run.stdout)["workers"] == []
        without = CliRunner().invoke(cli, asked)
        assert isinstance(without.exception, BrokerError)
        assert "give the operators' token (--http-token FILE)" in str(without.exception)


@contextlib.contextmanager
def worker_http(address: str, **options: Any) -> Iterator[str | None]:
    with Worker(StubTarget(), "ipc:///tmp/draftmq-nobody", http=address, **options) as worker:
        yield worker.http_address


@contextlib.contextmanager
def trainer_http(address: str, **options: Any) -> Iterator[str | None]:
    with served(address, 0, lambda: {"here": True}, **options) as shown:
        yield shown


@pytest.mark.parametrize("serve", [worker_http, trainer_http])
def test_workers_and_trainers_too_show_strangers_nothing(tmp_path: Path, serve: Any) -> None:
    file, other = write_token(tmp_path, "o"), write_token(tmp_path, "other")
    token = f"Bearer {file.read_text().strip()}"
    with serve("0.0.0.0:0", http_token=file) as shown:
        address = f"127.0.0.1:{shown.rpartition(':')[2]}"
        assert fetch(address) == 401
        assert fetch(address, f"Bearer {other.read_text().strip()}") == 401
        assert fetch(address, token) == 200
        other.replace(file)
        assert fetch(address, token) == 401
        file.unlink()
        assert fetch(address, token) == 401
    for unusable in ({}, {"http_token": tmp_path / "none-there"}):
        with (
            pytest.raises((WorkerError, TrainerClientError), match=r"http-token|cannot read"),
            serve("0.0.0.0:0", **unusable),
        ):
            pass
    for options in ({"address": "0.0.0.0:0", "http_token": "none"}, {"address": "127.0.0.1:0"}):
        with serve(**options) as shown:
            assert fetch(f"127.0.0.1:{shown.rpartition(':')[2]}") == 200


@pytest.mark.parametrize("command", ["worker", "train"])
def test_no_command_shows_itself_to_everyone_unasked(tmp_path: Path, command: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a line"}\n')
    needed = {
        "worker": ["--target-factory=worker.targets.stub:StubTarget"],
        "train": [f"--data={data}", f"--output={tmp_path / 'run'}"],
    }
    asked = [command, "--broker=ipc:///tmp/draftmq-nobody", *needed[command], "--http=0.0.0.0:0"]
    run = CliRunner().invoke(cli, asked)
    assert isinstance(run.exception, WorkerError | TrainerClientError)
    assert "give --http-token FILE" in str(run.exception)


def test_status_on_loopback_needs_no_key(keyed: KeyedCluster) -> None:
    assert fetch(str(keyed.broker.http_address)) == 200


def test_ports_beyond_loopback_want_keys_or_a_word(tmp_path: Path) -> None:
    keys = Keyring(tmp_path)
    keys.make("t", Role.TRAINER)
    for options in ({"clients": "tcp://0.0.0.0:0"}, {"http": "0.0.0.0:0"}):
        with pytest.raises(BrokerError, match="draftmq keygen"):
            Broker(**options).start()
    with pytest.raises(BrokerError, match="give --http-token FILE"):
        Broker(http="0.0.0.0:0", key=keys.broker, allow=[keys.allow]).start()
    with Broker("tcp://0.0.0.0:0", "tcp://0.0.0.0:0", key=keys.broker, allow=[keys.allow]):
        pass
