"""Regions: a ball and a box around the activations of an image, in the forms that make them cheap to move.

A region is a ball's centre and a box, (N, ...) each. Which form it has says how it came about, and what the next layer
can save.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from locallip.bound.operators import LinearOperator
from locallip.bound.tensors import ForEveryImage, per_image, underflows


class Region:
    """A ball's centre and a box, the box given by its ends.

    Attributes:
        center, lower, upper: centre of the ball, ends of the box; (N, ...) each.
        stack: (2N, ...) the centre and the middle of the box, so that a linear layer takes one call for both; (N, ...)
            if they are the same.
        half: half-width of the box; (N, 1, ...) if it is the same for all entries.
        lost: (N,) bool, where underflow may have made the box a point, which would seem not to vary; None: nowhere.
    """

    lost: Tensor | None = None

    def __init__(self, center: Tensor, lower: Tensor, upper: Tensor):
        self.center, self.lower, self.upper = center, lower, upper

    @cached_property
    def stack(self) -> Tensor:
        return torch.cat([self.center, (self.upper + self.lower) / 2])

    @cached_property
    def half(self) -> Tensor:
        return (self.upper - self.lower) / 2

    def map(self, monotone: Callable[[Tensor], Tensor]) -> Region:
        """The region behind a monotone function."""
        return Region(monotone(self.center), monotone(self.lower), monotone(self.upper))

    def reshape(self, shape: Callable[[Tensor], Tensor]) -> Region:
        """The region with its entries renamed."""
        return self.map(shape)

    def widened(self, by: Tensor | float) -> Region:
        """The region with a box that is larger by so much on every side; by: (N, ...) or a number."""
        if not isinstance(by, Tensor) and by == 0:
            return self
        return Region(self.center, self.lower - by, self.upper + by)

    def of_radius(self, radius: Tensor) -> Region:
        """The region with a ball of that radius (N,), which only a `Point` keeps."""
        return self

    def behind(self, operator: LinearOperator, radius: Tensor, rounding: Tensor | float) -> Region:
        """The region behind a linear layer, but for the radius.

        radius: (N,) of the ball before it. rounding: by how much any sum can be off.
        """
        radius, rows = radius.view(-1, *[1] * len(operator.output_shape)), operator.row_norms()
        reach = radius * rows
        factors = radius, rows
        stack, half = self.stack, self.half
        if half.shape[1:] == operator.input_shape:
            half = operator.absolute(half)
        else:
            row = operator.absolute(half.new_ones(1, *operator.input_shape))
            if row.dim() == 4:
                row = row.contiguous(memory_format=torch.channels_last)  # the order of `fused`
            half = ForEveryImage.apply(row, half.view(-1, *[1] * len(operator.output_shape)))
        if isinstance(rounding, Tensor) or rounding:  # a sum with 0 would be a pass over memory
            half, reach = half + rounding, reach + rounding
        return UncutRegion(operator.affine(stack), half, reach, factors)


class CenteredRegion(Region):
    """The same, given by stack and half-width."""

    def __init__(self, stack: Tensor, half: Tensor):
        self.stack, self.half = stack, half
        self.center, self._middle = stack[: len(half)], stack[-len(half) :]

    @cached_property
    def lower(self) -> Tensor:
        return self._middle - self.half

    @cached_property
    def upper(self) -> Tensor:
        return self._middle + self.half

    def reshape(self, shape: Callable[[Tensor], Tensor]) -> Region:
        return CenteredRegion(shape(self.stack), shape(self.half.expand_as(self.center)))


class UncutRegion(Region):
    """The same behind a linear layer: a box still to be intersected with the ball's own box, centre +- reach.

    Attributes:
        uncut_stack, uncut_half: centre, middle and half-width of the box, before the intersection.
        reach: half-width of the ball's own box.
        factors: what `reach` is the product of, but for rounding that it allows for.
    """

    def __init__(self, uncut_stack: Tensor, uncut_half: Tensor, reach: Tensor, factors: tuple[Tensor, ...] = ()):
        self.uncut_stack, self.uncut_half, self.reach, self.factors = uncut_stack, uncut_half, reach, factors
        self.center, self._middle = uncut_stack[: len(uncut_half)], uncut_stack[-len(uncut_half) :]

    @cached_property
    def lost(self) -> Tensor | None:  # only looked at where no rounding is allowed for
        return underflows(self.reach, *self.factors).flatten(1).any(dim=1) if self.factors else None

    @cached_property
    def lower(self) -> Tensor:
        return torch.maximum(self._middle - self.uncut_half, self.center - self.reach)

    @cached_property
    def upper(self) -> Tensor:
        return torch.minimum(self._middle + self.uncut_half, self.center + self.reach)


class Point(Region):
    """A ball alone, centre and radius (N,): all that is known of an entry is that it is no further than the radius."""

    def __init__(self, center: Tensor, radius: Tensor):
        self.center, self.radius = center, radius

    @property
    def lower(self) -> Tensor:
        return self.center - self._reach()

    @property
    def upper(self) -> Tensor:
        return self.center + self._reach()

    def _reach(self) -> Tensor:
        return per_image(self.radius * (1 + 1e-6), self.center)  # outweighs what the products above have rounded

    def map(self, monotone: Callable[[Tensor], Tensor]) -> Region:
        return Point(monotone(self.center), self.radius)

    def widened(self, by: Tensor | float) -> Region:
        return self

    def of_radius(self, radius: Tensor) -> Region:
        return Point(self.center, radius)

    def behind(self, operator: LinearOperator, radius: Tensor, rounding: Tensor | float) -> Region:
        return Point(operator.affine(self.center), radius)
