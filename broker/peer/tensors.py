"""Tensors to payload frames and back. The broker never imports this: it needs torch.

Going out, frames are views of the tensor's own memory and keep it alive. Coming in, each frame is
copied once, to its place in a tensor that owns its memory and may be written to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from broker.peer.parts import Assembly
from broker.protocol.errors import LocalProtocolError
from broker.protocol.limits import MIB
from broker.protocol.messages import DTYPE_BYTES, TensorSpec
from broker.protocol.wire import Buffer, Packet

#: Smaller frames cost the broker more for each byte, larger ones leave the caches
#: (docs/decisions/0008-wire-path.md, 0012-replies-in-parts.md).
FRAME_BYTES = 2 * MIB

_TORCH: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}
#: What travels, by its name in a manifest.
NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in _TORCH.items()}


def to_frames(
    tensors: Mapping[str, torch.Tensor], frame_bytes: int = FRAME_BYTES
) -> tuple[tuple[TensorSpec, ...], list[Buffer]]:
    """``(manifest, payload)`` of named tensors. CPU tensors that are contiguous are not copied.

    Raises :class:`LocalProtocolError` for a dtype that does not travel.
    """
    manifest, payload = [], []
    for name, tensor in tensors.items():
        if tensor.dtype not in NAMES:
            raise LocalProtocolError(
                f"tensor {name!r} has dtype {tensor.dtype}; what travels is {', '.join(_TORCH)}"
            )
        flat = tensor.detach().cpu().contiguous().view(-1)
        octets = memoryview(flat.view(torch.uint8).numpy().data)
        frames = [octets[at : at + frame_bytes] for at in range(0, octets.nbytes, frame_bytes)]
        manifest.append(TensorSpec(name, NAMES[tensor.dtype], tuple(tensor.shape), len(frames)))
        payload += frames
    return tuple(manifest), payload


def from_packet(packet: Packet) -> dict[str, torch.Tensor]:
    """The tensors of a message that has them as its payload, on the CPU, in the manifest's order.

    Raises :class:`RemoteProtocolError` for a damaged frame.
    """
    manifest: tuple[TensorSpec, ...] = getattr(packet.message, "manifest", ())
    assembly = Assembly(manifest)
    assembly.add(packet)
    return from_octets(manifest, assembly.octets)


def from_octets(
    manifest: Sequence[TensorSpec], octets: Sequence[NDArray[np.uint8]]
) -> dict[str, torch.Tensor]:
    """Bytes, uint8 [nbytes] each, as the tensors of a manifest; nothing is copied."""
    pairs = zip(manifest, octets, strict=True)
    return {spec.name: shaped(torch.from_numpy(each), spec) for spec, each in pairs}


def shaped(octets: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    """Bytes, uint8 [nbytes], as the tensor that the manifest says they are."""
    if not spec.nbytes:
        return torch.empty(spec.shape, dtype=_TORCH[spec.dtype], device=octets.device)
    return octets.view(_TORCH[spec.dtype]).view(spec.shape)
