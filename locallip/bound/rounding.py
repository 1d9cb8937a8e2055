"""How far floating-point arithmetic can take a forward pass from the exact one.

The standard model (Higham, Accuracy and Stability of Numerical Algorithms, section 3.1): a dot product of n terms,
summed in any order, is off by at most gamma_n = n u / (1 - n u) times the dot product of the absolute values, u the
unit roundoff. Through the layers errors in L2 add up as

    D <- ||W|| D + c gamma (|| |W| || length + ||b||)

where `length` bounds the layer's input (after Murray 2026, arXiv 2603.13334). Activations that only compare and choose
add nothing. The factor c = 2 and some terms more than the dot product has allow for the operations around it.

The model leaves out underflow and overflow. So each sum may be off by its terms times the smallest normal number
besides (denormals may be flushed), and anything that could come near the largest number counts as arbitrarily far off.

Assumed: sums are sums. Convolutions by FFT or Winograd and TF32 are outside the model.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from locallip.bound.joins import Join
from locallip.bound.operators import Dense, LinearOperator
from locallip.bound.tensors import per_image, underflow_to_nan

FLOAT64, FLOAT32 = 2.0**-53, 2.0**-24
_EXTRA_TERMS = 16
# Smallest normal number, and how large a number may get; in float64 with room for squares and products of two.
_SMALLEST = {FLOAT64: 2.0**-1022, FLOAT32: 2.0**-126}
_LARGEST = {FLOAT64: 1e100, FLOAT32: 1e38}
# Products of norms are taken to be no smaller.
_SMALLEST_PRODUCT = 1e-150


class ExactArithmetic:
    """Nothing is rounded: what training and the published protocol assume.

    Args:
        looks_for_underflow: see `norms.Arithmetic`.
    """

    distance = 0.0

    def __init__(self, looks_for_underflow: bool = True):
        self._looks = looks_for_underflow

    def widening(self, x: Tensor, half: Tensor) -> float:
        """By how much the first box has to grow."""
        return 0.0

    def of_sums(self, operator: LinearOperator, length: Tensor) -> float:
        """By how much any sum of a layer can be off."""
        return 0.0

    def product(self, norm: Tensor, other: Tensor) -> Tensor:
        """A product of norms that underflow has not made too small; NaN where only that can be said."""
        return underflow_to_nan(norm * other, norm, other) if self._looks else norm * other

    def behind_layer(
        self, operator: LinearOperator, norm: Tensor, absolute: Tensor | None, length: Tensor | None
    ) -> ExactArithmetic:
        """What is off behind the layer."""
        return self

    def behind_activation(
        self, error: Tensor | float, entries: int, lipschitz: Tensor | float = 1.0
    ) -> ExactArithmetic:
        """What is off behind an activation whose computed entries are off by at most so much, (N, ...) or a number."""
        return self

    def of_join(self, join: Join, lengths: Sequence[Tensor], like: Tensor) -> Tensor | float:
        """By how much any output can be off where branches meet; lengths: of the longest inputs, (N,) each."""
        return 0.0

    def joint(self, join: Join, norms: Sequence[Tensor]) -> Tensor:
        """The Lipschitz constant where branches meet, given theirs, and not below it."""
        return join.constant(norms)

    def behind_join(
        self, join: Join, branches: Sequence[ExactArithmetic], lengths: Sequence[Tensor]
    ) -> ExactArithmetic:
        """What is off where branches meet, given what is off behind each."""
        return self

    def of_logits(self, last: Dense, length: Tensor) -> float:
        """By how much a logit can be off."""
        return 0.0


class Rounding(ExactArithmetic):
    """The distance of the computed activations from the exact ones, layer by layer.

    Args:
        roundoff: unit roundoff u of the arithmetic.
        distance: (N,) in L2, at the place that the walk has come to; 0 at the images.
    """

    def __init__(self, roundoff: float, distance: Tensor):
        self.roundoff, self.distance = roundoff, distance

    def _gamma(self, terms: int) -> float:
        product = (terms + _EXTRA_TERMS) * self.roundoff
        return 2 * product / (1 - product)

    def widening(self, x: Tensor, half: Tensor) -> Tensor:
        """By how much x - half and x + half can be off."""
        return 4 * self.roundoff * (x.abs() + half)

    def of_sums(self, operator: LinearOperator, length: Tensor) -> Tensor:
        """By how much any sum of a layer can be off; broadcasts over (N, *output_shape).

        length: (N,) L2 length of the longest vector that is multiplied. Cauchy-Schwarz bounds the dot product of the
        absolute values by the row's norm times it.
        """
        ones = [1] * (len(operator.output_shape) - 1)
        length = (length + self.distance).view(-1, 1, *ones)
        bias = operator.bias_magnitude()
        return self._gamma(_terms(operator)) * (operator.row_norms() * length + bias) + self._underflow(operator)

    def _underflow(self, operator: LinearOperator) -> float:
        return 4 * (_terms(operator) + _EXTRA_TERMS) * _SMALLEST[self.roundoff] * operator.spread

    def product(self, norm: Tensor, other: Tensor) -> Tensor:
        """A product of norms that underflow has not made too small: no smaller than 1e-150."""
        return (norm * other).clamp(min=_SMALLEST_PRODUCT)

    def behind_layer(self, operator: LinearOperator, norm: Tensor, absolute: Tensor, length: Tensor) -> Rounding:
        """What is off behind the layer.

        norm, absolute: upper bounds on ||W|| and || |W| ||. length: (N,) of the longest input.
        """
        outputs = operator.output_shape[1:].numel()
        bias = operator.bias_magnitude()
        bias = bias.norm() * (operator.output_shape.numel() / bias.numel()) ** 0.5
        largest = absolute * (length + self.distance) + bias
        underflow = self._underflow(operator) * outputs**0.5 * operator.output_shape[0]
        fresh = self._gamma(_terms(operator)) * largest + underflow
        distance = norm * self.distance + fresh * (1 + 1e-6)
        # Written so that a NaN counts as too large.
        fits = torch.maximum(largest, length) < _LARGEST[self.roundoff]
        return Rounding(self.roundoff, torch.where(fits, distance, torch.inf))

    def behind_activation(self, error: Tensor | float, entries: int, lipschitz: Tensor | float = 1.0) -> Rounding:
        """What is off behind an activation, which stretches the distance, and adds `error` to each of its entries."""
        exact = not isinstance(error, Tensor) and error == 0
        if exact and isinstance(lipschitz, float) and lipschitz == 1:
            return self
        fresh = error.flatten(1).norm(dim=1) if isinstance(error, Tensor) else error * entries**0.5
        return Rounding(self.roundoff, (self.distance * lipschitz + fresh) * (1 + 1e-6))

    def of_join(self, join: Join, lengths: Sequence[Tensor], like: Tensor) -> Tensor | float:
        """By how much any output can be off where branches meet: (N, 1, ...)."""
        if not join.rounds:
            return 0.0
        return per_image(self._gamma(len(lengths)) * (sum(lengths) + self.distance), like)

    def joint(self, join: Join, norms: Sequence[Tensor]) -> Tensor:
        """The Lipschitz constant where branches meet, rounded up."""
        return join.constant(norms) * (1 + 1e-12)

    def behind_join(self, join: Join, branches: Sequence[Rounding], lengths: Sequence[Tensor]) -> Rounding:
        """What is off where branches meet."""
        distance = join.constant([branch.distance for branch in branches])
        total = sum(lengths) + sum(branch.distance for branch in branches)
        fresh = self._gamma(len(lengths)) * total if join.rounds else 0.0
        distance = (distance + fresh) * (1 + 1e-6)
        return Rounding(self.roundoff, torch.where(total < _LARGEST[self.roundoff], distance, torch.inf))

    def of_logits(self, last: Dense, length: Tensor) -> Tensor:
        """By how much a logit, or a difference of two rows times a step inside the ball, can be off: (N, K)."""
        rows = last.weight.norm(dim=1)
        bias = 0 if last.bias is None else last.bias.abs()
        size = (length + self.distance)[:, None] * (rows + 2 * rows.max()) + bias
        # What underflows in worst-case terms, which square, is below 1e-50 while nothing exceeds the largest number.
        off = rows * self.distance[:, None] + 4 * self._gamma(_terms(last)) * size + 1e-50
        off = off + 4 * (_terms(last) + _EXTRA_TERMS) * _SMALLEST[self.roundoff]
        return torch.where(size < _LARGEST[self.roundoff], off, torch.inf)


def _terms(operator: LinearOperator) -> int:
    return operator.terms[0]
