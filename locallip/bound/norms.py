"""What the walk asks for spectral norms: the exchangeable part of the bound.

`power_iteration.PowerIteration` answers with differentiable estimates from below (the published method),
`proven_norms.ProvenNorms` with brackets that hold the norms. Masks are (N, *shape) booleans, True where something is
left; None switches nothing off. Rows are a layer's outputs, columns its inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from locallip.bound.operators import LinearOperator


class Bracket(NamedTuple):
    """Both ends of what is known about a norm, scalars or (N,); an estimate has both ends the same."""

    lower: Tensor
    upper: Tensor


@dataclass(frozen=True)
class Arithmetic:
    """How a walk computes, and whose rounding it allows for.

    Attributes:
        own: unit roundoff of the walk's own arithmetic; 0 takes it as exact.
        deployed: the same of the network that the bound is for.
        factors: what convolutions round their factors to before they multiply, such as torch.bfloat16; None: nothing.
        looks_for_underflow: whether what is exact but for underflow is NaN where that has made it too small: norms,
            products of norms, and the bound where a box has become a point. Training does not look, which on a GPU
            takes longer than what is looked at.

    Raises:
        ValueError: where factors are rounded though rounding has to be allowed for.
    """

    own: float = 0.0
    deployed: float = 0.0
    factors: torch.dtype | None = None
    looks_for_underflow: bool = True

    def __post_init__(self) -> None:
        if self.factors is not None and self.allows_for_rounding:
            raise ValueError("norms that allow for rounding cannot round the factors of convolutions too")

    @property
    def allows_for_rounding(self) -> bool:
        return bool(self.own or self.deployed)


class Norms(Protocol):
    """Where the walk gets its norms from.

    Attributes:
        arithmetic: how the walk is to compute.
        local_ball: whether the ball that bounds the box shrinks with the local norms so far, or with the global ones.
    """

    arithmetic: Arithmetic
    local_ball: bool

    def whole(self, operator: LinearOperator) -> Bracket:
        """||W||, scalars."""

    def absolute(self, operator: LinearOperator) -> Tensor:
        """At least || |W| ||, a scalar; asked for only where rounding is allowed for."""

    def masked(self, operator: LinearOperator, rows: Tensor | None, columns: Tensor | None, whole: Bracket) -> Bracket:
        """||D_rows W D_columns|| for every image: (N,), or scalars where nothing is switched off.

        rows: (N, *output_shape), columns: (N, *input_shape). whole: what `whole` answered for this operator.
        """
