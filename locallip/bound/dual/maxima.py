"""The maximum of one unit's terms: what the activations of the dual share.

At a unit with value z at x, the step d of its input in the box lo <= d <= hi changes its output by
phi(d) = act(z + d) - act(z). The dual asks for the maximum over the box of

    a phi(d) - g d - mu/2 (d - t)^2 + nu/2 (phi(d) - c)^2        with mu > nu >= 0.

Where act has slope s this is a parabola of curvature mu - nu s^2, so with |s| <= 1 it is concave on every piece, and
the maximum is the best of the pieces' own: the top of the parabola, pushed back to the ends of the piece. Every
candidate is a point of the box at which the terms are evaluated as they are. Clipped MaxMin treats pairs of units in
the same way.

Everything is written in differences to x, in which no digits cancel: steps, changes and the distances of x from the
breakpoints are all good to a relative u, the unit roundoff. So what is computed is the maximum for breakpoints moved,
and for coefficients changed, by a few u of themselves. With D the length of the step at a candidate (of both steps of a
pair), T = (|a| + |g|) D + mu (D + |t|)^2 + nu (D + |c|)^2 and S the sum of the absolute values from which the top of
the parabola is computed, the exact maximum exceeds that of the computed candidates by at most

    k u T + (k u S)^2 / (mu - nu)

for a small k: the first term is the evaluation and the change of the coefficients, the second the distance from the
top, which a parabola punishes quadratically. The argument, with its constants, is in docs/dual.md ("Rounding in the
maxima"); it needs mu - nu >= 1e-9 mu. `roundoff` adds this to every candidate, with a k that leaves ample room, before
the best is chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

# k above. At most 64 u T + 9,500 u^2 S^2 / (mu - nu) is needed.
_OPERATIONS = 256


@dataclass
class Terms:
    """The terms of one layer for P questions; all (P, ...) but for the weights.

    Attributes:
        center: what the layer's linear part gives at x.
        a, g, t, c: see above.
        mu, nu: (P, 1, ...).
        lo, hi: ends of the steps; None: infinite.
    """

    center: Tensor
    a: Tensor
    g: Tensor
    t: Tensor
    c: Tensor
    mu: Tensor
    nu: Tensor
    lo: Tensor | None = None
    hi: Tensor | None = None


@dataclass
class Maximum:
    """Where the terms are largest.

    Attributes:
        value: (P, ...) the largest value less nu/2 c^2 - mu/2 t^2, per unit, or (P, C / 2, ...) per pair.
        step: (P, ...) d there.
        change: (P, ...) phi there.
    """

    value: Tensor
    step: Tensor
    change: Tensor


class DualActivation(Protocol):
    """What `elementwise` and `pairs` have; `rounds` is its own relative rounding error in units of the roundoff."""

    pairs: bool
    rounds: float

    def __call__(self, z: Tensor) -> Tensor:
        """The activation of z."""

    def backward(self, z: Tensor, grad: Tensor) -> Tensor:
        """The gradient before the activation, given the one behind it."""

    def change(self, z: Tensor, step: Tensor) -> Tensor:
        """By how much a step from z changes the output."""

    def constant(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which outputs are the same for all inputs from `lower` to `upper`."""

    def converted(self, dtype: torch.dtype, factor: float) -> DualActivation:
        """The same for inputs and outputs times a power of two, in another precision."""

    def maximum(self, terms: Terms, roundoff: float) -> Maximum:
        """The largest value of the terms of each unit or pair."""


class Best:
    """The best of several candidates; a NaN among them makes the value NaN."""

    value: Tensor | None = None

    def add(self, value: Tensor, *steps: Tensor) -> None:
        """One more candidate."""
        if self.value is None:
            self.value, self.steps = value, list(steps)
            return
        better = value > self.value
        self.value = torch.maximum(value, self.value)
        self.steps = [torch.where(better, new, old) for new, old in zip(steps, self.steps)]


class Allowance:
    """What rounding can have taken from a candidate, see the head of this module; 0 for a roundoff of 0.

    distances: sizes of the distances to breakpoints from which steps are computed.
    halves: units are pairs.
    """

    def __init__(self, terms: Terms, distances: Tensor, roundoff: float, halves: bool = False):
        self._factor = _OPERATIONS * roundoff
        if not roundoff:
            return
        self._mu, self._nu = terms.mu, terms.nu
        sizes = [x.abs() for x in (terms.a, terms.g, terms.t, terms.c)]
        a, g, self._t, self._c = (sum(x.chunk(2, dim=1)) for x in sizes) if halves else sizes
        self._slope = a + g
        pulls = self._slope + terms.mu * (self._t + distances.abs()) + terms.nu * self._c
        self._top = (self._factor * pulls) ** 2 / (terms.mu - terms.nu)

    def __call__(self, *steps: Tensor) -> Tensor | float:
        if not self._factor:
            return 0.0
        length = sum(step.abs() for step in steps)
        size = self._slope * length + self._mu * (length + self._t) ** 2 + self._nu * (length + self._c) ** 2
        return self._factor * size + self._top


def parabola(x: Tensor, linear: Tensor, curvature: Tensor) -> Tensor:
    """linear x + curvature / 2 x^2."""
    return x * torch.addcmul(linear, x, curvature / 2)


def clamp(x: Tensor, low: Tensor | float | None, high: Tensor | float | None) -> Tensor:
    x = torch.maximum(x, low) if isinstance(low, Tensor) else x if low is None else x.clamp(min=low)
    return torch.minimum(x, high) if isinstance(high, Tensor) else x if high is None else x.clamp(max=high)


def converted_end(end: Tensor | float, dtype: torch.dtype, factor: float) -> Tensor | float:
    return (end.detach().double() * factor).to(dtype) if isinstance(end, Tensor) else end * factor


def is_finite(end: Tensor | float) -> bool:
    return isinstance(end, Tensor) or abs(end) != float("inf")
