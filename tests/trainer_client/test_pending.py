"""What a user's callback does to the client, and what a client refuses."""

import pickle
import sys

import pytest

from broker.service import Broker
from trainer_client.errors import DeadlineError
from trainer_client.service import Client, PendingReply


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
