"""The two ends of a direct channel, driven through each other."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from worker.direct.channel import (
    TRANSITIONS,
    Announced,
    Channel,
    ChannelConfig,
    ChannelState,
    Close,
    Connect,
    Drop,
    Failed,
    Joined,
    Log,
    Moved,
    Open,
    Receive,
    Reject,
    Tick,
)

CONFIG = ChannelConfig(limit_s=5.0, backoff_s=0.1, backoff_max_s=1.0, max_failures=4)


def channel(state: ChannelState = ChannelState.READY) -> Channel:
    made = Channel("w/c", CONFIG)
    if state is not ChannelState.IDLE:
        made.handle(Open(1), 0.0)
    if state is ChannelState.READY:
        made.handle(Joined(1), 0.0)
    if state is ChannelState.BROKEN:
        made.handle(Failed(1, "cut"), 0.0)
    if state is ChannelState.CLOSED:
        made.handle(Close(1, "done"), 0.0)
    assert made.state is state
    return made


def kinds(actions: list) -> list[type]:
    return [type(action) for action in actions if type(action).__name__ != "Log"]


def test_an_epoch_is_connected_and_then_moves_transfers_in_order() -> None:
    made = channel(ChannelState.IDLE)
    assert kinds(made.handle(Open(1), 0.0)) == [Connect]
    assert made.handle(Announced(1, 0), 0.0) == []  # announced before this end is ready
    assert Receive(1, 0) in made.handle(Joined(1), 0.0)
    assert made.handle(Announced(1, 2), 0.0) == []
    assert made.handle(Moved(1), 0.0) == []  # 1 is still missing
    assert made.handle(Announced(1, 1), 0.0) == [Receive(1, 1)]
    assert made.handle(Moved(1), 0.0) == [Receive(1, 2)]
    made.validate()


def test_a_missing_announcement_breaks_the_channel_after_the_limit() -> None:
    made = channel()
    made.handle(Announced(1, 1), 10.0)
    assert made.next_timer == 15.0
    assert made.handle(Tick(1), 14.9) == []
    actions = made.handle(Tick(1), 15.0)
    assert kinds(actions) == [Drop, Reject]
    assert "transfer 0 was never announced" in made.why


def test_a_failure_rejects_what_was_to_be_received() -> None:
    made = channel()
    made.handle(Announced(1, 0), 0.0)
    made.handle(Announced(1, 1), 0.0)
    actions = made.handle(Failed(1, "cut"), 1.0)
    assert kinds(actions) == [Drop, Reject, Reject]
    assert made.state is ChannelState.BROKEN
    assert kinds(made.handle(Announced(1, 2), 1.0)) == [Reject]


def test_what_is_about_an_old_epoch_changes_nothing() -> None:
    made = channel()
    made.handle(Failed(1, "cut"), 0.0)
    made.handle(Open(2), 1.0)
    for late in (Joined(1), Failed(1, "late"), Moved(1), Open(1), Close(1, "late")):
        assert made.handle(late, 2.0) == []
        assert (made.state, made.epoch) == (ChannelState.CONNECTING, 2)


def test_a_newer_epoch_replaces_a_ready_channel() -> None:
    made = channel()
    made.handle(Announced(1, 0), 0.0)
    actions = made.handle(Open(3), 0.0)
    assert kinds(actions) == [Drop, Reject, Connect]
    assert (made.epoch, made.seq) == (3, 0)


def test_waits_double_until_the_wire_is_all_that_is_left() -> None:
    made = channel(ChannelState.IDLE)
    waits = []
    for attempt in range(1, CONFIG.max_failures + 1):
        made.handle(Open(attempt), 0.0)
        logs = [a for a in made.handle(Failed(attempt, "refused"), 0.0) if hasattr(a, "event")]
        waits.append(made.retry_at)
    assert waits == pytest.approx([0.1, 0.2, 0.4, 0.8])
    assert made.state is ChannelState.CLOSED
    assert [log.event for log in logs] == ["channel_broken", "channel_given_up"]
    assert made.handle(Open(9), 100.0) == []
    assert not made.may_open(100.0)


def test_an_end_that_leaves_while_nothing_is_under_way_is_no_warning() -> None:
    made = channel(ChannelState.READY)
    logs = [a for a in made.handle(Failed(1, "gone", at_rest=True), 0.0) if isinstance(a, Log)]
    assert [(log.level, log.event) for log in logs] == [("info", "channel_left")]
    assert made.state is ChannelState.BROKEN


def test_a_transfer_that_succeeds_forgives_the_failures() -> None:
    made = channel(ChannelState.IDLE)
    for epoch in range(1, 30):
        assert made.may_open(float(epoch))
        made.handle(Open(epoch), float(epoch))
        made.handle(Joined(epoch), float(epoch))
        made.handle(Moved(epoch), float(epoch))
        made.handle(Failed(epoch, "cut"), float(epoch))
    assert made.state is ChannelState.BROKEN


@pytest.mark.parametrize("state", ChannelState)
@pytest.mark.parametrize("kind", [Open, Joined, Moved, Failed, Close])
def test_the_machine_follows_its_table(state: ChannelState, kind: type) -> None:
    made = channel(state)
    event = kind(made.epoch + (kind is Open), *(["why"] if kind in (Failed, Close) else []))
    made.handle(event, 1.0)
    assert made.state is TRANSITIONS.get((state, kind), state)
    made.validate()


class Pair(RuleBasedStateMachine):
    """Worker and client with anything between them: late, lost and doubled news."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.worker, self.client = Channel("w/c", CONFIG), Channel("w/c", CONFIG)
        self.invitations: list[int] = []
        self.announcements: list[tuple[int, int]] = []
        self.sent: list[tuple[int, int]] = []
        self.received: list[tuple[int, int]] = []

    def tell(self, end: Channel, event: object) -> None:
        for action in end.handle(event, self.now):
            if isinstance(action, Receive):
                self.received.append((action.epoch, action.seq))

    @precondition(lambda self: self.worker.may_open(self.now))
    @rule()
    def invite(self) -> None:
        epoch = self.worker.epoch + 1
        self.tell(self.worker, Open(epoch))
        self.invitations.append(epoch)

    @precondition(lambda self: self.invitations)
    @rule(data=st.data())
    def accept(self, data: st.DataObject) -> None:
        self.tell(self.client, Open(data.draw(st.sampled_from(self.invitations))))

    @precondition(lambda self: self.worker.epoch == self.client.epoch > 0)
    @rule()
    def meet(self) -> None:
        for end in (self.worker, self.client):
            self.tell(end, Joined(end.epoch))

    @precondition(lambda self: self.worker.state is ChannelState.READY)
    @rule(announced=st.booleans())
    def send(self, announced: bool) -> None:
        transfer = (self.worker.epoch, self.worker.take_seq())
        self.sent.append(transfer)
        if announced:
            self.announcements.append(transfer)

    @precondition(lambda self: self.announcements)
    @rule(data=st.data())
    def announce(self, data: st.DataObject) -> None:
        self.tell(self.client, Announced(*data.draw(st.sampled_from(self.announcements))))

    @precondition(lambda self: self.client.receiving is not None)
    @rule()
    def move(self) -> None:
        for end in (self.worker, self.client):
            self.tell(end, Moved(self.client.epoch))

    @rule(worker=st.booleans(), late=st.integers(0, 2))
    def fail(self, worker: bool, late: int) -> None:
        end = self.worker if worker else self.client
        self.tell(end, Failed(end.epoch - late, "cut"))

    @rule(seconds=st.sampled_from([0.05, 1.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds
        for end in (self.worker, self.client):
            self.tell(end, Tick(end.epoch))

    @invariant()
    def holds(self) -> None:
        self.worker.validate()
        self.client.validate()
        assert set(self.received) <= set(self.sent)
        assert self.received == sorted(set(self.received))  # in order, and each once


Pair.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestPair = Pair.TestCase
