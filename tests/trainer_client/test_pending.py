"""What a user's callback does to the client, and what a client refuses."""

import errno
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest

from broker.service import Broker
from trainer_client import service
from trainer_client.errors import DeadlineError, RequestError
from trainer_client.service import Client, PendingReply
from trainer_client.trace import Trace
from trainer_client.watch.observed import Observed
from worker.service import Worker
from worker.targets.stub import StubTarget


def test_sys_exit_in_a_callback_leaves_the_client_alive_and_later_futures_end() -> None:
    with (
        Broker(clients="tcp://127.0.0.1:0", workers="tcp://127.0.0.1:0", http=None) as broker,
        Client([broker.client_endpoint]) as client,
    ):
        first = client.submit("model_info", timeout_s=0.2)
        seen: list[BaseException] = []
        second = client.submit("model_info", timeout_s=0.6)

        def callback(_: PendingReply) -> None:
            try:
                second.result()
            except RuntimeError as error:
                seen.append(error)
            sys.exit(3)

        first.add_done_callback(callback)
        with pytest.raises(DeadlineError):
            second.result(60)
        assert "in a callback" in str(seen[0])


def test_a_client_says_why_it_cannot_be_pickled() -> None:
    with (
        Client(["tcp://127.0.0.1:1"]) as client,
        pytest.raises(TypeError, match="make one in each process"),
    ):
        pickle.dumps(client)


def test_an_answer_that_cannot_be_used_is_its_requests_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_memory(*_: Any) -> None:
        raise MemoryError("cannot allocate")

    with (
        Broker() as broker,
        Worker(StubTarget(), broker.worker_endpoint),
        Client([broker.client_endpoint]) as client,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(service, "_answer", no_memory)
            with pytest.raises(RequestError, match="cannot be used: MemoryError"):
                client.submit("model_info", timeout_s=30).result(30)
        assert client.submit("model_info", timeout_s=30).result(30).reply.info_json


def test_a_full_disk_under_a_trace_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    observed = Observed(0, None, tmp_path / "trace.json", ())
    monkeypatch.setattr(Trace, "write", full)
    observed._write_trace()
    assert caplog.messages == ["trace_not_written"]
