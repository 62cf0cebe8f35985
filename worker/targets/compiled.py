"""Decoder layers as code that torch.compile makes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from broker.logs import log
from worker.errors import TargetError

_logger = logging.getLogger("draftmq.worker")

#: Rows, and tokens of padding: each is code of its own (torch makes one row a special case, and
#: without padding there is no mask), for every number of tokens and for every number of rows
#: from two on. No tensor of a layer is likely to have a dimension of 3 or 11, which would be taken
#: to be the same.
_KINDS, _TOKENS = ((1, 0), (3, 0), (1, 2), (3, 2)), 11


class CompiledLayers:
    """Layers whose forward is compiled, until :meth:`remove`; nothing is made before it is run.

    The layers and not the model: what hooks on them see, the choice of the attention mask and the
    head stay as they are, and equal layers share their code.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self._before = [(layer, vars(layer).get("forward")) for layer in layers]
        for layer in layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)

    def remove(self) -> None:
        """Run the layers as they were."""
        for layer, forward in self._before:
            del layer.forward
            if forward is not None:  # an instance's own, as accelerate sets it
                layer.forward = forward


def warm_up(name: str, run: Callable[[Tensor, Tensor], Any]) -> None:
    """``run`` token ids and attention mask, each [B, T], so that no request waits for a compiler.

    Raises :class:`TargetError` in one sentence where the compiler fails.
    """
    began = time.monotonic()
    for number, (rows, padding) in enumerate(_KINDS, start=1):
        log(_logger, "info", "compiling", {"target": name, "part": number, "of": len(_KINDS)})
        ids = torch.ones(rows, _TOKENS, dtype=torch.int64)
        mask = torch.ones_like(ids)
        mask[-1, _TOKENS - padding :] = 0
        try:
            with torch.inference_mode():  # as requests run: else they would be compiled anew
                run(ids, mask)
        except Exception as error:
            reason = " ".join(str(error).partition("\n\n")[0].split()) or type(error).__name__
            raise TargetError(
                f"cannot compile target {name!r} ({reason}); see that torch.compile works here "
                "(on a CPU it needs a C++ compiler, such as g++), or leave --compile away"
            ) from error
    seconds = round(time.monotonic() - began, 1)
    log(_logger, "info", "compiled", {"target": name, "seconds": seconds})
