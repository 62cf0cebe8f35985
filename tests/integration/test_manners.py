"""A broker with CURVE beside peers with bad manners: it lives, and the honest are served."""

from __future__ import annotations

import pytest

from tests.bench.manners import FORMULA_BYTES, cluster
from tests.bench.rude_peer import SEQUENCES

_SECONDS = 3.0


@pytest.mark.slow
def test_an_honest_pair_is_answered_throughout() -> None:
    """One after the other at one broker, so that what each leaves behind adds up."""
    with cluster() as there:
        for sequence in SEQUENCES:
            seen = there.beside(sequence, _SECONDS)
            assert seen.said, sequence
            assert seen.p99_s < 1.0, (sequence, seen)
            assert seen.peak_bytes < FORMULA_BYTES, (sequence, seen)
            assert seen.log_bytes < _SECONDS * (1 << 20), (sequence, seen)
