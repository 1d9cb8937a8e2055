"""Activations: what a walk has to know of a function that is applied to the outputs of a linear layer.

Every activation in this file is monotone in each of its inputs and has Lipschitz constant 1, so that it takes the ends
of a box to the ends of a box and makes no ball larger. `sorting` has more of that kind, `curves` and `pooling` have
others.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor

from locallip.bound import fused
from locallip.bound.dual.elementwise import ClippedLine
from locallip.bound.dual.maxima import DualActivation
from locallip.bound.dual.pairs import ClippedPairs
from locallip.bound.fused import Threshold
from locallip.bound.region import CenteredRegion, Point, Region, UncutRegion


class Activation(ABC):
    """A function of known Lipschitz constant, monotone in each of its inputs unless it has a `behind` of its own.

    Attributes:
        elementwise: whether it treats every entry by itself. Entries that cannot vary then switch off rows of the
            linear layer before, not only columns of the one behind.
        rests: whether outputs can stand still while inputs vary, at thresholds; there are no masks behind it otherwise.
        lipschitz: its Lipschitz constant, a number or a scalar tensor.
        rounding: by how much an output computed in float64 can be off from the exact one, whatever the input: 0 where
            the function only compares and chooses. None: nobody knows, and what allows for rounding refuses the
            activation.
        relative_rounding: what comes on top of it, as a share of the output.
    """

    elementwise: bool = True
    rests: bool = True
    lipschitz: Tensor | float = 1.0
    rounding: float | None = None
    relative_rounding: float = 0.0

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuse a class that computes otherwise than the one whose boxes, fused passes and dual it would inherit."""
        super().__init_subclass__(**kwargs)
        calls = [vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)]
        if sum(not getattr(call, "__isabstractmethod__", False) for call in calls) > 1:
            bases = " and ".join(base.__name__ for base in cls.__bases__)
            raise TypeError(
                f"{cls.__name__} computes otherwise than {bases}, but inherits what is known of it; derive it from "
                f"Activation, or make an Elementwise"
            )

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The function of x (N, ...), which stays as it is."""

    @abstractmethod
    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        """Which outputs (N, ...) can differ between two inputs of the box, bool; a NaN makes an output vary."""

    def behind(self, region: Region, fuse: bool) -> tuple[Region, Tensor | None]:
        """The region behind it, and what can vary there; None: everything, as behind a ball without a box.

        fuse: whether both may be made in one pass over memory, which rounds otherwise than operation by operation.
        """
        varying = None if isinstance(region, Point) else self.varying(region.lower, region.upper)
        return region.map(self._of_a_copy), varying

    def _of_a_copy(self, x: Tensor) -> Tensor:
        """The function of x, whatever a user's own does to its argument."""
        return self(x.clone())

    def steepness(self, region: Region) -> Tensor | float:
        """Its Lipschitz constant between any two points of a region before it: (N,) or a scalar."""
        return self.lipschitz

    def shape_behind(self, shape: torch.Size) -> torch.Size:
        """The shape of one image's activations behind it, given that before it."""
        return shape

    @property
    def rounds(self) -> bool:
        """Whether computed outputs can be off from the exact ones."""
        return self.rounding != 0 or self.relative_rounding != 0

    def error(self, behind: Region) -> Tensor | float:
        """By how much computed outputs can be off in a region behind it: (N, ...), or one number for all."""
        if not self.relative_rounding:
            return self.rounding
        size = torch.maximum(torch.maximum(behind.lower.abs(), behind.upper.abs()), behind.center.abs())
        return self.rounding + self.relative_rounding * size

    def slack(self, region: Region, weight: float) -> Tensor:
        """How far a box reaches into where outputs vary, on average: a scalar that training can drive down.

        weight: of reaching below an upper threshold beside reaching above a lower one.
        """
        return region.center.new_zeros(())

    def in_dual(self) -> DualActivation | None:
        """The same with its inner maximum; None: nobody has one, and the dual cannot be asked."""
        return None


@dataclass(frozen=True, eq=False)
class Elementwise(Activation):
    """An activation of a user's own, entry by entry: monotone, and nowhere steeper than 1.

    Attributes:
        function: of a tensor (N, ...).
        can_vary: of both ends of a box, (N, ...) each: a bool tensor, which outputs can vary in it.
        rounding: see `Activation`.
    """

    function: Callable[[Tensor], Tensor]
    can_vary: Callable[[Tensor, Tensor], Tensor]
    rounding: float | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x.clone())

    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        return self.can_vary(lower, upper)


class _Thresholds(Activation):
    """What the fused passes know: outputs between two thresholds."""

    low: Threshold
    high: Threshold
    pairs: ClassVar[bool]
    rounding = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        return fused.activation(x, self)

    def _of_a_copy(self, x: Tensor) -> Tensor:
        return self(x)

    def behind(self, region: Region, fuse: bool) -> tuple[Region, Tensor | None]:
        if not (fuse and isinstance(region, UncutRegion) and self._fits(region.center)):
            return super().behind(region, fuse)
        parts = region.uncut_stack, region.uncut_half, region.reach
        stack, half, varying = fused.through_activation(*parts, self)
        return CenteredRegion(stack, half), varying

    def _fits(self, x: Tensor) -> bool:
        """Whether the passes can pair these activations (N, ...), and the thresholds need no broadcasting."""
        paired = not self.pairs or x.dim() in (2, 4)
        return paired and all(t.dim() == x.dim() for t in (self.low, self.high) if isinstance(t, Tensor))


@dataclass(frozen=True, eq=False)
class Clip(_Thresholds):
    """min(max(x, low), high): ReLU, clipped ReLU and the like.

    Attributes:
        low: a number.
        high: a number, infinite for ReLU, or a tensor (1, ...).
    """

    low: float
    high: Threshold
    pairs: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.low, Real) or not isinstance(self.high, Real | Tensor):
            kinds = type(self.low).__name__, type(self.high).__name__
            raise TypeError(f"Clip needs a number, and a number or tensor above it (math.inf: none), got {kinds}")

    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        return ~((upper <= self.low) | (lower >= self.high))

    def in_dual(self) -> DualActivation:
        return ClippedLine(self.low, self.high)

    def slack(self, region: Region, weight: float) -> Tensor:
        above = torch.relu(region.upper - self.low).mean()
        if not isinstance(self.high, Tensor):
            return above
        return above + weight * torch.relu(self.high - region.lower).mean()


@dataclass(frozen=True, eq=False)
class ClippedMaxMin(_Thresholds):
    """Channels in halves a | b become min(max(a, b), high) | max(min(a, b), low).

    Attributes:
        low, high: tensors (1, C / 2, ...), or numbers, infinite ones for MaxMin that clips nothing.
    """

    low: Threshold
    high: Threshold
    pairs: ClassVar[bool] = True
    elementwise = False

    @property
    def rests(self) -> bool:
        return any(isinstance(end, Tensor) or math.isfinite(end) for end in (self.low, self.high))

    def varying(self, lower: Tensor, upper: Tensor) -> Tensor:
        larger, smaller = _pair_ends(lower, upper)
        return ~torch.cat([larger >= self.high, smaller <= self.low], dim=1)

    def in_dual(self) -> DualActivation:
        return ClippedPairs(self.low, self.high)

    def slack(self, region: Region, weight: float) -> Tensor:
        if not isinstance(self.high, Tensor):
            return super().slack(region, weight)
        larger, smaller = _pair_ends(region.lower, region.upper)
        return torch.relu(self.high - larger).mean() + torch.relu(smaller - self.low).mean()


def _pair_ends(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The lower end of the larger and the upper end of the smaller of each pair; (N, C / 2, ...)."""
    return torch.maximum(*lower.chunk(2, dim=1)), torch.minimum(*upper.chunk(2, dim=1))
