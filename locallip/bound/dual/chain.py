"""What the dual knows of a network around N images: a chain of linear operators and activations."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from locallip.bound.dual.maxima import DualActivation
from locallip.bound.operators import LinearOperator


@dataclass
class Hidden:
    """One hidden layer around N images; make it with `around`, which checks it.

    Attributes:
        operator, activation: what it computes.
        center: (N, ...) what the operator gives at x, roughly, shaped as the activation takes it: a proof measures what
            it misses.
        norm: (N,) at least the norm of the operator's rows and columns that remain.
        absolute: scalar, at least the norm of the operator's entrywise absolute values.
        rows, columns: (N, ...) bool, which outputs of the operator and of the activation can vary in the
            ball; None: all. For pairs there are no rows.
        lo, hi: (N, ...) ends of the steps from `center` in the ball; None: infinite.
    """

    operator: LinearOperator
    activation: DualActivation
    center: Tensor
    norm: Tensor
    absolute: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None
    lo: Tensor | None = None
    hi: Tensor | None = None

    @classmethod
    def around(
        cls,
        operator: LinearOperator,
        activation: DualActivation,
        center: Tensor,
        norm: Tensor,
        absolute: Tensor,
        rows: Tensor | None = None,
        columns: Tensor | None = None,
        box: tuple[Tensor, Tensor] | None = None,
    ) -> Hidden:
        """Make a layer from the ends (N, ...) of a box that holds the operator's output for all points of the ball.

        Raises:
            ValueError: for rows of pairs, for rows without their columns, and for masks that the box does not show:
                every output that they eliminate must be constant in the box and at `center`.
        """
        if rows is not None and (activation.pairs or columns is None or not torch.equal(rows, columns)):
            raise ValueError("rows are the columns of an elementwise activation, or they are not given")
        if columns is not None:
            if box is None:
                raise ValueError("masks need the box that they come from")
            constant = activation.constant(torch.minimum(box[0], center), torch.maximum(box[1], center))
            if not (constant | columns).all():
                raise ValueError("an output that can vary in the box is not among the remaining columns")
        lo, hi = (None, None) if box is None else _steps(center, *box)
        norm = norm.expand(len(center))
        return cls(operator, activation, center, norm, absolute, rows, columns, lo, hi)


def _steps(center: Tensor, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of a box less its centre, rounded outwards, by enough for the sums of two of them as well."""
    slack = 16 * torch.finfo(center.dtype).eps
    lo = lower - center - slack * (lower.abs() + center.abs())
    hi = upper - center + slack * (upper.abs() + center.abs())
    return torch.where(lo.isnan(), -torch.inf, lo), torch.where(hi.isnan(), torch.inf, hi)


@dataclass
class Chain:
    """A network around N images.

    Attributes:
        x: (N, ...) the images.
        epsilon: (N,) L2 radius.
        hidden: the hidden layers in order.
        weight, bias: (K, H) and (K,) of the last layer.
        lo, hi: (N, ...) ends of the steps from x to valid images; None: all images count.
    """

    x: Tensor
    epsilon: Tensor
    hidden: list[Hidden]
    weight: Tensor
    bias: Tensor
    lo: Tensor | None = None
    hi: Tensor | None = None

    def within(self, pixels: tuple[float, float] | None) -> Chain:
        """The same, for an attacker who is bound to pixels between two values."""
        if pixels is None:
            return replace(self, lo=None, hi=None)
        lower, upper = (torch.full_like(self.x, end) for end in pixels)
        lo, hi = _steps(self.x, lower, upper)
        return replace(self, lo=lo.clamp(max=0), hi=hi.clamp(min=0))

    def take(self, images: Tensor) -> Chain:
        """The chain around those images, in that order; indices may repeat."""
        hidden = [replace(layer, **_taken(layer, images, _LAYERWISE)) for layer in self.hidden]
        return replace(self, hidden=hidden, **_taken(self, images, _IMAGEWISE))

    def without_boxes(self) -> Chain:
        """The chain with infinite boxes: less to compute, and the dual makes little of them."""
        return replace(self, hidden=[replace(layer, lo=None, hi=None) for layer in self.hidden])

    def reference_masks(self) -> list[Tensor | None]:
        """Which entries of the references c_0 ... c_(m-1) may differ from 0; None: all."""
        return [None, *(layer.columns for layer in self.hidden[:-1])]


_LAYERWISE = ("center", "norm", "rows", "columns", "lo", "hi")
_IMAGEWISE = ("x", "epsilon", "lo", "hi")


def _taken(of: Hidden | Chain, images: Tensor, names: tuple[str, ...]) -> dict[str, Tensor | None]:
    values = {field.name: getattr(of, field.name) for field in fields(of) if field.name in names}
    return {name: None if value is None else value[images] for name, value in values.items()}


@dataclass(frozen=True)
class Scale:
    """The powers of two by which a scaled chain differs.

    Attributes:
        values: of the steps of the input and of every hidden layer, m + 1 numbers.
        output: of the margin.
    """

    values: list[float]
    output: float


def single(chain: Chain, slope: Tensor) -> tuple[Chain, Tensor, Scale]:
    """The chain in float32, brought to scale: radii, norms and the longest slope between 1/2 and 1 at most.

    Only powers of two are taken out, so nothing is rounded but to float32. Operators lose their bias, which steps do
    not need.

    slope: (N, H) row of the margin in question. Returns the chain, the slope and what was taken out.
    """
    values = [_power(chain.epsilon)]
    hidden = []
    for layer in chain.hidden:
        factor = _power(layer.norm)
        operator = layer.operator.divided(factor, torch.float32)
        values.append(values[-1] * factor)
        steps = {name: getattr(layer, name) for name in ("center", "lo", "hi")}
        steps = {name: None if step is None else (step / values[-1]).float() for name, step in steps.items()}
        activation = layer.activation.converted(torch.float32, 1 / values[-1])
        norm = (layer.norm / factor).float()
        hidden.append(replace(layer, operator=operator, activation=activation, norm=norm, **steps))
    scale = Scale(values, _power(slope.norm(dim=1)) * values[-1])
    pixels = [None if end is None else (end / values[0]).float() for end in (chain.lo, chain.hi)]
    x, epsilon = (chain.x / values[0]).float(), (chain.epsilon / values[0]).float()
    scaled = Chain(x, epsilon, hidden, chain.weight.float(), chain.bias.float(), *pixels)
    return scaled, (slope * (values[-1] / scale.output)).float(), scale


def _power(sizes: Tensor) -> float:
    """The power of two next above the largest of some sizes; 1 where there is none."""
    largest = float(sizes.max()) if sizes.numel() else 1.0
    return 2.0 ** max(-300, min(300, math.frexp(largest)[1])) if 0 < largest < math.inf else 1.0
