"""Activations that treat every entry by itself and are no clipping: bent lines and smooth curves.

A curve is a function, its derivative, and the few points at which these two turn. Between them both are monotone, so
that what a curve does over an interval is read off at the interval's ends and at those of the points that lie in it.

Rounding. glibc ("Known Maximum Errors in Math Functions"), SLEEF and CUDA state errors of at most 2 ulps for exp,
expm1, log1p, tanh and erf in double precision. Each curve here is made of a few of them and of a few operations of at
most half an ulp each. Wherever a factor is large, they have saturated: beyond 40 sigmoid, tanh and erf are 0 or +-1 to
the last digit, and what is left is the input itself. So every curve is off by a few u times the largest number that it
computes before that, and `rounding` is 64 u times that number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from locallip.bound.activations import Activation
from locallip.bound.dual.elementwise import BentLine, SmoothLine
from locallip.bound.dual.maxima import DualActivation
from locallip.bound.region import Point, Region

_U = 2.0**-53
_ULPS = 64 * _U


@dataclass(frozen=True, eq=False)
class Curve(Activation):
    """A function of one number, taken of every entry.

    Attributes:
        function, derivative: of a tensor (N, ...). Where the function has a kink, `derivative` gives there the slope of
            larger size, and the kink is one of the `steepest`.
        lipschitz, rounding, relative_rounding: see `Activation`.
        turns: where the function turns between rising and falling.
        steepest: where the derivative turns or jumps.
        rests_below, rests_above: ends of the two half-lines on which it is constant.
        curvature: at least the size of its second derivative; None: that is not bounded, or nobody knows.
    """

    function: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]
    lipschitz: Tensor | float
    rounding: float | None = None
    relative_rounding: float = 0.0
    turns: tuple[float, ...] = ()
    steepest: tuple[float, ...] = ()
    rests_below: float = -math.inf
    rests_above: float = math.inf
    curvature: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        return ~((upper <= self.rests_below) | (lower >= self.rests_above))

    def behind(self, region: Region, fuse: bool) -> tuple[Region, Tensor | None]:
        if isinstance(region, Point):
            return region.map(self), None
        lower, upper = region.lower, region.upper
        low, high = _hull(self(lower), self(upper))
        for turn in self.turns:
            value = self(lower.clamp(min=turn).minimum(upper))
            low, high = torch.minimum(low, value), torch.maximum(high, value)
        return Region(self(region.center), low, high), self.varying(lower, upper)

    def steepness(self, region: Region) -> Tensor | float:
        if isinstance(region, Point):
            return self.lipschitz
        lower, upper = region.lower, region.upper
        points = [lower, upper, *(lower.clamp(min=point).minimum(upper) for point in self.steepest)]
        slopes = [self.derivative(point).abs().flatten(1).amax(dim=1) for point in points]
        steepest = torch.stack(slopes).amax(dim=0)
        # Derivatives are computed too.
        allowed = 64 * torch.finfo(steepest.dtype).eps
        return (steepest * (1 + allowed) + allowed).clamp(max=self.lipschitz)

    def in_dual(self) -> DualActivation | None:
        if self.curvature is None or self.rounding is None or self.lipschitz > 1:
            return None
        return SmoothLine(self.function, self.derivative, self.curvature, self.rounding)


@dataclass(frozen=True, eq=False)
class Bent(Activation):
    """x above 0, left x below: LeakyReLU, PReLU.

    Attributes:
        left: a number, or a tensor (1, ...) that broadcasts over the entries.
    """

    left: Tensor | float
    rounding = 0.0
    relative_rounding = 2 * _U

    @property
    def lipschitz(self) -> Tensor | float:
        """The larger of 1 and the size of the slope on the left."""
        return self.left.abs().amax().clamp(min=1) if isinstance(self.left, Tensor) else max(1.0, abs(self.left))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.where(x < 0, self.left * x, x)

    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        return ~((upper <= 0) & (torch.as_tensor(self.left, device=upper.device) == 0))

    def behind(self, region: Region, fuse: bool) -> tuple[Region, Tensor | None]:
        if isinstance(region, Point):
            return region.map(self), None
        lower, upper = region.lower, region.upper
        low, high = _hull(self(lower), self(upper))
        # With a slope below 0 on the left it falls to 0 before it rises.
        low = torch.where((lower < 0) & (upper > 0), low.clamp(max=0), low)
        return Region(self(region.center), low, high), self.varying(lower, upper)

    def steepness(self, region: Region) -> Tensor | float:
        if isinstance(region, Point):
            return self.lipschitz
        left, right = abs(self.left) * torch.ones_like(region.lower), torch.ones_like(region.upper)
        # Written so that a NaN counts as any number.
        slopes = torch.maximum(torch.where(region.lower >= 0, 0, left), torch.where(region.upper < 0, 0, right))
        return slopes.flatten(1).amax(dim=1)

    def in_dual(self) -> DualActivation | None:
        return BentLine(self.left) if self.lipschitz <= 1 else None


def _hull(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    return torch.minimum(x, y), torch.maximum(x, y)


# --- curves by name --------------------------------------------------------------------------------------------------


def sigmoid() -> Curve:
    """1 / (1 + exp(-x))."""
    return Curve(
        torch.sigmoid,
        lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
        0.25,
        _ULPS,
        steepest=(0.0,),
        curvature=0.09623,
    )


def tanh() -> Curve:
    """The hyperbolic tangent."""
    return Curve(torch.tanh, lambda x: 1 - torch.tanh(x) ** 2, 1.0, _ULPS, steepest=(0.0,), curvature=0.76981)


def softsign() -> Curve:
    """x / (1 + |x|)."""
    return Curve(F.softsign, lambda x: (1 + x.abs()) ** -2, 1.0, _ULPS, steepest=(0.0,), curvature=2.0)


def tanhshrink() -> Curve:
    """x - tanh(x)."""
    return Curve(F.tanhshrink, lambda x: torch.tanh(x) ** 2, 1.0, _ULPS, 4 * _U, curvature=0.76981)


def softplus(beta: float, threshold: float) -> Curve:
    """log(1 + exp(beta x)) / beta.

    PyTorch gives x itself where beta x exceeds a threshold, of 20 at least here. By what that misses the function jumps
    there: an error at both ends of every step.
    """
    jump = math.log1p(math.exp(-threshold)) / beta
    return Curve(
        lambda x: F.softplus(x, beta, threshold),
        lambda x: torch.sigmoid(beta * x),
        1.0,
        2 * jump + _ULPS * (threshold + 1) / beta,
        curvature=beta / 4,
    )


def logsigmoid() -> Curve:
    """log(1 / (1 + exp(-x)))."""
    return Curve(F.logsigmoid, lambda x: torch.sigmoid(-x), 1.0, _ULPS, 4 * _U, curvature=0.25)


def elu(alpha: float, scale: float = 1.0, width: float = 1.0) -> Curve:
    """scale times x above 0 and alpha (exp(x / width) - 1) below: ELU, CELU (alpha = width) and SELU."""
    left, smooth = alpha / width, alpha == width

    def function(x: Tensor) -> Tensor:
        return scale * torch.where(x > 0, x, alpha * torch.expm1(x.clamp(max=0) / width))

    def derivative(x: Tensor) -> Tensor:
        below = scale * left * torch.exp(x.clamp(max=0) / width)
        # Of two numbers `where` would make a tensor of the process's default dtype.
        above = torch.full_like(x, scale)
        return torch.where(x < 0, below, torch.where(x == 0, scale * max(1.0, left), above))

    return Curve(
        function,
        derivative,
        scale * max(1.0, left),
        _ULPS * scale * max(1.0, alpha),
        0.0 if scale == 1 else 4 * _U,
        steepest=(0.0,),
        curvature=scale / width if smooth else None,
    )


def silu() -> Curve:
    """x / (1 + exp(-x))."""

    def derivative(x: Tensor) -> Tensor:
        share = torch.sigmoid(x)
        return share * (1 + x * (1 - share))

    turn, steepest = -1.2784645427610738, 2.3993572805154677
    return Curve(F.silu, derivative, 1.09983932013, 40 * _ULPS, turns=(turn,), steepest=(-steepest, steepest))


def gelu(approximate: str = "none") -> Curve:
    """x Phi(x), Phi the normal distribution, or PyTorch's approximation of it by `tanh`."""
    if approximate == "tanh":
        return _gelu_by_tanh()

    def derivative(x: Tensor) -> Tensor:
        return (1 + torch.erf(x * 0.5**0.5)) / 2 + x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)

    turn, steepest = -0.7517915246935645, 2**0.5
    return Curve(F.gelu, derivative, 1.12890414519, 40 * _ULPS, turns=(turn,), steepest=(-steepest, steepest))


def _gelu_by_tanh() -> Curve:
    factor, cubic = math.sqrt(2 / math.pi), 0.044715

    def derivative(x: Tensor) -> Tensor:
        inner = torch.tanh(factor * (x + cubic * x**3))
        # Beyond 20, where it is 0, the product would be infinity times 0.
        rise = factor * (1 + 3 * cubic * x.clamp(-20, 20) ** 2)
        return (1 + inner) / 2 + x.clamp(-20, 20) / 2 * (1 - inner**2) * rise

    turn, steepest = -0.7524614220710163, 1.4185040087908284
    return Curve(
        lambda x: F.gelu(x, approximate="tanh"),
        derivative,
        1.12899306866,
        40 * _ULPS,
        turns=(turn,),
        steepest=(-steepest, steepest),
    )


def mish() -> Curve:
    """x tanh(log(1 + exp(x)))."""

    def derivative(x: Tensor) -> Tensor:
        inner = torch.tanh(F.softplus(x))
        return inner + x * torch.sigmoid(x) * (1 - inner**2)

    turn, steepest = -1.1924312145154952, (-2.256376396360793, 1.4905711794854285)
    return Curve(F.mish, derivative, 1.08849816126, 40 * _ULPS, turns=(turn,), steepest=steepest)


def hardsigmoid() -> Curve:
    """min(max(x + 3, 0), 6) / 6."""

    def derivative(x: Tensor) -> Tensor:
        return torch.where(x.abs() <= 3, 1 / 6, torch.zeros_like(x))

    rests = {"steepest": (-3.0, 3.0), "rests_below": -3.0, "rests_above": 3.0}
    return Curve(F.hardsigmoid, derivative, (1 + _ULPS) / 6, _ULPS, **rests)


def hardswish() -> Curve:
    """x min(max(x + 3, 0), 6) / 6."""

    def derivative(x: Tensor) -> Tensor:
        inside = torch.where(x.abs() <= 3, (2 * x + 3) / 6, 0)
        return torch.where(x > 3, 1, inside)

    settings = {"turns": (-1.5,), "steepest": (-3.0, 3.0), "rests_below": -3.0}
    return Curve(F.hardswish, derivative, 1.5, 3 * _ULPS, 4 * _U, **settings)
