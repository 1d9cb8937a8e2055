"""Layers that PyTorch does not have: the paper's two activations, sorting ones, and the normalisation of images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from locallip.bound.activations import Clip, ClippedMaxMin
from locallip.bound.sorting import SortedGroups


def _feature_shape(input_size: int | Sequence[int]) -> tuple[int, ...]:
    """(H,) or (C, H, W), whether or not a leading batch dimension of 1 was given."""
    shape = (input_size,) if isinstance(input_size, int) else tuple(input_size)
    if len(shape) in (2, 4) and shape[0] == 1:
        shape = shape[1:]
    if len(shape) not in (1, 3):
        raise ValueError(f"expected the shape (H,) or (C, H, W) of one image's activations, got {tuple(shape)}")
    return shape


class ReLU_x(nn.Module):
    """Clipped ReLU, min(max(x, 0), threshold), with one learnable threshold >= 0 per entry (paper, section 4).

    Args:
        input_size: (C, H, W) or (H,), with or without a leading 1 for the batch.
        init: start value of every threshold.
    """

    def __init__(self, input_size: int | Sequence[int], init: float = 1.0):
        super().__init__()
        self.threshold = nn.Parameter(torch.full((1, *_feature_shape(input_size)), float(init)))

    def forward(self, x: Tensor) -> Tensor:
        return Clip(0.0, self.threshold)(x)

    @torch.no_grad()
    def project(self) -> None:
        """Bring the thresholds back to what the layer's definition allows; to be called after an optimizer step."""
        self.threshold.clamp_(min=0)


class ClampGroupSort(nn.Module):
    """Clipped MaxMin: the channels split in halves a | b, out = [min(max(a, b), max), max(min(a, b), min)].

    Args:
        input_size: (C, H, W) or (H,) with C or H even, with or without a leading 1 for the batch.
        maxthres, minthres: start values of the learnable `max` and `min`, one each per entry of a half.
    """

    def __init__(self, input_size: int | Sequence[int], maxthres: float, minthres: float):
        super().__init__()
        channels, *rest = _feature_shape(input_size)
        if channels % 2:
            raise ValueError(f"clipped MaxMin pairs the channels, so their number must be even, got {channels}")
        self.min = nn.Parameter(torch.full((1, channels // 2, *rest), float(minthres)))
        self.max = nn.Parameter(torch.full((1, channels // 2, *rest), float(maxthres)))

    def forward(self, x: Tensor) -> Tensor:
        return ClippedMaxMin(self.min, self.max)(x)


class MaxMin(nn.Module):
    """The channels split in halves a | b, out = [max(a, b), min(a, b)]: it keeps the length of every gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] % 2:
            raise ValueError(f"MaxMin pairs the channels, so their number must be even, got {x.shape[1]}")
        a, b = x.chunk(2, dim=1)
        return torch.cat([torch.maximum(a, b), torch.minimum(a, b)], dim=1)


class GroupSort(nn.Module):
    """Every group of neighbouring channels sorted, the smallest first (Anil, Lucas and Grosse 2019).

    Args:
        group_size: number of channels in a group; that of all channels has to be a multiple of it.
    """

    def __init__(self, group_size: int):
        super().__init__()
        if group_size < 1:
            raise ValueError(f"a group needs at least one channel, got {group_size}")
        self.group_size = group_size

    def forward(self, x: Tensor) -> Tensor:
        return SortedGroups(self.group_size)(x)

    def extra_repr(self) -> str:
        return f"group_size={self.group_size}"


class Normalize(nn.Module):
    """(x - mean) / std for every channel, as a first layer; radii stay in the space before it.

    Args:
        mean, std: one number per channel, or one for all.
    """

    def __init__(self, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.register_buffer("mean", torch.as_tensor(mean, dtype=torch.get_default_dtype()).flatten())
        self.register_buffer("std", torch.as_tensor(std, dtype=torch.get_default_dtype()).flatten())
        if not ((self.std > 0).all() and self.mean.isfinite().all() and self.std.isfinite().all()):
            given = f"{self.mean.tolist()} and {self.std.tolist()}"
            raise ValueError(f"means must be finite numbers and standard deviations ones above 0, got {given}")
        if len(self.mean) != len(self.std) and 1 not in (len(self.mean), len(self.std)):
            raise ValueError(f"need as many means as standard deviations, got {len(self.mean)} and {len(self.std)}")

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean[:, None, None]) / self.std[:, None, None]
