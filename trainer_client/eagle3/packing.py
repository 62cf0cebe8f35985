"""Documents that follow one another in one row [1, N]: where each slot is, and what is next to it.

``lengths`` are the tokens of each document, and add up to N; of rows [B, T] they are empty. What is
made of packed documents is what each has alone: none attends to another, and positions restart.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from worker.targets.contract import shift_left

#: Of so many tokens attention costs more than it costs to be called.
_LONG = 256


def positions(like: Tensor, lengths: Sequence[int]) -> Tensor:
    """How far each slot of ``like`` [B, T] is from the beginning of its document; int64 [B, T]."""
    each = [torch.arange(n, device=like.device) for n in lengths or like.shape[1:]]
    return torch.cat(each).expand(like.shape)


def shifted(tensor: Tensor, lengths: Sequence[int]) -> Tensor:
    """[B, T, ...] moved left by one, with zeros at the end of each document."""
    if not lengths:
        return shift_left(tensor)
    return torch.cat([shift_left(each) for each in tensor.split(list(lengths), dim=1)], dim=1)


class Rows:
    """Documents that follow one another, as rows padded on the right.

    ``mask`` bool [D, L] is True where a row has no padding.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        of_each = torch.tensor(lengths).unsqueeze(1)
        column = torch.arange(max(lengths))
        self.mask = (column < of_each).to(device)
        self.n_tokens = sum(lengths)
        if len(lengths) == 1:
            return
        first = of_each.cumsum(0) - of_each
        #: what lies in each slot of the rows: at padding, the last of the document
        self._slots = (first + column.minimum(of_each - 1)).flatten().to(device)
        self._kept = (column < of_each).flatten().nonzero().squeeze(1).to(device)

    def of(self, tensor: Tensor) -> Tensor:
        """[1, heads, n, size] as [D, heads, L, size]."""
        if len(self.mask) == 1:
            return tensor
        return tensor[0].index_select(1, self._slots).unflatten(1, self.mask.shape).transpose(0, 1)

    def behind_one_another(self, tensor: Tensor) -> Tensor:
        """[D, heads, L, size] as [1, heads, n, size]."""
        if len(self.mask) == 1:
            return tensor
        return tensor.transpose(0, 1).flatten(1, 2).index_select(1, self._kept).unsqueeze(0)


class Parts:
    """Documents of one row [1, N] in a few groups: short ones of like length together, whose
    padding is cheap, and each long one alone.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device) -> None:
        groups: dict[tuple[int, int], list[int]] = {}
        for number, length in enumerate(lengths):
            key = (0, number) if length >= _LONG else (length.bit_length(), 0)
            groups.setdefault(key, []).append(number)
        self.rows = [Rows([lengths[n] for n in group], device) for group in groups.values()]
        slots = torch.arange(sum(lengths)).split(list(lengths))
        order = torch.cat([slots[n] for group in groups.values() for n in group])
        self._order = order.to(device)
        self._places = order.argsort().to(device)

    def of(self, tensor: Tensor) -> list[Tensor]:
        """[1, heads, N, size] as [D, heads, L, size] of each group."""
        groups = tensor.index_select(2, self._order).split([r.n_tokens for r in self.rows], dim=2)
        return [rows.of(group) for rows, group in zip(self.rows, groups, strict=True)]

    def whole(self, parts: Sequence[Tensor]) -> Tensor:
        """What :meth:`of` has taken apart, again [1, heads, N, size]."""
        groups = [r.behind_one_another(part) for r, part in zip(self.rows, parts, strict=True)]
        return torch.cat(groups, dim=2).index_select(2, self._places)
