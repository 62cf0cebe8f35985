"""The broker's memory under many clients, large replies, and clients that stop reading."""

from __future__ import annotations

from pathlib import Path

import pytest

from broker.protocol.limits import KIB, MIB
from tests.integration.memory import (
    BASE_BYTES,
    CONNECTION_BYTES,
    FULL,
    SMALL,
    Figures,
    Load,
    measure,
)

NO_LIMIT = 1 << 40


def served(load: Load, figures: Figures) -> None:
    """Clients that stop reading took nothing from the others."""
    assert figures.large_replies == load.readers * load.rounds
    assert figures.small_replies == load.clients


def test_the_brokers_memory_stays_within_the_formula() -> None:
    figures = measure(SMALL)
    assert figures.peak_bytes <= figures.formula_bytes
    assert figures.peak_bytes > SMALL.stalled * SMALL.reply_bytes  # it really had them
    served(SMALL, figures)


def test_without_the_limits_it_would_not() -> None:
    figures = measure(SMALL, max_client_bytes=NO_LIMIT, max_total_bytes=NO_LIMIT)
    assert figures.peak_bytes > 1.5 * figures.formula_bytes


@pytest.mark.heavy
def test_1000_clients_and_replies_of_256_mib_stay_within_the_formula() -> None:
    figures = measure(FULL)
    assert figures.peak_bytes <= figures.formula_bytes
    assert figures.connected_bytes <= BASE_BYTES + FULL.clients * CONNECTION_BYTES
    served(FULL, figures)


def test_the_formula_is_the_documented_one() -> None:
    document = (Path(__file__).parents[2] / "docs" / "memory.md").read_text()
    assert f"{BASE_BYTES // MIB} MiB + {CONNECTION_BYTES // KIB} KiB x connections" in document
