"""Key files, allow-lists, and what is refused about them."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path

import pytest
import zmq
from click.testing import CliRunner

from broker.commands import cli
from broker.keys.access import Access
from broker.keys.allow import AllowList
from broker.keys.files import (
    KeyFileError,
    PublicKey,
    Role,
    SecretKey,
    generate,
    parse,
    read_public,
    read_secret,
    write_pair,
)
from broker.peer.credentials import credentials
from tests.keyring import Keyring
from trainer_client.service import Client


@pytest.fixture
def keyring(tmp_path: Path) -> Keyring:
    return Keyring(tmp_path)


def test_keygen_writes_a_pair_that_is_one(tmp_path: Path) -> None:
    arguments = ["keygen", "--role", "worker", "--name", "gpu7", "--output", str(tmp_path / "keys")]
    result = CliRunner().invoke(cli, [*arguments, "--json"])
    assert result.exit_code == 0
    shown = json.loads(result.stdout)
    secret = read_secret(shown["secret_path"], Role.WORKER)
    assert read_public(shown["public_path"]) == secret.public == read_public(shown["public"])
    assert (secret.role, secret.name) == (Role.WORKER, "gpu7")
    assert secret.text not in result.stdout + repr(secret) + str(secret)


def test_a_secret_is_for_its_owner_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        secret, public = write_pair(tmp_path / "keys", generate(Role.TRAINER, "a"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    assert stat.S_IMODE(public.stat().st_mode) == 0o644
    assert stat.S_IMODE(secret.parent.stat().st_mode) == 0o700


@pytest.mark.parametrize("there", ["a.secret", "a.public"])
def test_a_key_is_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_text("mine")
    with pytest.raises(KeyFileError, match="exists and is not overwritten"):
        write_pair(tmp_path, generate(Role.TRAINER, "a"))
    assert [path.name for path in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_text() == "mine"


def test_a_key_does_not_follow_a_link_to_where_another_reads_it(tmp_path: Path) -> None:
    (tmp_path / "a.secret").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(KeyFileError, match="exists"):
        write_pair(tmp_path, generate(Role.TRAINER, "a"))
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o604])
def test_a_secret_that_others_can_read_is_not_used(keyring: Keyring, mode: int) -> None:
    secret = keyring.make("a", Role.TRAINER)
    secret.chmod(mode)
    with pytest.raises(KeyFileError, match=rf"mode {mode:04o}.*chmod 600 {secret}"):
        read_secret(secret, Role.TRAINER)
    secret.chmod(0o400)
    read_secret(secret, Role.TRAINER)


def test_keys_mistaken_for_each_other(keyring: Keyring, tmp_path: Path) -> None:
    secret = keyring.make("a", Role.TRAINER)
    with pytest.raises(KeyFileError, match="is a public key"):
        read_secret(_private(tmp_path / "a.public"), Role.TRAINER)
    with pytest.raises(KeyFileError, match="is a secret key") as error:
        read_public(secret)
    assert secret.read_text().strip() not in str(error.value)
    with pytest.raises(KeyFileError, match="a key for a trainer, a key for a worker is needed"):
        read_secret(secret, Role.WORKER)
    with pytest.raises(KeyFileError, match="public key of the trainer 'a'; the broker's own"):
        Client(["tcp://127.0.0.1:1"], key=secret, broker_key=tmp_path / "a.public")


def _private(path: Path) -> Path:
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "is not a key"),
        ("draftmq-public:trainer:a:" + "0" * 63, "is not a key"),
        ("draftmq-public:trainer:a b:" + "0" * 64, "is not a key"),
        ("draftmq-public:king:a:" + "0" * 64, "the role 'king'; the roles are trainer, worker"),
        ("draftmq-public:trainer:a:" + "\u0660" * 64, "is not a key"),
    ],
)
def test_what_is_no_key(text: str, match: str) -> None:
    with pytest.raises(KeyFileError, match=match):
        parse(text, "x")


def test_files_that_are_no_keys(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"#" * (2 << 20))
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for name, match in (("long", "longer than"), ("binary", "not ASCII"), ("none", "No such file")):
        with pytest.raises(KeyFileError, match=match):
            read_public(tmp_path / name)


@pytest.mark.parametrize("name", ["", "a b", "../a", "a:b", "\u00e4", "a" * 65])
def test_names_that_a_key_cannot_carry(name: str) -> None:
    with pytest.raises(KeyFileError, match="cannot be called"):
        generate(Role.TRAINER, name)


def test_a_libzmq_without_curve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zmq, "has", lambda capability: capability != "curve")
    with pytest.raises(KeyFileError, match="was built without CURVE"):
        generate(Role.TRAINER, "a")


# -- allow-lists -------------------------------------------------------------------------------


def test_an_allow_list_is_lines_or_a_directory(tmp_path: Path) -> None:
    one, two = (generate(Role.TRAINER, name).public for name in ("one", "two"))
    worker = PublicKey(Role.WORKER, "one", one.key)
    (tmp_path / "list").write_text(f"# who trains\n\n{one}\n  {worker}\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "two.public").write_text(str(two))
    (tmp_path / "folder" / "broker.public").write_text(str(generate(Role.BROKER, "b").public))
    (tmp_path / "folder" / "notes.txt").write_text("not a key")
    allowed = AllowList([tmp_path / "list", tmp_path / "folder"])
    assert len(allowed) == 3
    assert allowed.find(Role.TRAINER, one.key) == one
    assert allowed.find(Role.WORKER, two.key) is None
    assert allowed.roles(one.key) == [Role.TRAINER, Role.WORKER]


def test_a_bad_line_is_named_and_never_shown(tmp_path: Path) -> None:
    secret = generate(Role.TRAINER, "a")
    (tmp_path / "list").write_text(f"{secret.public}\n{secret.text}\n")
    with pytest.raises(KeyFileError, match="list, line 2, is a secret key") as error:
        AllowList([tmp_path / "list"])
    assert secret.key.hex() not in str(error.value)
    with pytest.raises(KeyFileError, match="there is no allow-list at"):
        AllowList([tmp_path / "other"])


def test_two_keys_with_one_fingerprint_are_refused(tmp_path: Path) -> None:
    key = generate(Role.TRAINER, "a").public
    twin = PublicKey(Role.WORKER, "b", key.key[:8] + bytes(24))
    (tmp_path / "list").write_text(f"{key}\n{twin}\n")
    with pytest.raises(KeyFileError, match=f"'a' and 'b' both begin with {key.fingerprint}"):
        AllowList([tmp_path / "list"])


def test_a_list_that_went_bad_leaves_the_keys_as_they_were(keyring: Keyring) -> None:
    keyring.make("a", Role.TRAINER)
    allowed = AllowList([keyring.allow])
    (keyring.allow / "b.public").write_text("rubbish")
    assert allowed.changed()
    with pytest.raises(KeyFileError):
        allowed.reread()
    assert len(allowed) == 1
    assert not allowed.changed()


# -- who brings what ---------------------------------------------------------------------------


def test_half_of_what_is_needed(keyring: Keyring) -> None:
    with pytest.raises(KeyFileError, match=r"--allow .* is missing"):
        Access(keyring.broker)
    with pytest.raises(KeyFileError, match=r"--key .* is missing"):
        Access(None, [keyring.allow])
    with pytest.raises(KeyFileError, match=r"--broker-key .* is missing"):
        Client(["tcp://127.0.0.1:1"], key=keyring.make("a", Role.TRAINER))
    with pytest.raises(KeyFileError, match=r"--key .a trainer's. is missing"):
        Client(["tcp://127.0.0.1:1"], broker_key=keyring.broker_public)


def test_keys_come_from_the_environment_too(
    keyring: Keyring, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import logging

    logger = logging.getLogger("draftmq.test")
    monkeypatch.setenv("DRAFTMQ_TRAIN_KEY", str(keyring.make("a", Role.TRAINER)))
    monkeypatch.setenv("DRAFTMQ_TRAIN_BROKER_KEY", keyring.broker_public.read_text())
    endpoints = ["tcp://10.0.0.1:1", "tcp://10.0.0.2:1"]
    shown = credentials(Role.TRAINER, endpoints, None, None, logger)
    assert set(shown.curves) == set(endpoints)
    assert shown.fingerprint == keyring.fingerprint("a")
    assert not caplog.records
    public = keyring.broker_public
    with pytest.raises(KeyFileError, match="3 keys of brokers for 2 brokers"):
        credentials(Role.TRAINER, endpoints, None, [public] * 3, logger)


def test_a_peer_warns_once_for_each_broker_that_it_reaches_in_the_clear(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import logging

    endpoints = ["tcp://127.0.0.1:1", "tcp://10.0.0.1:1", "ipc:///tmp/x", "tcp://host:2"]
    credentials(Role.WORKER, endpoints, None, None, logging.getLogger("draftmq.test"))
    assert [record.fields["endpoint"] for record in caplog.records] == [  # type: ignore[attr-defined]
        "tcp://10.0.0.1:1",
        "tcp://host:2",
    ]


def test_secrets_round_trip_through_their_line() -> None:
    for role in Role:
        secret = generate(role, "a.b-c_1")
        assert parse(secret.text, "x") == secret
        assert isinstance(parse(secret.text, "x"), SecretKey)
        assert parse(f"  {secret.public}\n", "x") == secret.public
