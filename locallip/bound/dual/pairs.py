"""Clipped MaxMin, which treats units in pairs, with the maxima of `maxima`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locallip.bound.dual.maxima import Allowance, Best, Maximum, Terms, clamp, converted_end, is_finite, parabola


@dataclass(frozen=True)
class ClippedPairs:
    """Clipped MaxMin: the channels are halves a | b, the output is min(max(a, b), high) | max(min(a, b), low).

    Attributes:
        low, high: tensors (1, C / 2, ...), or numbers, possibly infinite.
    """

    low: Tensor | float
    high: Tensor | float
    pairs = True
    rounds = 0.0
    rounding = 0.0

    def __call__(self, z: Tensor) -> Tensor:
        """The activation of z."""
        a, b = z.chunk(2, dim=1)
        larger, smaller = torch.maximum(a, b), torch.minimum(a, b)
        return torch.cat([clamp(larger, None, self.high), clamp(smaller, self.low, None)], dim=1)

    def backward(self, z: Tensor, grad: Tensor) -> Tensor:
        """The gradient before the activation, given the one behind it."""
        (a, b), (larger, smaller) = z.chunk(2, dim=1), grad.chunk(2, dim=1)
        larger = larger * (torch.maximum(a, b) < self.high)
        smaller = smaller * (torch.minimum(a, b) > self.low)
        in_order = a >= b
        return torch.cat([torch.where(in_order, larger, smaller), torch.where(in_order, smaller, larger)], dim=1)

    def change(self, z: Tensor, step: Tensor) -> Tensor:
        """By how much a step from z changes the output."""
        outputs = self(z).chunk(2, dim=1)
        over_first, over_second = ([part - value for part in z.chunk(2, dim=1)] for value in outputs)
        a, b = step.chunk(2, dim=1)
        larger = torch.maximum(a + over_first[0], b + over_first[1])
        smaller = torch.minimum(a + over_second[0], b + over_second[1])
        ends = self.high - outputs[0], self.low - outputs[1]
        return torch.cat([clamp(larger, None, ends[0]), clamp(smaller, ends[1], None)], dim=1)

    def constant(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which outputs are the same for all inputs from `lower` to `upper`."""
        larger, smaller = torch.maximum(*lower.chunk(2, dim=1)), torch.minimum(*upper.chunk(2, dim=1))
        return torch.cat([larger >= self.high, smaller <= self.low], dim=1)

    def converted(self, dtype: torch.dtype, factor: float = 1.0) -> ClippedPairs:
        """The same for inputs and outputs times a power of two, in another precision."""
        return ClippedPairs(*(converted_end(end, dtype, factor) for end in (self.low, self.high)))

    def maximum(self, terms: Terms, roundoff: float = 0.0) -> Maximum:
        """The largest value of the terms of each pair.

        Where the two do not meet, each has its own maximum, among the points where its output moves and those where it
        rests at its threshold; one of the two is the larger. Where they meet, they move together, and either output
        moves or rests.
        """
        values = self(terms.center).chunk(2, dim=1)
        pulls = (terms.a - terms.nu * terms.c).chunk(2, dim=1)
        weights = (terms.g - terms.mu * terms.t).chunk(2, dim=1)
        pair = _Pair(terms, terms.center.chunk(2, dim=1), values, pulls, weights, self.low, self.high)
        allowance = Allowance(terms, pair.spread(), roundoff, halves=True)
        best = Best()
        for value, *steps in (*pair.apart(0, 1), *pair.apart(1, 0), *pair.together()):
            best.add(value + allowance(*steps), *steps)
        # Nowhere in an empty box: that must certify nothing.
        value = torch.where(best.value == -torch.inf, torch.inf, best.value)
        step = torch.cat(best.steps, dim=1)
        return Maximum(value, step, self.change(terms.center, step))


class _Pair:
    """The candidates of clipped MaxMin: (value, step of a, step of b) each; -inf where they are in the wrong order."""

    def __init__(
        self,
        terms: Terms,
        centers: tuple[Tensor, ...],
        values: tuple[Tensor, ...],
        pulls: tuple[Tensor, ...],
        weights: tuple[Tensor, ...],
        low: Tensor | float,
        high: Tensor | float,
    ):
        self.mu, self.nu = terms.mu, terms.nu
        self.centers, self.values, self.pulls, self.weights = centers, values, pulls, weights
        self.low, self.high = low, high
        self.lo, self.hi = (_halves(end) for end in (terms.lo, terms.hi))

    def spread(self) -> Tensor:
        """Size of the distances that steps are computed from."""
        a, b = self.centers
        return (b - a).abs() + (a - self.values[0]).abs() + (a - self.values[1]).abs()

    def _first(self, change: Tensor) -> Tensor:
        return parabola(change, self.pulls[0], self.nu)

    def _second(self, change: Tensor) -> Tensor:
        return parabola(change, self.pulls[1], self.nu)

    def apart(self, x: int, y: int) -> list[tuple[Tensor, ...]]:
        """Unit x the larger, unit y the smaller of the two."""
        larger = self._alone(x, 0, self.high)
        smaller = self._alone(y, 1, self.low)
        gap = self.centers[y] - self.centers[x]
        found = []
        for value, step in larger:
            for other_value, other_step in smaller:
                both = torch.where(step - other_step < gap, -torch.inf, value + other_value)
                found.append((both, step, other_step) if x == 0 else (both, other_step, step))
        return found

    def _alone(self, unit: int, output: int, threshold: Tensor | float) -> list[tuple[Tensor, Tensor]]:
        """Value and step of the best points of a unit that makes an output: where that moves, and where it rests."""
        weight, lo, hi = self.weights[unit], self.lo[unit], self.hi[unit]
        to_line = self.centers[unit] - self.values[output]
        end = clamp(threshold - self.centers[unit], lo, hi)
        moving, resting = ((lo, end), (end, hi)) if output == 0 else ((end, hi), (lo, end))
        pull = self.pulls[output] - weight + self.nu * to_line
        steps = [clamp(pull / (self.mu - self.nu), *moving)]
        steps += [clamp(-weight / self.mu, *resting)] if is_finite(threshold) else []
        rest = threshold - self.values[output]
        make = (self._first, self._second)[output]
        sides = (None, rest) if output == 0 else (rest, None)
        return [(make(clamp(s + to_line, *sides)) - parabola(s, weight, self.mu), s) for s in steps]

    def together(self) -> list[tuple[Tensor, ...]]:
        """Both units at the same value."""
        a, b = self.centers
        gap = b - a
        lines = [a - value for value in self.values]
        lo, hi = _larger(self.lo[0], _plus(self.lo[1], gap)), _smaller(self.hi[0], _plus(self.hi[1], gap))
        low, high = (clamp(end - a, lo, hi) for end in (self.low, self.high))
        still = self.mu * gap - self.weights[0] - self.weights[1]
        first, second = (pull + self.nu * line for pull, line in zip(self.pulls, lines))
        one = 2 * self.mu - self.nu
        steps = [clamp((still + first + second) / (2 * (self.mu - self.nu)), low, high)]
        steps += [clamp((still + second) / one, high, hi)] if is_finite(self.high) else []
        steps += [clamp((still + first) / one, lo, low)] if is_finite(self.low) else []
        if not _ordered(self.low, self.high):
            steps.append(clamp(still / (2 * self.mu), high, low))
        found = []
        for step in steps:
            outputs = self._first(clamp(step + lines[0], None, self.high - self.values[0]))
            outputs = outputs + self._second(clamp(step + lines[1], self.low - self.values[1], None))
            value = outputs - parabola(step, self.weights[0], self.mu)
            value = value - parabola(step - gap, self.weights[1], self.mu)
            if lo is not None:
                value = torch.where(lo > hi, -torch.inf, value)
            found.append((value, step, step - gap))
        return found


def _ordered(low: Tensor | float, high: Tensor | float) -> bool:
    ordered = low <= high
    return bool(ordered.all()) if isinstance(ordered, Tensor) else ordered


def _halves(end: Tensor | None) -> tuple[Tensor | None, ...]:
    return (None, None) if end is None else end.chunk(2, dim=1)


def _plus(end: Tensor | None, shift: Tensor) -> Tensor | None:
    return None if end is None else end + shift


def _larger(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None else torch.maximum(x, y)


def _smaller(x: Tensor | None, y: Tensor | None) -> Tensor | None:
    return None if x is None else torch.minimum(x, y)
