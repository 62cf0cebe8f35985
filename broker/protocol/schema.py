"""From a dataclass's annotations to a check of plain values, in both directions.

A record travels as the array of its fields, in order. :func:`codec` compiles, once per class, how
to make that array and how to make the record again from an array that a stranger sent; either way
each value must be of exactly the annotated type and within the limits.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import reprlib
import types
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from broker.protocol.bounds import Bound, BoundError
from broker.protocol.limits import MAX_ITEMS, MAX_STRING_BYTES

Check = Callable[[Any], Any]


class SchemaError(ValueError):
    """A value does not fit its field; the text says which, and why."""


@dataclasses.dataclass(frozen=True)
class Codec:
    """How one record class becomes an array of plain values, and back."""

    cls: type
    to_plain: Check
    from_plain: Check


def _integer(value: Any) -> int:
    if type(value) is not int or not -(1 << 63) <= value < 1 << 64:
        raise SchemaError(f"wants an integer of 64 bits, got {_shown(value)}")
    return value


def _number(value: Any) -> float:
    if type(value) is not float or not math.isfinite(value):
        raise SchemaError(f"wants a finite float, got {_shown(value)}")
    return value


def _boolean(value: Any) -> bool:
    if type(value) is not bool:
        raise SchemaError(f"wants a bool, got {_shown(value)}")
    return value


def _string(value: Any) -> str:
    if type(value) is not str:
        raise SchemaError(f"wants a string, got {_shown(value)}")
    if len(value) > MAX_STRING_BYTES:
        raise SchemaError(f"has {len(value)} characters, the limit is {MAX_STRING_BYTES}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise SchemaError("has half of a surrogate pair, which is no text") from None
    return value


_TYPE_SAYS_ALL = (_integer, _boolean, _string)
_SHORT = reprlib.Repr()  # also of what is nested a thousand times
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxother = 3, 80, 80
_SCALARS: dict[type, Check] = {int: _integer, float: _number, bool: _boolean, str: _string}


def _shown(value: Any) -> str:
    text = f"{type(value).__name__} {_SHORT.repr(value)}"
    return text if len(text) <= 80 else text[:77] + "..."


def _items(check: Check, make: type) -> Check:
    def items(value: Any) -> Any:
        if type(value) not in (tuple, list):
            raise SchemaError(f"wants a sequence, got {_shown(value)}")
        if len(value) > MAX_ITEMS:
            raise SchemaError(f"has {len(value)} items, the limit is {MAX_ITEMS}")
        return make(map(check, value))

    return items


def _or_nil(check: Check) -> Check:
    return lambda value: None if value is None else check(value)


def _of_optional(annotation: Any) -> Any:
    """``X`` of ``X | None``; None of anything else."""
    arguments = typing.get_args(annotation)
    if len(arguments) != 2 or arguments[1] is not types.NoneType:
        return None
    return arguments[0]


def _bounded(check: Check, bound: Bound) -> Check:
    def checked(value: Any) -> Any:
        try:
            return check(bound.check(value)) if type(value) is bound.of else check(value)
        except BoundError as error:
            raise SchemaError(str(error)) from None

    return checked


def _checks(annotation: Any) -> tuple[Check, Check]:
    """``(to_plain, from_plain)`` for one annotation."""
    if typing.get_origin(annotation) is Annotated:
        plain, bound = typing.get_args(annotation)
        to_plain, from_plain = _checks(plain)
        return _bounded(to_plain, bound), _bounded(from_plain, bound)
    if annotation in _SCALARS:
        return _SCALARS[annotation], _SCALARS[annotation]
    if _is_record(annotation):
        nested = codec(typing.cast(type, annotation))
        return nested.to_plain, nested.from_plain
    arguments = typing.get_args(annotation)
    if typing.get_origin(annotation) is tuple and arguments[1:] == (Ellipsis,):
        to_plain, from_plain = _checks(arguments[0])
        return _items(to_plain, list), _items(from_plain, tuple)
    if (inner := _of_optional(annotation)) is not None:
        to_plain, from_plain = _checks(inner)
        return _or_nil(to_plain), _or_nil(from_plain)
    raise TypeError(f"the protocol has no encoding for {annotation!r}")


def _is_record(annotation: Any) -> bool:
    return dataclasses.is_dataclass(annotation) or hasattr(annotation, "_fields")


def field_names(cls: type) -> list[str]:
    """Of a dataclass or a named tuple."""
    if not dataclasses.is_dataclass(cls):
        return list(cls._fields)  # type: ignore[attr-defined]
    return [field.name for field in dataclasses.fields(cls)]


@functools.cache
def codec(cls: type) -> Codec:
    """The codec of a record class; its checks raise :class:`SchemaError`."""
    hints = typing.get_type_hints(cls, include_extras=True)
    names = field_names(cls)
    pairs = [_checks(hints[name]) for name in names]
    out, back = [pair[0] for pair in pairs], [pair[1] for pair in pairs]

    def checked(checks: list[Check], values: Sequence[Any]) -> list[Any]:
        try:
            return [check(value) for check, value in zip(checks, values, strict=True)]
        except SchemaError:  # once more, to say where
            for name, check, value in zip(names, checks, values, strict=True):
                try:
                    check(value)
                except SchemaError as error:
                    raise SchemaError(f"{cls.__name__}.{name} {error}") from None
            raise

    def to_plain(record: Any) -> list[Any]:
        if type(record) is not cls:
            raise SchemaError(f"wants a {cls.__name__}, got {_shown(record)}")
        return checked(out, [getattr(record, name) for name in names])

    # Of most values nothing but the type is left to check: msgpack's integers have 64 bits, and
    # its strings are bounded where they are unpacked.
    deep = [(at, check) for at, check in enumerate(back) if check not in _TYPE_SAYS_ALL]
    good: set[tuple[type, ...]] = set()  # the types of arrays that were checked: not many

    def from_plain(values: Any) -> Any:
        if type(values) is not list:
            raise SchemaError(f"{cls.__name__} wants an array, got {_shown(values)}")
        if len(values) != len(back):
            raise SchemaError(f"{cls.__name__} has {len(back)} fields, got {len(values)}")
        kinds = tuple(map(type, values))
        if kinds not in good:
            checked(back, values)
            good.add(kinds)
        made = values.copy()
        for at, check in deep:
            try:
                made[at] = check(values[at])
            except SchemaError as error:
                raise SchemaError(f"{cls.__name__}.{names[at]} {error}") from None
        return cls(*made)

    return Codec(cls, to_plain, from_plain)


def describe(annotation: Any) -> str:
    """An annotation in the words of ``PROTOCOL.md``."""
    if typing.get_origin(annotation) is Annotated:
        plain, bound = typing.get_args(annotation)
        return f"{describe(plain)}, {bound.words}"
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return annotation.__name__
    if (inner := _of_optional(annotation)) is not None:
        return f"{describe(inner)}, or nil"
    return f"array of {describe(typing.get_args(annotation)[0])}"
