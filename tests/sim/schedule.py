"""A schedule is data: a seed expands into operations in time, and fewer of them still play."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.sim.mappings import MAPPING_IDS

#: Operations happen within so much time.
_SPAN_S = 8.0
#: What one takes at most, from its beginning.
_LASTS_S = 7.0


@dataclass(frozen=True)
class Op:
    """One operation: at what time, which kind (see ``faults.KINDS``), to whom, and how."""

    at: float
    kind: str
    who: str
    how: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        how = " ".join(f"{name}={value}" for name, value in self.how.items())
        return f"{self.kind} {self.who} {how}".rstrip()


@dataclass(frozen=True)
class Schedule:
    """``seed`` is also where the network's luck comes from."""

    seed: int
    endpoints: tuple[str, ...]
    ops: tuple[Op, ...]

    @property
    def ends_at(self) -> float:
        """When the last fault is over."""
        lasts = [op.at + op.how.get("for_s", op.how.get("down_s", 0.0)) for op in self.ops]
        return max(lasts, default=0.0) + 0.01


class _Maker:
    """Draws one schedule."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.ops: list[Op] = []

    def make(self) -> Schedule:
        rng = self.rng
        self.brokers = [f"b{n}" for n in range(1, rng.choice((1, 1, 2)) + 1)]
        self.workers = [f"w{n}" for n in range(1, rng.choice((1, 2, 2, 3, 4)) + 1)]
        self.clients = [f"c{n}" for n in range(1, rng.choice((1, 1, 2, 3)) + 1)]
        self.models = rng.choice((["m"], ["m"], ["m"], ["m", "n"]))
        self._start_all()
        self._ask(rng.randint(3, 12))
        kinds = _CALM_WEIGHTS if rng.random() < 0.1 else _WEIGHTS
        for _ in range(rng.choice((0, 1, 2, 3, 4, 6, 8))):
            self._break(rng.choices(*zip(*kinds.items(), strict=True))[0])
        ops = tuple(sorted(self.ops, key=lambda op: op.at))
        return Schedule(self.seed, tuple(self.brokers), ops)

    def _add(self, at: float, kind: str, who: str, **how: Any) -> None:
        self.ops.append(Op(round(at, 3), kind, who, how))

    def _start_all(self) -> None:
        rng = self.rng
        for name in self.brokers:
            self._add(
                self._begin(), "start", name, role="broker",
                window=rng.choice((1, 2, 4, 16)),
                heartbeat_s=2.5,
                held_answer_bytes=rng.choice((0, 1000, 1 << 20)),
                held_mapping_bytes=rng.choice((200, 1 << 20, 1 << 20)),
                max_client_bytes=(1, 700, 1 << 30)[self.seed % 3],
                max_total_bytes=(500, 8 << 30)[self.seed % 2],
                max_client_request_bytes=(1, 400, 1 << 30)[self.seed // 6 % 3],
                max_total_request_bytes=(1 << 30, 600)[self.seed // 18 % 2],
            )  # fmt: skip
        for n, name in enumerate(self.workers):
            self._add(
                self._begin(), "start", name, role="worker",
                serves=self.models[n % len(self.models)],
                credits=rng.choice((1, 2, 2, 3)),
                max_mappings=rng.choice((1, 2, 16)),
                token_s=rng.choice((0.001, 0.004, 0.01)),
            )  # fmt: skip
        resend_s = rng.choice((0.3, 2.0, 5.0))
        for name in self.clients:
            self._add(
                self._begin(), "start", name, role="client",
                job=rng.choice(("", "job")), resend_s=resend_s,
            )  # fmt: skip

    def _begin(self) -> float:
        return 0.0 if self.rng.random() < 0.7 else self.rng.random() * 3.0

    def _ask(self, count: int) -> None:
        rng = self.rng
        burst_at = rng.random() * _SPAN_S
        several = len(self.models) > 1 and len(self.workers) > 1
        for label in range(1, count + 1):
            at = burst_at if rng.random() < 0.3 else rng.random() * _SPAN_S
            client = rng.choice(self.clients)
            nature = rng.choices(list(_NATURES), list(_NATURES.values()))[0]
            hurried = nature == "unmapped" or rng.random() < 0.25
            deadline_s = round(rng.uniform(0.2, 6.0), 3) if hurried else 90.0
            self._add(
                at, "submit", client, label=label, nature=nature,
                n_tokens=rng.choice((10, 50, 100, 200)),
                step=rng.randint(0, 5),
                model=rng.choice(self.models) if several else rng.choice(("", self.models[0])),
                mapping_id=self._mapping(nature),
                deadline_s=deadline_s,
            )  # fmt: skip
            if rng.random() < 0.1:
                self._add(at + rng.random() * 2.0, "cancel", client, label=label)
            if hurried and rng.random() < 0.2:
                self._away(client, at + deadline_s)

    def _mapping(self, nature: str) -> str:
        if nature == "unmapped":
            return "m-nobody-has-it"
        return self.rng.choice(MAPPING_IDS) if self.rng.random() < 0.4 else ""

    def _away(self, client: str, deadline: float) -> None:
        """The client cannot reach anyone when its request's time is up."""
        for broker in self.brokers:
            before_s, after_s = self.rng.random(), 3.0 * self.rng.random()
            at, for_s = max(0.0, deadline - before_s), round(before_s + after_s, 3)
            self._add(at, "partition", client, broker=broker, for_s=for_s)

    def _break(self, kind: str) -> None:
        rng = self.rng
        at = rng.random() * _SPAN_S
        peer = rng.choice(self.workers + self.clients)
        broker = rng.choice(self.brokers)
        anyone = rng.choice([peer, peer, broker])
        for_s = round(rng.choice((0.2, 1.0, 3.0, _LASTS_S)) * rng.random(), 3)
        if kind == "cut":
            self._add(at, kind, peer, broker=broker)
        elif kind == "half_open":
            self._add(at, kind, peer, broker=broker, deaf=rng.choice(("peer", "broker", "both")))
        elif kind == "partition":
            self._add(at, kind, peer, broker=broker, for_s=for_s)
        elif kind == "lag":
            self._add(
                at, kind, peer, broker=broker, factor=rng.choice((10, 100, 1000)), for_s=for_s
            )
        elif kind == "corrupt":
            where = [rng.choice(("header", "payload")) for _ in range(rng.randint(1, 3))]
            self._add(at, kind, peer, broker=broker, up=rng.random() < 0.5, where=where)
        elif kind == "crash":
            self._add(at, kind, anyone, down_s=for_s, quietly=rng.random() < 0.3)
        elif kind == "leave":
            self._add(at, kind, anyone, down_s=for_s)
        elif kind == "stop":
            self._add(at, kind, anyone, for_s=for_s)
        elif kind == "jump":
            self._add(at, kind, anyone, by_s=rng.choice((0.5, 3.0, 6.0, 30.0)))
        elif kind == "slow":
            self._add(at, kind, rng.choice(self.workers), factor=rng.choice((5, 20)), for_s=for_s)
        elif kind == "drain":
            self._add(at, kind, rng.choice(self.workers))
        elif kind == "twin":
            self._add(at, kind, peer)


#: What a request is like, and how often: see ``peers.Ask``.
_NATURES = {"ok": 88, "bad": 3, "failing": 3, "flaky": 3, "deadly": 3, "unmapped": 3}
#: How often each kind of fault is drawn.
_WEIGHTS = {
    "cut": 6,
    "half_open": 4,
    "partition": 5,
    "lag": 3,
    "corrupt": 3,
    "crash": 6,
    "leave": 2,
    "stop": 4,
    "jump": 2,
    "slow": 2,
    "drain": 2,
    "twin": 2,
}
#: Nothing that is a fault: some schedules have no other.
_CALM_WEIGHTS = {"drain": 2, "slow": 1}


def make(seed: int) -> Schedule:
    """The schedule of a seed; the same on every machine."""
    return _make_rude(seed) if seed >= FIRST_RUDE else _Maker(seed).make()


#: Seeds of schedules with bad manners begin here: a seed alone says which kind a schedule is.
FIRST_RUDE = 1 << 32
#: With bad manners, the honest are given so short work that each is served within seconds.
HONEST_ASK = {
    "n_tokens": 50, "nature": "ok", "model": "m", "mapping_id": "", "deadline_s": 90.0
}  # fmt: skip


def _room(rng: random.Random) -> dict[str, int]:
    """Limits of a broker that the rude never reach, or those that each of them does, while all of
    them together do not.
    """
    if rng.random() < 0.5:
        return {}
    return {
        "max_client_bytes": rng.choice((1, 2000, 100_000)),
        "max_total_bytes": 1_000_000,
        "max_client_request_bytes": rng.choice((1, 2000, 100_000)),
        "max_total_request_bytes": 1_000_000,
        "held_answer_bytes": rng.choice((0, 1000, 60_000)),
        "held_mapping_bytes": rng.choice((0, 100, 1000)),
    }


def _make_rude(seed: int) -> Schedule:
    """An honest pair, and crowds of rude peers that have models of their own."""
    rng = random.Random(seed)
    ops = [
        Op(0.0, "start", "b1", {"role": "broker", "window": rng.choice((1, 4, 16))} | _room(rng)),
        Op(
            0.0, "start", "w1",
            {"role": "worker", "serves": "m", "credits": rng.choice((1, 2)), "max_mappings": 2,
             "token_s": 0.001},
        ),
        Op(0.0, "start", "c1", {"role": "client", "job": "job", "resend_s": 2.0}),
    ]  # fmt: skip
    for _ in range(rng.choice((1, 1, 2))):
        how = {"seed": rng.getrandbits(30), "for_s": round(rng.uniform(1.0, _LASTS_S), 3)}
        ops.append(Op(round(rng.random() * 2.0, 3), "rude", "b1", how))
    for label in range(1, rng.randint(4, 12)):
        at = round(0.5 + rng.random() * _SPAN_S, 3)
        asked = HONEST_ASK | {"label": label, "step": label}
        ops.append(Op(at, "submit", "c1", asked))
    return Schedule(seed, ("b1",), tuple(sorted(ops, key=lambda op: op.at)))
