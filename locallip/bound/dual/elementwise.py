"""Activations that treat every unit by itself, with the maxima of `maxima`."""

from __future__ import annotations

from dataclasses import dataclass

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
    """left z below 0, right z above: LeakyReLU, PReLU with one slope, the absolute value.

    Attributes:
        left, right: slopes between -1 and 1, as they are in the precision of the network.
    """

    left: float
    right: float = 1.0
    pairs = False
    rounds = 1.0

    def __post_init__(self) -> None:
        if not (abs(self.left) <= 1 and abs(self.right) <= 1):
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
        outer = torch.maximum if self.right >= self.left else torch.minimum
        return outer(self.left * step + on_left, self.right * step + on_right)

    def constant(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which outputs are the same for all inputs from `lower` to `upper`."""
        flat_left = (upper <= 0) if self.left == 0 else torch.zeros_like(upper, dtype=torch.bool)
        return flat_left | (lower >= 0) if self.right == 0 else flat_left

    def converted(self, dtype: torch.dtype, factor: float = 1.0) -> BentLine:
        """The same for inputs and outputs times a power of two, in another precision."""
        return self

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
