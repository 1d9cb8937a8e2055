"""Activations that treat every unit by itself, with the maxima of `maxima`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from locallip.bound.dual.maxima import Allowance, Best, Maximum, Terms, clamp, converted_end, is_finite, parabola


@dataclass(frozen=True)
class ClippedLine:
    """min(max(z, low), high): ReLU, clipped ReLU, ReLU6, Hardtanh, and the identity.

    Attributes:
        low, high: numbers, possibly infinite, or tensors (1, ...).
    """

    low: Tensor | float
    high: Tensor | float
    pairs = False
    rounds = 0.0
    rounding = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        """The activation of z."""
        return clamp(z, self.low, self.high)

    def backward(self, z: Tensor, grad: Tensor) -> Tensor:
        """The gradient before the activation, given the one behind it."""
        return grad * ((z > self.low) & (z < self.high))

    def change(self, z: Tensor, step: Tensor) -> Tensor:
        """By how much a step from z changes the output."""
        value = self(z)
        return clamp(step + (z - value), self.low - value, self.high - value)

    def constant(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which outputs are the same for all inputs from `lower` to `upper`."""
        return (upper <= self.low) | (lower >= self.high)

    def converted(self, dtype: torch.dtype, factor: float = 1.0) -> ClippedLine:
        """The same for inputs and outputs times a power of two, in another precision."""
        return ClippedLine(*(converted_end(end, dtype, factor) for end in (self.low, self.high)))

    def maximum(self, terms: Terms, roundoff: float = 0.0) -> Maximum:
        """The largest value of the terms of each unit."""
        value = self(terms.center)
        to_line, to_low, to_high = terms.center - value, self.low - value, self.high - value
        pull, weight = terms.a - terms.nu * terms.c, terms.g - terms.mu * terms.t
        ends = [clamp(end - terms.center, terms.lo, terms.hi) for end in (self.low, self.high)]
        first, last = (is_finite(end) for end in (self.low, self.high))
        flat = -weight / terms.mu
        tops = [clamp((pull - weight + terms.nu * to_line) / (terms.mu - terms.nu), *ends)]
        tops += [clamp(flat, terms.lo, ends[0])] if first else []
        tops += [clamp(flat, ends[1], terms.hi)] if last else []
        best = Best()
        allowance = Allowance(terms, to_line, roundoff)
        for step in tops:
            change = clamp(step + to_line, to_low, to_high)
            best.add(parabola(change, pull, terms.nu) - parabola(step, weight, terms.mu) + allowance(step), step)
        return Maximum(best.value, *best.steps, clamp(best.steps[0] + to_line, to_low, to_high))


@dataclass(frozen=True)
class BentLine:
    """left z below 0, right z above: LeakyReLU, PReLU, the absolute value.

    Attributes:
        left, right: slopes between -1 and 1, as they are in the precision of the network; `left` may be a tensor
            (1, ...), if no slope in it exceeds `right`.
    """

    left: Tensor | float
    right: float = 1.0
    pairs = False
    rounds = 1.0
    rounding = 0.0

    def __post_init__(self) -> None:
        left = torch.as_tensor(self.left, dtype=torch.float64)
        if isinstance(self.left, Tensor) and not (left <= self.right).all():
            raise ValueError(f"slopes on the left, one by one, may not exceed {self.right}, the one on the right")
        if not ((left.abs() <= 1).all() and abs(self.right) <= 1):
            raise ValueError(f"the dual takes slopes between -1 and 1, got {self.left} and {self.right}")

    def __call__(self, z: Tensor) -> Tensor:
        """The activation of z."""
        return torch.where(z < 0, self.left * z, self.right * z)

    def backward(self, z: Tensor, grad: Tensor) -> Tensor:
        """The gradient before the activation, given the one behind it."""
        return torch.where(z < 0, self.left * grad, self.right * grad)

    def change(self, z: Tensor, step: Tensor) -> Tensor:
        """By how much a step from z changes the output."""
        return self._change(step, *self._offsets(z))

    def _offsets(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """How far the two lines lie from the output, at z itself."""
        bend = (self.right - self.left) * z
        return torch.where(z < 0, 0, -bend), torch.where(z < 0, bend, 0)

    def _change(self, step: Tensor, on_left: Tensor, on_right: Tensor) -> Tensor:
        rises = isinstance(self.left, Tensor) or self.right >= self.left
        outer = torch.maximum if rises else torch.minimum
        return outer(self.left * step + on_left, self.right * step + on_right)

    def constant(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which outputs are the same for all inputs from `lower` to `upper`."""
        flat_left = (upper <= 0) & (torch.as_tensor(self.left, device=upper.device) == 0)
        return flat_left | (lower >= 0) if self.right == 0 else flat_left

    def converted(self, dtype: torch.dtype, factor: float = 1.0) -> BentLine:
        """The same for inputs and outputs times a power of two, in another precision."""
        return BentLine(converted_end(self.left, dtype, 1.0), self.right)

    def maximum(self, terms: Terms, roundoff: float = 0.0) -> Maximum:
        """The largest value of the terms of each unit."""
        offsets = self._offsets(terms.center)
        pull, weight = terms.a - terms.nu * terms.c, terms.g - terms.mu * terms.t
        bend = clamp(-terms.center, terms.lo, terms.hi)
        best = Best()
        allowance = Allowance(terms, terms.center, roundoff)
        for slope, offset, ends in zip((self.left, self.right), offsets, ((terms.lo, bend), (bend, terms.hi))):
            top = slope * (pull + terms.nu * offset) - weight
            step = clamp(top / (terms.mu - terms.nu * slope**2), *ends)
            change = self._change(step, *offsets)
            best.add(parabola(change, pull, terms.nu) - parabola(step, weight, terms.mu) + allowance(step), step)
        return Maximum(best.value, *best.steps, self._change(best.steps[0], *offsets))


@dataclass(frozen=True)
class SmoothLine:
    """A function whose slope is never beyond 1 in size and changes steadily: Sigmoid, Tanh, ELU and the like.

    No closed form is at hand. Between two points a chord misses the function by no more than curvature / 8 times the
    square of their distance, and with the chord in its place the maximum has one. What the chord misses is added.

    Attributes:
        function, derivative: of a tensor.
        curvature: at least the size of the second derivative.
        rounding: by how much a value in float64 can be off.
        unit: inputs and outputs are those of the function times so much.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    curvature: float
    rounding: float
    unit: float = 1.0
    pairs = False
    rounds = 4.0

    def __call__(self, z: Tensor) -> Tensor:
        """The activation of z."""
        return self.function(z / self.unit) * self.unit

    def backward(self, z: Tensor, grad: Tensor) -> Tensor:
        """The gradient before the activation, given the one behind it."""
        return self.derivative(z / self.unit) * grad

    def change(self, z: Tensor, step: Tensor) -> Tensor:
        """By how much a step from z changes the output."""
        return self(z + step) - self(z)

    def constant(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which outputs are the same for all inputs from `lower` to `upper`: none."""
        return torch.zeros_like(upper, dtype=torch.bool)

    def converted(self, dtype: torch.dtype, factor: float = 1.0) -> SmoothLine:
        """The same for inputs and outputs times a power of two, in another precision."""
        size = {"curvature": self.curvature / factor, "rounding": self.rounding * factor}
        return replace(self, **size, unit=self.unit * factor)

    def maximum(self, terms: Terms, roundoff: float = 0.0) -> Maximum:
        """At least the largest value of the terms of each unit.

        A step of 0 gives 0, and beyond `far` all steps give less, since no output changes by more than its input. The
        chords are laid evenly at first, then closer the nearer they are to the best point so found.
        """
        pull, weight = terms.a - terms.nu * terms.c, terms.g - terms.mu * terms.t
        far = 2 * (pull.abs() + weight.abs()) / (terms.mu - terms.nu) * (1 + 1e-6)
        ends = clamp(-far, terms.lo, terms.hi), clamp(far, terms.lo, terms.hi)
        chords = _Chords(self, terms, pull, weight, ends, roundoff)
        middle = chords.best([torch.lerp(*ends, share) for share in _EVENLY]).steps[0]
        points = [torch.lerp(middle, ends[0], share) for share in _CLOSER[::-1]]
        best = chords.best([*points, middle, *(torch.lerp(middle, ends[1], share) for share in _CLOSER)])
        best.add(torch.zeros_like(pull) * pull, clamp(torch.zeros_like(pull), *ends))
        return Maximum(best.value, *best.steps, self.change(terms.center, best.steps[0]))


# Where chords end: as shares of the way between both ends of the box, and from the best point to either end.
_EVENLY = [number / 8 for number in range(1, 8)]
_CLOSER = [(number / 8) ** 2 for number in range(1, 8)]


class _Chords:
    """The maxima over pieces on which a chord stands for a function."""

    def __init__(
        self,
        line: SmoothLine,
        terms: Terms,
        pull: Tensor,
        weight: Tensor,
        ends: tuple[Tensor, Tensor],
        roundoff: float,
    ):
        self._line, self._terms, self._pull, self._weight, self._ends = line, terms, pull, weight, ends
        reach = ends[0].abs() + ends[1].abs()
        self._allowance = Allowance(terms, 2 * reach, roundoff)
        # By how much a change can be off, a difference of two values, and the slope of a chord times its length.
        self._off = 8 * line.rounding + 32 * roundoff * (terms.center.abs() + reach)

    def best(self, inner: list[Tensor]) -> Best:
        """The best over all pieces between the ends, which the points divide from left to right."""
        best, points = Best(), [self._ends[0], *inner, self._ends[1]]
        changes = [self._line.change(self._terms.center, point) for point in points]
        for piece in zip(points, points[1:], changes, changes[1:]):
            self._add(best, *piece)
        return best

    def _add(self, best: Best, left: Tensor, right: Tensor, at_left: Tensor, at_right: Tensor) -> None:
        terms, width = self._terms, right - left
        slope = torch.where(width > 0, (at_right - at_left) / width, 0).clamp(-1, 1)
        offset = at_left - slope * left
        missed = self._line.curvature / 8 * width**2 * (1 + 1e-6) + self._off
        top = (slope * (self._pull + terms.nu * offset) - self._weight) / (terms.mu - terms.nu * slope**2)
        step = clamp(top, left, right)
        change = at_left + slope * (step - left)
        value = parabola(change, self._pull, terms.nu) - parabola(step, self._weight, terms.mu)
        size = at_left.abs() + at_right.abs() + missed
        value = value + (self._pull.abs() + terms.nu * size) * missed
        best.add(value + self._allowance(step), step)
