"""Pooling: averages as linear operators, maxima as activations that mix entries, and the windows that both go over.

A window is a product of windows along the axes, so that everything about windows is found axis by axis. Along an axis
they are a list with the places of the input that each sees.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain

import torch
from torch import Tensor

from locallip.bound.activations import Activation
from locallip.bound.operators import LinearOperator, Position

Windows = list[list[int]]


def sliding_windows(size: int, count: int, kernel: int, stride: int, padding: int, dilation: int = 1) -> Windows:
    """The windows of a kernel along an axis with `size` places; what lies in the padding is left out."""
    starts = range(-padding, count * stride - padding, stride)
    return [[at for at in range(s, s + dilation * kernel, dilation) if 0 <= at < size] for s in starts]


def adaptive_windows(size: int, count: int) -> Windows:
    """The windows that share `size` places out among `count` outputs, as PyTorch's adaptive pooling does."""
    return [list(range(number * size // count, -(-(number + 1) * size // count))) for number in range(count)]


def most_shared(windows: Windows) -> int:
    """The largest number of windows that see the same place."""
    return max(Counter(chain.from_iterable(windows)).values(), default=0)


def averages(windows: Windows, size: int, like: Tensor, terms: Sequence[int] | None = None) -> Tensor:
    """The matrix (windows, size) of the averages over windows along an axis.

    terms: by how much each sum is divided; None: by the number of places that the window sees.
    """
    matrix = like.new_zeros(len(windows), size)
    for number, window in enumerate(windows):
        matrix[number, window] = 1 / (len(window) if terms is None else terms[number])
    return matrix


class AveragePool(LinearOperator):
    """Averages over windows, and the same factor for all entries of a channel.

    weight: (C, 1) the factors, bias: (C,) or None, axes: for each axis behind the channels, a matrix (outputs, inputs)
    without negative entries that it is multiplied by.
    """

    def __init__(self, axes: Sequence[Tensor], channels: int, position: Position):
        self.axes, self.position = tuple(axes), position
        self.weight, self.bias = axes[0].new_ones(channels, 1), None
        self.input_shape, self.output_shape = (
            torch.Size([channels, *(axis.shape[side] for axis in axes)]) for side in (1, 0)
        )

    def _factors(self, weight: Tensor) -> Tensor:
        return weight.view(-1, *[1] * len(self.axes))

    def _pool(self, x: Tensor, transposed: bool = False) -> Tensor:
        for number, axis in enumerate(self.axes):
            matrix = (axis.T if transposed else axis).to(x.dtype)
            x = torch.tensordot(x, matrix, dims=([2 + number], [1])).movedim(-1, 2 + number)
        return x

    def apply(self, x: Tensor) -> Tensor:
        return self._pool(x) * self._factors(self.weight)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._pool(y * self._factors(self.weight), transposed=True)

    def affine(self, x: Tensor) -> Tensor:
        return self.apply(x) if self.bias is None else self.apply(x) + self._factors(self.bias)

    def absolute(self, x: Tensor) -> Tensor:
        return self._pool(x) * self._factors(self.weight.abs())

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return (self._pool(x) * y).transpose(0, 1).flatten(1).sum(dim=1, keepdim=True)

    def row_norms(self) -> Tensor:
        norms = self._factors(self.weight.abs())
        for number, axis in enumerate(self.axes):
            norms = norms * axis.norm(dim=1).to(norms.dtype).view(-1, *[1] * (len(self.axes) - 1 - number))
        return norms

    @property
    def terms(self) -> tuple[int, int]:
        return tuple(math.prod(int((axis != 0).sum(dim=side).max()) for axis in self.axes) for side in (1, 0))

    def norm_bound(self) -> Tensor:
        return self.weight.abs().max() * math.prod(torch.linalg.matrix_norm(axis, ord=2) for axis in self.axes)

    def geometry(self) -> tuple:
        return tuple(tuple(map(tuple, axis.tolist())) for axis in self.axes)


@dataclass(frozen=True, eq=False)
class MaxPool(Activation):
    """The largest entry of each window.

    A change d_i of an entry changes those outputs whose windows see it, and each by no more than the largest change in
    its window. So the squares of all changes add up to no more than n ||d||^2, if no entry is in more than n windows;
    an entry that is the largest of n windows by far attains it.

    Attributes:
        function: of a tensor (N, C, ...).
        windows: along each axis behind the channels.
    """

    function: Callable[[Tensor], Tensor]
    windows: Sequence[Windows]
    elementwise = False
    rounding = 0.0

    @cached_property
    def lipschitz(self) -> float:
        """The square root of the largest number of windows that share an entry."""
        return math.sqrt(math.prod(most_shared(windows) for windows in self.windows))

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def shape_behind(self, shape: torch.Size) -> torch.Size:
        return torch.Size([shape[0], *map(len, self.windows)])

    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self(lower) != self(upper)
