"""Local Lipschitz bounds: the method of Huang et al., NeurIPS 2021 (arXiv 2111.01395).

`propagate` walks once through a network with three things in hand: the activations at x, the radius of a ball around
them, and a box, both of which hold the activations of every x' with ||x' - x||_2 <= epsilon. From the box it reads
which activations cannot vary in the ball (paper, section 3.2); the linear layers lose those rows and columns, and the
norms of what is left multiply to the local Lipschitz bound. `worst_logits` turns ball and box at the last hidden layer
into bounds on the logits, `bcp_loss` and `gloro_loss` into losses.

The norms come from an exchangeable object (see `spectral_norm`), and what a layer does to ball, box and mask is
registered per layer type with `@rule`. All radii are in the space of x, which is pixel space for every network here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_norm import Conv, Dense, LinearOperator
from utils import ClampGroupSort, ReLU_x

Position = int | str


class Norms(Protocol):
    """Where the walk gets its spectral norms from."""

    def whole(self, operator: LinearOperator) -> Tensor:
        """||W||, a scalar."""

    def masked(self, operator: LinearOperator, in_mask: Tensor | None, out_mask: Tensor | None) -> Tensor:
        """||D_out W D_in|| for every image: (N,). Masks are (N, ...) booleans; None switches nothing off."""


@dataclass
class Bound:
    """What `propagate` knows about a batch of N images, K classes and H units in the last hidden layer.

    Attributes:
        logits: (N, K) at x.
        center, lower, upper: (N, H) the last hidden layer: its value at x, and the box that holds it in the whole ball.
        radius: (N,) ball radius at the last hidden layer: epsilon times the product of the local norms.
        local_lipschitz: (N,) product of the local norms.
        global_lipschitz: scalar, product of the global norms.
        local_norms: by position in the network, (N,).
        global_norms: by position in the network, scalar.
        varying: by position, (N, ...) bool: which outputs of that layer can vary in the ball. At an activation it gives
            the columns that remain of the next linear layer, at a linear layer the rows that remain of itself.
        last_weight: (K, H) of the last layer.
    """

    logits: Tensor
    center: Tensor
    lower: Tensor
    upper: Tensor
    radius: Tensor
    local_lipschitz: Tensor
    global_lipschitz: Tensor
    local_norms: dict[Position, Tensor]
    global_norms: dict[Position, Tensor]
    varying: dict[Position, Tensor]
    last_weight: Tensor


def propagate(model: nn.Sequential, x: Tensor, epsilon: float | Tensor, norms: Norms) -> Bound:
    """Walk through the network with ball and box.

    Args:
        model: ends in an `nn.Linear`; every layer before it has a registered rule.
        x: (N, ...) images.
        epsilon: L2 radius in the space of x, one for all or one per image (N,).
        norms: answers `whole` and `masked`, e.g. `spectral_norm.PowerIteration(5)`.

    Raises:
        TypeError: names the first layer without a rule and its position; no layer is ever skipped.
        ValueError: for a negative epsilon.
    """
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    layers = list(_layers(model))
    if not layers or type(layers[-1][1]) is not nn.Linear:
        raise TypeError(f"the network must end in nn.Linear, {_describe(*layers[-1]) if layers else 'but is empty'}")
    walk = _Walk(x, epsilon, norms)
    for position, layer in layers[:-1]:
        if type(layer) not in _RULES:
            raise TypeError(f"no rule for {_describe(position, layer)}")
        _RULES[type(layer)](walk, position, layer)
    return walk.finish(layers[-1][1])


def _layers(model: nn.Sequential) -> Iterator[tuple[Position, nn.Module]]:
    if type(model) is not nn.Sequential:
        raise TypeError(f"the network must be an nn.Sequential, got {type(model).__name__}")
    return enumerate(model)


def _describe(position: Position, layer: nn.Module) -> str:
    return f"layer {type(layer).__name__} at position {position}"


def _broadcast(per_image: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ...), with as many dimensions as `like`."""
    return per_image.view(-1, *[1] * (like.dim() - 1))


class _Walk:
    """Ball, box and mask on their way through the layers. The rules below move it; it asks `norms` for the norms."""

    def __init__(self, x: Tensor, epsilon: Tensor, norms: Norms):
        self.norms = norms
        self.epsilon = epsilon
        self.center = x
        self.lower = x - _broadcast(epsilon, x)
        self.upper = x + _broadcast(epsilon, x)
        self.columns: Tensor | None = None  # (N, ...) which of the current activations can vary; None: all
        self.local_norms: dict[Position, Tensor] = {}
        self.global_norms: dict[Position, Tensor] = {}
        self.varying: dict[Position, Tensor] = {}
        self.local_lipschitz = torch.ones_like(epsilon)  # (N,)
        self.global_lipschitz = epsilon.new_ones(())
        self._open: _OpenLayer | None = None

    def linear(self, operator: LinearOperator) -> None:
        """Move through W x + b."""
        self._close()
        self._open = _OpenLayer(operator, self.columns)
        radius = _broadcast(self.epsilon * self.global_lipschitz, self.center)
        reach = radius.view(-1, *[1] * len(operator.output_shape)) * operator.row_norms()
        middle, half = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        self.center, middle = operator.affine(torch.cat([self.center, middle])).chunk(2)
        half = operator.absolute(half)
        self.lower = torch.maximum(middle - half, self.center - reach)
        self.upper = torch.minimum(middle + half, self.center + reach)
        self.columns = None
        self.global_norms[operator.position] = self.norms.whole(operator)
        self.global_lipschitz = self.global_lipschitz * self.global_norms[operator.position]

    def elementwise(self, position: Position, layer: nn.Module, varying: Tensor) -> None:
        """Move through a monotone activation that treats every entry by itself.

        varying: (N, ...) entries of which the output can vary in the ball. The others eliminate columns of the next
        linear layer and, if only such activations lie between, rows of the linear layer before.
        """
        self._apply_monotone(layer)
        self.columns = varying if self.columns is None else varying & self.columns
        self.varying[position] = self.columns
        if self._open and self._open.rows_follow:
            self._open.rows = self.columns.view(-1, *self._open.operator.output_shape)

    def mixing(self, position: Position, layer: nn.Module, varying: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Move through a monotone activation that mixes entries and has Lipschitz constant 1.

        varying: gives (N, ...) from the box behind the activation. Only columns of the next linear layer go.
        """
        self._apply_monotone(layer)
        self.columns = varying(self.lower, self.upper)
        self.varying[position] = self.columns
        if self._open:
            self._open.rows_follow = False

    def reshape(self, shape: Callable[[Tensor], Tensor]) -> None:
        """Move through a layer that only renames entries, in the same order."""
        self.center, self.lower, self.upper = shape(self.center), shape(self.lower), shape(self.upper)
        self.columns = None if self.columns is None else shape(self.columns)

    def finish(self, last: nn.Linear) -> Bound:
        """Read off the last hidden layer and pass its value at x through the last layer."""
        self._close()
        return Bound(
            logits=last(self.center),
            center=self.center,
            lower=self.lower,
            upper=self.upper,
            radius=self.epsilon * self.local_lipschitz,
            local_lipschitz=self.local_lipschitz,
            global_lipschitz=self.global_lipschitz,
            local_norms=self.local_norms,
            global_norms=self.global_norms,
            varying=self.varying,
            last_weight=last.weight,
        )

    def _apply_monotone(self, layer: nn.Module) -> None:
        self.center, self.lower, self.upper = layer(self.center), layer(self.lower), layer(self.upper)

    def _close(self) -> None:
        """Ask for the local norm of the last linear layer, now that its rows are known."""
        if self._open is None:
            return
        operator, columns, rows = self._open.operator, self._open.columns, self._open.rows
        norm = self.norms.masked(operator, columns, rows).expand_as(self.epsilon)
        if rows is not None:
            self.varying[operator.position] = rows
        self.local_norms[operator.position] = norm
        self.local_lipschitz = self.local_lipschitz * norm
        self._open = None


@dataclass
class _OpenLayer:
    """A linear layer whose local norm waits for the activation behind it to say which rows are left."""

    operator: LinearOperator
    columns: Tensor | None
    rows: Tensor | None = None
    rows_follow: bool = True


# --- what each layer type does ---------------------------------------------------------------------------------------

Rule = Callable[[_Walk, Position, nn.Module], None]
_RULES: dict[type[nn.Module], Rule] = {}


def rule(layer_type: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register what a layer of exactly this type does to the walk. Subclasses may compute anything, so they need theirs."""

    def register(function: Rule) -> Rule:
        _RULES[layer_type] = function
        return function

    return register


@rule(nn.Conv2d)
def _conv2d(walk: _Walk, position: Position, layer: nn.Conv2d) -> None:
    walk.linear(Conv(layer, position, walk.center.shape[1:]))


@rule(nn.Linear)
def _linear(walk: _Walk, position: Position, layer: nn.Linear) -> None:
    if walk.center.dim() != 2:
        raise TypeError(f"{_describe(position, layer)} needs a Flatten before it")
    walk.linear(Dense(layer, position, walk.center.shape[1:]))


@rule(nn.Flatten)
def _flatten(walk: _Walk, position: Position, layer: nn.Flatten) -> None:
    walk.reshape(layer)


@rule(nn.ReLU)
def _relu(walk: _Walk, position: Position, layer: nn.ReLU) -> None:
    # In place, the layer would write over the box before it.
    walk.elementwise(position, nn.ReLU() if layer.inplace else layer, ~(walk.upper <= 0))


@rule(ReLU_x)
def _clipped_relu(walk: _Walk, position: Position, layer: ReLU_x) -> None:
    walk.elementwise(position, layer, ~(walk.upper <= 0) & ~(walk.lower > layer.threshold))


@rule(ClampGroupSort)
def _clipped_maxmin(walk: _Walk, position: Position, layer: ClampGroupSort) -> None:
    def varying(lower: Tensor, upper: Tensor) -> Tensor:
        first, second = lower.chunk(2, dim=1)[0], upper.chunk(2, dim=1)[1]
        return torch.cat([~(first >= layer.max), ~(second <= layer.min)], dim=1)

    walk.mixing(position, layer, varying)


# --- worst-case logits and losses ------------------------------------------------------------------------------------


def worst_logits(bound: Bound, y: Tensor, rounds: int = 1) -> Tensor:
    """Upper bounds on the logits of the wrong classes, relative to the label's: (N, K).

    Entry j is f_j + max (w_j - w_y) . delta over the ball and the box at the last hidden layer, entry y is f_y. Every
    number of rounds gives an upper bound; more rounds use more of the box (paper, section 3.4).

    y: (N,) labels. rounds: how often entries that leave the box are pinned to its face.
    """
    direction = bound.last_weight - bound.last_weight[y].unsqueeze(1)  # (N, K, H)
    to_upper = (bound.upper - bound.center).unsqueeze(1)  # (N, 1, H)
    to_lower = (bound.lower - bound.center).unsqueeze(1)
    face = torch.where(direction > 0, to_upper, to_lower)  # (N, K, H) where the box ends in that direction
    radius = bound.radius[:, None, None]
    pinned = _pinned(direction, face, radius, rounds)

    # At the optimum over the pinned entries, the free part is parallel to the direction with what radius is left.
    on_faces = torch.where(pinned, direction * face, 0).sum(dim=2)  # (N, K)
    radius_left = radius.squeeze(2) ** 2 - torch.where(pinned, face, 0).square().sum(dim=2)
    free = torch.where(pinned, 0, direction).square().sum(dim=2)
    return bound.logits + on_faces + _sqrt(radius_left) * _sqrt(free)


@torch.no_grad()
def _pinned(direction: Tensor, face: Tensor, radius: Tensor, rounds: int) -> Tensor:
    """Which entries (N, K, H) end up on a face when the longest step along `direction` is pushed back into the box."""
    pinned = torch.zeros_like(direction, dtype=torch.bool)
    for _ in range(rounds):
        radius_left = radius**2 - torch.where(pinned, face, 0).square().sum(dim=2, keepdim=True)
        free = torch.where(pinned, 0, direction).square().sum(dim=2, keepdim=True)
        scale = radius_left.clamp(min=0).sqrt() / free.sqrt()  # (N, K, 1); infinite or NaN once nothing is free
        leaves = (direction * scale).abs() > face.abs()
        if not (leaves & ~pinned).any():
            break
        pinned |= leaves
    return pinned


def _sqrt(x: Tensor) -> Tensor:
    """Square root with slope 0 at 0; below 0, where only rounding can lead, 0."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1).sqrt(), torch.where(x.isnan(), x, 0))


def gloro_logits(bound: Bound, y: Tensor, rounds: int = 1) -> Tensor:
    """The logits at x with the largest worst-case wrong logit as one more class: (N, K + 1)."""
    return _with_worst_class(bound.logits, worst_logits(bound, y, rounds), y)


def worst_margin(worst: Tensor, y: Tensor) -> Tensor:
    """By how much the label's logit exceeds every other in the whole ball: (N,). Certified is where it is > 0.

    A tie gives 0, and a NaN in any logit a NaN; neither is > 0.

    worst: (N, K) from `worst_logits`. y: (N,) labels.
    """
    return worst.gather(1, y[:, None]).squeeze(1) - _largest_wrong(worst, y)


def bcp_loss(logits: Tensor, worst: Tensor, y: Tensor, kappa: float | Tensor) -> Tensor:
    """kappa CE(logits, y) + (1 - kappa) CE(worst, y), the mean over the batch (BCP: Lee et al. 2020).

    logits: (N, K) at x. worst: (N, K) from `worst_logits`. y: (N,) labels.
    """
    return kappa * F.cross_entropy(logits, y) + (1 - kappa) * F.cross_entropy(worst, y)


def gloro_loss(logits: Tensor, worst: Tensor, y: Tensor) -> Tensor:
    """CE over K + 1 logits, those at x and the largest wrong one of `worst`, the mean over the batch (Leino et al. 2021).

    logits: (N, K) at x. worst: (N, K) from `worst_logits`. y: (N,) labels.
    """
    return F.cross_entropy(_with_worst_class(logits, worst, y), y)


def _with_worst_class(logits: Tensor, worst: Tensor, y: Tensor) -> Tensor:
    return torch.cat([logits, _largest_wrong(worst, y).unsqueeze(1)], dim=1)  # (N, K + 1)


def _largest_wrong(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)  # (N,)
