"""The vocab mappings that every simulated client can offer."""

from __future__ import annotations

from broker.protocol import Packet
from tests.broker.core.rig import mapping_offer

MAPPINGS: tuple[Packet, ...] = tuple(mapping_offer(n, n + 1, n + 2) for n in range(3))
MAPPING_IDS: tuple[str, ...] = tuple(p.message.mapping_id for p in MAPPINGS)  # type: ignore[union-attr]
