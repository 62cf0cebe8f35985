"""What every test has: one thread for torch, and a check that it left nothing open."""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Iterator

import pytest
import torch
import zmq
from zmq.utils.garbage import gc as zero_copy  # pyzmq's own, one for the process

torch.set_num_threads(1)
#: Tests and what they start keep their tokens apart from this user's.
_cache = tempfile.TemporaryDirectory(prefix="draftmq-tokens-")
os.environ["DRAFTMQ_DATA_CACHE"] = _cache.name

_contexts: weakref.WeakSet[zmq.Context] = weakref.WeakSet()
_begin = zmq.Context.__init__


def _tracked(self: zmq.Context, *args: object, **options: object) -> None:
    _begin(self, *args, **options)
    _contexts.add(self)


zmq.Context.__init__ = _tracked  # type: ignore[method-assign]


@pytest.fixture(autouse=True)
def _nothing_left_open() -> Iterator[None]:
    """Fail a test that leaves a ZeroMQ context or one of our threads behind."""
    yield
    ours = [context for context in _contexts if context is not zero_copy._context]
    left = [repr(context) for context in ours if not context.closed]
    left += [t.name for t in threading.enumerate() if t.name.startswith("draftmq-")]
    assert not left, f"left open: {left}"
