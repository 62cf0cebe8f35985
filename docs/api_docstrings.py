"""For the API reference: a role of Sphinx in a docstring is shown as the name that it names."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":\w+:`~?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Shows ``:class:`Broker``` as code."""

    def on_instance(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = _ROLE.sub(r"`\1`", obj.docstring.value)
