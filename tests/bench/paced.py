"""Targets of known speed, for ``draftmq worker --target-factory tests.bench.paced:fast``.

They wait for so long a token and compute next to nothing, so that a pool of them, a broker and the
ranks of a training fit on two cores, and what they could do together is known.
"""

from __future__ import annotations

from worker.targets.stub import StubTarget

#: Of one request: B=1.
TOKENS = 512
#: A forward of a request, as a large target takes on one GPU.
FAST_S = 0.1
#: The slow one: an older GPU, or one that others use too.
SLOW_S = 4 * FAST_S
#: Short, so that many replies come in a second.
BRISK_S = FAST_S / 2
#: Of a request, by factory.
SECONDS = {"brisk": BRISK_S, "fast": FAST_S, "slow": SLOW_S}


def brisk() -> StubTarget:
    return _paced(BRISK_S)


def fast() -> StubTarget:
    return _paced(FAST_S)


def slow() -> StubTarget:
    return _paced(SLOW_S)


def _paced(request_s: float) -> StubTarget:
    return StubTarget(name="paced", s_per_token=request_s / TOKENS)
