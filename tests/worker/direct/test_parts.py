from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from worker.direct.parts import parts


@given(st.lists(st.integers(0, 50), max_size=8), st.integers(1, 20))
def test_parts_cover_every_byte_once_in_order(sizes: list[int], part_bytes: int) -> None:
    cut = parts(sizes, part_bytes)
    covered = [
        (piece.tensor, at)
        for part in cut
        for piece in part
        for at in range(piece.start, piece.stop)
    ]
    assert covered == [(number, at) for number, size in enumerate(sizes) for at in range(size)]
    lengths = [sum(piece.stop - piece.start for piece in part) for part in cut]
    assert all(length == part_bytes for length in lengths[:-1])
    assert all(0 < length <= part_bytes for length in lengths)
