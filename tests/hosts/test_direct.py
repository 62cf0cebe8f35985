"""Direct transfers between hosts go on after one of the two has got another address."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest
import torch

from broker.core import BrokerConfig
from broker.service import Broker
from tests.hosts.lab import Lab, why_not
from tests.integration.conftest import VOCAB, make_target, tokens
from tests.waiting import eventually
from trainer_client.targets.remote import RemoteEagle3TargetModel
from worker.direct.channel import ChannelConfig
from worker.direct.config import DirectConfig
from worker.service import Worker
from worker.supervision.mapping import VocabMapping

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=f"no hosts can be made here: {why_not()}"),
]
#: Everything goes directly, and what stands still is given up soon.
DIRECT = DirectConfig(
    mode="gloo", address="auto", min_bytes=1, channel=ChannelConfig(limit_s=1.0, connect_s=2.0)
)
CLIENTS, WORKERS = 5555, 5556
_Service = TypeVar("_Service", bound=contextlib.AbstractContextManager[Any])


@pytest.fixture
def lab() -> Iterator[Lab]:
    with Lab(["broker", "worker", "trainer"]) as made:
        yield made


@pytest.fixture
def remote(lab: Lab) -> Iterator[RemoteEagle3TargetModel]:
    """A trainer whose worker and broker are on other hosts; all three in this process."""
    mapping = VocabMapping(torch.arange(0, VOCAB, 2), VOCAB)
    where = f"tcp://{lab.address('broker')}"
    config = BrokerConfig(heartbeat_s=0.2, liveness_s=2.0)
    with contextlib.ExitStack() as stack:

        def start(host: str, make: Callable[[], _Service]) -> _Service:
            return lab.on(host, lambda: stack.enter_context(make()))

        ends = (f"tcp://0.0.0.0:{CLIENTS}", f"tcp://0.0.0.0:{WORKERS}")
        start("broker", lambda: Broker(*ends, None, config, insecure=True))
        start("worker", lambda: Worker(make_target(), f"{where}:{WORKERS}", direct=DIRECT))
        made = start(
            "trainer",
            lambda: RemoteEagle3TargetModel([f"{where}:{CLIENTS}"], direct=DIRECT, timeout=20),
        )
        made.set_vocab_mapping(mapping.selected_token_ids, mapping.selected_token_mask)
        yield made


@pytest.mark.parametrize("host", ["worker", "trainer"])
def test_transfers_follow_a_host_to_its_new_address(
    lab: Lab, remote: RemoteEagle3TargetModel, host: str
) -> None:
    def comes_directly() -> bool:
        before = remote.counters()["direct"]
        remote.generate_batch(*tokens())
        return remote.counters()["direct"] > before

    eventually(comes_directly, 60)
    lab.move(host)
    remote.generate_batch(*tokens(1))  # however it comes, it does
    eventually(comes_directly, 60)
