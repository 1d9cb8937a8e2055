"""Plain operations as layers: what a network does between its modules, such as `x + y` or `x.view(len(x), -1)`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from locallip.bound.selection import select

Number = float | Tensor


class Affine(nn.Module):
    """scale * x + shift, entry by entry.

    Args:
        scale, shift: numbers, or tensors that broadcast over one image's activations.
    """

    def __init__(self, scale: Number = 1.0, shift: Number = 0.0):
        super().__init__()
        self.scale, self.shift = scale, shift

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale + self.shift


class View(nn.Module):
    """The same entries of every image in the same order, in another shape. shape: of one image's."""

    def __init__(self, shape: torch.Size):
        super().__init__()
        self.shape = shape

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), *self.shape)


class Select(nn.Module):
    """Some of every image's entries, or 0, in another order. places: see `selection.places_of`."""

    def __init__(self, places: Tensor):
        super().__init__()
        self.places = places

    def forward(self, x: Tensor) -> Tensor:
        return select(x, self.places)


class Add(nn.Module):
    """The sum of several inputs of the same shape."""

    def forward(self, *inputs: Tensor) -> Tensor:
        return sum(inputs[1:], start=inputs[0])


class Extremum(nn.Module):
    """The larger or the smaller of two inputs, entry by entry: a part of MaxMin, see `ordering.with_maxmin`."""

    def __init__(self, larger: bool):
        super().__init__()
        self.larger = larger

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.maximum(a, b) if self.larger else torch.minimum(a, b)


class Concatenate(nn.Module):
    """Several inputs one behind the other. dim: along which, above 0, the images' being 0."""

    def __init__(self, dim: int):
        super().__init__()
        self.dim = dim

    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)
