"""Wishes: one text for each, read as it is written, and nothing that cannot be served."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.protocol.wish import NAMES, Wish, WishError, parse_wish

_ROWS = st.none() | st.tuples(st.integers(0, 10**9), st.integers(1, 10**9)).map(
    lambda pair: (pair[0], pair[0] + pair[1])
)
_NAMED = st.builds(Wish, name=st.sampled_from(NAMES), rows=_ROWS)
_LAYERS = st.sets(st.integers(-1, 200), max_size=8).map(lambda ids: tuple(sorted(ids)))


@st.composite
def _in_parts(draw: st.DrawFn) -> Wish:
    layers, last = draw(_LAYERS), draw(st.booleans())
    over = draw(st.sampled_from(["", "probs", "topk"]))
    if not (layers or last or over):
        last = True
    return Wish(
        layers=layers,
        last=last,
        probs=over == "probs",
        topk=draw(st.integers(1, 10**6)) if over == "topk" else 0,
        fp8_states=bool(layers) and draw(st.booleans()),
        fp8_last=last and draw(st.booleans()),
        at_loss=bool(last or over) and draw(st.booleans()),
        rows=draw(_ROWS),
    )


WISHES = _NAMED | _in_parts()


@given(WISHES)
def test_a_wish_is_read_as_it_is_written(wish: Wish) -> None:
    assert parse_wish(str(wish)) == wish


@given(WISHES, st.randoms())
def test_the_order_of_parts_says_nothing(wish: Wish, shuffle: object) -> None:
    parts = str(wish).split(";")
    named = parts[:1] if wish.name else []
    rest = parts[len(named) :]
    shuffle.shuffle(rest)  # type: ignore[attr-defined]
    assert str(parse_wish(" ; ".join(named + rest))) == str(wish)


@given(st.text(max_size=60) | st.from_regex(r"[a-z]{1,6}(=[-0-9,a-z]{0,6})?(;[a-z0-9=,-]*)*"))
def test_any_text_is_a_wish_with_one_canonical_text_or_refused(text: str) -> None:
    try:
        wish = parse_wish(text)
    except WishError:
        return
    assert str(parse_wish(str(wish))) == str(wish)


def test_defaults_may_be_said() -> None:
    assert parse_wish("layers=1,2;states=target;last=target;at=all") == Wish(
        layers=(1, 2), last=True
    )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "''"),
        ("probability", "'probability' is no part"),
        ("layers=8,1,5", "write layers=1,5,8"),
        ("layers=1,1,5", "write layers=1,5"),
        ("layers=-2,3", "is not how layers is said"),
        ("layers=01", "is not how layers is said"),
        ("layers=1;last;last=fp8", "last is said twice"),
        ("layers=1;probs;topk=8", "choose"),
        ("topk=0", "is not how topk is said"),
        ("states=fp8;last", "none are asked for"),
        ("layers=1;last=fp4", "write last or last=fp8"),
        ("layers=1;at=loss", "come for all positions"),
        ("last;rows=8-8", "rows=8-8 is empty"),
        ("last;rows=9-8", "rows=9-8 is empty"),
        ("rows=0-8", "nothing is asked for"),
        ("hidden;last", "'hidden' is no part"),
        ("layers=" + "1" * 5000, "..."),
    ],
)
def test_what_is_no_wish_says_what_to_write(text: str, says: str) -> None:
    with pytest.raises(WishError) as refused:
        parse_wish(text)
    assert says in str(refused.value)
    assert len(str(refused.value)) < 600


def test_a_name_takes_rows_and_nothing_else() -> None:
    assert str(parse_wish("hidden;rows=0-512")) == str(parse_wish("hidden").within(0, 512))
    with pytest.raises(WishError, match="only rows"):
        Wish(name="hidden", last=True)
