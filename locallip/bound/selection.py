"""Moves of entries: slices, other orders, zeros at the border, copies. One operator is all of them.

What a function does to places is found by handing it the places' own numbers, so that nothing of what PyTorch's
functions do has to be written down a second time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from locallip.bound.operators import LinearOperator, Position


def places_of(move: Callable[[Tensor], Tensor], shape: torch.Size, device: torch.device, images: int = 2) -> Tensor:
    """Which of an image's entries, counted as they lie in memory, each output is; -1: it is 0.

    move: of a tensor (images, *shape), whatever `images` is unless it is given. shape: of one image's entries.

    Raises:
        ValueError: if an output is anything else, or images are mixed.
    """
    size = shape.numel()
    numbers = torch.arange(1, images * size + 1, dtype=torch.float64, device=device).view(images, *shape)
    moved = move(numbers)
    if moved.dim() < 2 or len(moved) != images:
        raise ValueError("mixes images; the first dimension must stay the batch")
    # No average and no constant but 0 keeps its place behind a function that is not linear and leaves 0 alone fixed.
    known = moved.dtype == numbers.dtype and torch.equal(move(_bent(numbers)), _bent(moved))
    if not known or not ((moved >= 0) & (moved <= numbers.numel())).all():
        raise ValueError("gives something else than entries of its input or 0")
    before = torch.arange(images, device=device).view(-1, *[1] * (moved.dim() - 1)) * size
    places = torch.where(moved == 0, -1, moved.long() - 1 - before)
    if not ((places >= -1) & (places < size) & (places == places[0])).all():
        raise ValueError("mixes images; the first dimension must stay the batch")
    return places[0]


def _bent(numbers: Tensor) -> Tensor:
    return -(numbers**3)


def select(x: Tensor, places: Tensor) -> Tensor:
    """The entries of x (N, ...) at those places (see `places_of`): (N, *places.shape)."""
    with_zero = F.pad(x.flatten(1), (1, 0))
    return with_zero.index_select(1, places.flatten() + 1).view(len(x), *places.shape)


class Selection(LinearOperator):
    """Every output is an entry of the input, or 0, times a number.

    weight: broadcasts over one image's outputs, with as many dimensions as these have. places: see `places_of`.
    """

    norm_bound_is_exact = True
    told_by_weight = True

    def __init__(
        self, places: Tensor, weight: Tensor, position: Position, shape: torch.Size, bias: Tensor | None = None
    ):
        self.places, self.weight, self.bias, self.position = places, weight, bias, position
        self.input_shape, self.output_shape = torch.Size(shape), places.shape

    @classmethod
    def of(cls, places: Tensor, position: Position, shape: torch.Size, like: Tensor) -> Selection:
        """The operator that changes no number. shape: of one image's input. like: of the network's dtype and device."""
        return cls(places.to(like.device), like.new_ones([1] * places.dim()), position, shape)

    def apply(self, x: Tensor) -> Tensor:
        return select(x, self.places) * self.weight

    def adjoint(self, y: Tensor) -> Tensor:
        sums = y.new_zeros(len(y), 1 + self.input_shape.numel())
        sums = sums.index_add(1, self.places.flatten() + 1, (y * self.weight).flatten(1))
        return sums[:, 1:].reshape(len(y), *self.input_shape)

    def affine(self, x: Tensor) -> Tensor:
        return (
            self.apply(x) if self.bias is None else self.apply(x) + self.bias.view(-1, *[1] * (self.places.dim() - 1))
        )

    def absolute(self, x: Tensor) -> Tensor:
        return select(x, self.places) * self.weight.abs()

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return (select(x, self.places) * y).sum(dim=0).sum_to_size(self.weight.shape)

    def geometry(self) -> tuple:
        return (self._bytes,)

    @cached_property
    def _bytes(self) -> bytes:
        return self.places.cpu().numpy().tobytes()

    def row_norms(self) -> Tensor:
        return self.weight.abs() * (self.places >= 0)

    @property
    def terms(self) -> tuple[int, int]:
        copies = self.places[self.places >= 0].bincount(minlength=1)
        return 1, max(1, int(copies.max()))

    def norm_bound(self) -> Tensor:
        """The norm itself: the columns of W are orthogonal."""
        squares = self.adjoint(self.weight.expand(1, *self.output_shape))
        return squares.amax().sqrt()
