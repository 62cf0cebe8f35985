"""Whole conversations over a minute of a broker's time, as functions of bytes.

The bytes are the luck of a crowd of rude peers of the simulation (:mod:`tests.sim.rude`): who comes
and who is cut off, what each says, how much time passes. Beside them an honest pair of another
model asks and is answered, whose connections the bytes may cut as well. All invariants of the
simulation hold after every event, and nothing is left when everybody has gone.
"""

from __future__ import annotations

import random

from tests.sim.schedule import HONEST_ASK, Op, Schedule
from tests.sim.world import World

#: Core time of a conversation.
SPAN_S = 60.0
_ASKS = 12


class Told(random.Random):
    """Luck that is read from bytes; where they end, every number is zero."""

    def __init__(self, data: bytes) -> None:
        super().__init__()
        self._data = data
        self._at = 0

    def random(self) -> float:
        return self.getrandbits(16) / 65536

    def getrandbits(self, k: int, /) -> int:
        n_bytes = -(-k // 8)
        taken = self._data[self._at : self._at + n_bytes]
        self._at += n_bytes
        return int.from_bytes(taken, "little") & ((1 << k) - 1)


def talk(data: bytes) -> None:
    """Raises :class:`tests.sim.violation.InvariantError`, or what a core raised."""
    World(_schedule(Told(data))).run()


def _schedule(luck: Told) -> Schedule:
    worker = {"serves": "m", "credits": 1, "max_mappings": 2, "token_s": 0.001}
    ops = [
        Op(0.0, "start", "b1", {"role": "broker", "window": 4}),
        Op(0.0, "start", "w1", {"role": "worker"} | worker),
        Op(0.0, "start", "c1", {"role": "client", "job": "job", "resend_s": 2.0}),
        Op(0.1, "rude", "b1", {"seed": 0, "for_s": SPAN_S, "luck": luck}),
    ]
    for label in range(1, _ASKS):
        at = 0.5 + label * SPAN_S / _ASKS
        ops.append(Op(at, "submit", "c1", HONEST_ASK | {"label": label, "step": label}))
    for _ in range(luck.getrandbits(8) % 4):  # mostly none, then the honest have to be quick
        if luck.random() < 0.5:
            at, who = SPAN_S * luck.random(), luck.choice(("c1", "w1"))
            ops.append(Op(at, "cut", who, {"broker": "b1"}))
    return Schedule(0, ("b1",), tuple(sorted(ops, key=lambda op: op.at)))
