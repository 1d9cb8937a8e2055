"""Moves of entries: slices, other orders, zeros at the border, copies. One operator is all of them.

What a function does to places is found by handing it the places' own numbers, so that nothing of what PyTorch's
functions do has to be written down a second time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from locallip.bound.operators import LinearOperator, Position

Moved = Tensor | Sequence[Tensor]

# In which a user's network may compute.
_PRECISIONS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
_NO_MOVE = "gives something else than entries of its input or 0"
_MIXES = "mixes images; the first dimension must stay the batch"


def places_of(
    move: Callable[[Tensor], Moved], shape: torch.Size, like: Tensor, images: int = 2, rounds: bool = False
) -> list[Tensor]:
    """Which of an image's entries, counted as they lie in memory, each output is; -1: it is 0.

    One tensor for each that `move` gives, of the shape that one image has there.

    Args:
        move: of a tensor (N, *shape).
        shape: of one image's entries.
        like: a tensor on the device in question.
        images: N, where the function was made for one number of images.
        rounds: whether the function computes places in the precision of what it moves; it must come to the same in all.

    Raises:
        ValueError: if an output is anything else, or images are mixed.
    """
    numbers = torch.arange(1, images * shape.numel() + 1, dtype=torch.float64, device=like.device)
    found = [_places(moved, len(numbers)) for moved in _several(move(numbers.view(images, *shape)))]
    chance = torch.rand(len(numbers), generator=torch.Generator().manual_seed(0), dtype=torch.float64, device="cpu")
    for dtype in _PRECISIONS if rounds else _PRECISIONS[:1]:
        x = chance.to(like.device, dtype)
        for moved, places in zip(_several(move(x.view(images, *shape))), found, strict=True):
            if not torch.equal(moved, select(x[None], places)[0]):
                raise ValueError(_NO_MOVE)
    return [_of_one(places, images, shape.numel()) for places in found]


def _several(moved: Moved) -> Sequence[Tensor]:
    return (moved,) if isinstance(moved, Tensor) else moved


def _places(moved: Tensor, count: int) -> Tensor:
    """The places of entries that are their own numbers, from 1 on."""
    if not ((moved >= 0) & (moved <= count)).all():
        raise ValueError(_NO_MOVE)
    return moved.long() - 1


def _of_one(places: Tensor, images: int, size: int) -> Tensor:
    """The places in one image, from those in all of them."""
    if places.dim() == 0 or len(places) != images:
        raise ValueError(_MIXES)
    if places.dim() == 1:
        raise ValueError("leaves one number of every image; keep its dimension")
    before = torch.arange(images, device=places.device).view(-1, *[1] * (places.dim() - 1)) * size
    own = torch.where(places < 0, -1, places - before)
    if not ((own >= -1) & (own < size) & (own == own[0])).all():
        raise ValueError(_MIXES)
    return own[0]


def select(x: Tensor, places: Tensor) -> Tensor:
    """The entries of x (N, ...) at those places (see `places_of`): (N, *places.shape)."""
    with_zero = F.pad(x.flatten(1), (1, 0))
    return with_zero.index_select(1, places.flatten() + 1).view(len(x), *places.shape)


class Selection(LinearOperator):
    """Every output is an entry of the input, or 0, times a number.

    weight: broadcasts over one image's outputs, with as many dimensions as these have. places: see `places_of`.
    """

    norm_bound_is_exact = True

    def __init__(self, places: Tensor, weight: Tensor, position: Position, shape: torch.Size):
        self.places, self.weight, self.bias, self.position = places, weight, None, position
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
        return (self._digest,)

    @cached_property
    def _digest(self) -> bytes:
        return hashlib.sha256(self.places.cpu().numpy().tobytes()).digest()

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
