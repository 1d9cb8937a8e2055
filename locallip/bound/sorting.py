"""An activation that sorts channels in groups of any size; `activations` has the one for pairs.

What it gives is a rearrangement of what it is given, so it keeps the length of every step that does not change the
order, and its constant is 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locallip.bound.activations import Activation


@dataclass(frozen=True, eq=False)
class SortedGroups(Activation):
    """Every group of neighbouring channels sorted, the smallest first.

    Attributes:
        group_size: channels in a group.
    """

    group_size: int
    elementwise = False
    rests = False
    rounding = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        if x.shape[1] % self.group_size:
            raise ValueError(f"{x.shape[1]} channels cannot be shared out in groups of {self.group_size}")
        return x.unflatten(1, (-1, self.group_size)).sort(dim=2).values.flatten(1, 2)

    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        return torch.ones_like(lower, dtype=torch.bool)  # without thresholds nothing rests
