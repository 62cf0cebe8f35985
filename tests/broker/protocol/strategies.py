"""Hypothesis strategies for any message, made from the annotations that the codec itself reads."""

from __future__ import annotations

import dataclasses
import typing

import numpy as np
from hypothesis import strategies as st

from broker.protocol import messages as m
from broker.protocol.wire import KINDS

_SCALARS = {
    int: st.integers(min_value=-(1 << 63), max_value=(1 << 64) - 1),
    float: st.floats(allow_nan=False, allow_infinity=False),
    bool: st.booleans(),
    str: st.text(max_size=20),
}


def record(cls: type) -> st.SearchStrategy:
    """Any value of a record class, but with an empty manifest, and without a payload to come."""
    hints = typing.get_type_hints(cls, include_extras=True)
    fields = {name: _value(annotation) for name, annotation in hints.items() if name != "KIND"}
    if "manifest" in fields:
        fields["manifest"] = st.just(())
    if "parts" in fields:
        fields["parts"] = st.just(0)
    return st.builds(cls, **fields)


def _value(annotation: object) -> st.SearchStrategy:
    if typing.get_origin(annotation) is typing.Annotated:
        plain, bound = typing.get_args(annotation)
        if plain is str:
            return _value(plain)
        return (st.integers if plain is int else st.floats)(bound.least, bound.most)
    if annotation in _SCALARS:
        return _SCALARS[annotation]
    if dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields"):
        return record(annotation)
    (item, other) = typing.get_args(annotation)
    if other is type(None):
        return st.none() | _value(item)
    return st.lists(_value(item), max_size=4).map(tuple)


#: All but parts, which are nothing without a payload.
messages = st.one_of([record(cls) for cls in KINDS.values() if cls is not m.Part])


@st.composite
def tensors(draw: st.DrawFn) -> dict[str, tuple[str, np.ndarray]]:
    """Named arrays of every dtype and of ranks 0 to 4, empty ones among them."""
    names = draw(st.lists(st.text(min_size=1, max_size=8), unique=True, max_size=4))
    drawn = {}
    for name in names:
        dtype = draw(st.sampled_from(sorted(m.DTYPE_BYTES)))
        shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
        nbytes = m.DTYPE_BYTES[dtype] * int(np.prod(shape, dtype=int))
        octets = np.frombuffer(draw(st.binary(min_size=nbytes, max_size=nbytes)), np.uint8)
        drawn[name] = (dtype, octets.reshape(-1), shape)
    return drawn
