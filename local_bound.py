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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spectral_norm import Conv, Dense, LinearOperator, PowerIteration
from utils import ClampGroupSort, Normalize, ReLU_x

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
        masks: by position of a linear layer, the (columns, rows) that its local norm was taken of; None: all.
        last_weight: (K, H) of the last layer.
        last_columns: (N, H) bool, which of its inputs can vary in the ball; None: all.
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
    masks: dict[Position, tuple[Tensor | None, Tensor | None]]
    last_weight: Tensor
    last_columns: Tensor | None


def propagate(model: nn.Sequential, x: Tensor, epsilon: float | Tensor, norms: Norms) -> Bound:
    """Walk through the network with ball and box.

    Args:
        model: ends in an `nn.Linear`; every layer before it has a registered rule.
        x: (N, ...) images.
        epsilon: L2 radius in the space of x, one for all or one per image (N,).
        norms: answers `whole` and `masked`, e.g. `spectral_norm.PowerIteration(5)`.

    Raises:
        TypeError: names the first layer without a rule and its position; no layer is ever skipped.
        ValueError: for an epsilon that is negative or NaN, or for batch normalisation or dropout in training mode.
    """
    if not (torch.as_tensor(epsilon) >= 0).all():
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    *hidden, (position, last) = _layers(model)
    if type(last) is not nn.Linear:
        raise TypeError(f"the network must end in Linear, not in {_describe(position, last)}")
    walk = _Walk(x, epsilon, norms)
    for position, layer in hidden:
        _rule_for(position, layer)(walk, position, layer)
    return walk.finish(last)


def _layers(model: nn.Module) -> list[tuple[Position, nn.Module]]:
    """The layers in order: position and module. Within a nested Sequential the position is a string such as "2.0"."""
    if type(model) is not nn.Sequential:
        raise TypeError(f"the network must be an nn.Sequential, got {type(model).__name__}")
    if len(model) == 0:
        raise TypeError("the network is empty")
    layers: list[tuple[Position, nn.Module]] = []
    for position, layer in enumerate(model):
        if type(layer) is nn.Sequential:
            layers += [(f"{position}.{inner}", module) for inner, module in _layers(layer)]
        elif isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d) and layers and type(layers[-1][1]) in _LINEAR:
            layers[-1] = (layers[-1][0], _BatchNormed(layers[-1][1], layer))
        else:
            layers.append((position, layer))
    return layers


_LINEAR = (nn.Conv2d, nn.Linear)


class _BatchNormed(nn.Module):
    """A linear layer with batch normalisation right behind it: one affine map, whose norm is below the product's."""

    def __init__(self, linear: nn.Conv2d | nn.Linear, normalization: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        self.linear, self.normalization = linear, normalization


def _describe(position: Position, layer: nn.Module) -> str:
    return f"{type(layer).__name__} at position {position}"


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
        self.masks: dict[Position, tuple[Tensor | None, Tensor | None]] = {}
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
            self._open.rows = self.columns.reshape(-1, *self._open.operator.output_shape)

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
            masks=self.masks,
            last_weight=last.weight,
            last_columns=self.columns,
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
        self.masks[operator.position] = (columns, rows)
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


def rule(*layer_types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register what layers of exactly these types do to the walk; a subclass may differ and needs its own rule."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(layer_types, function))
        return function

    return register


def _rule_for(position: Position, layer: nn.Module) -> Rule:
    if type(layer) not in _RULES:
        raise TypeError(f"no rule for {_describe(position, layer)}; supported are {', '.join(sorted(_supported()))}")
    if layer._forward_hooks or layer._forward_pre_hooks:
        raise TypeError(f"{_describe(position, layer)} has forward hooks, which can change what it computes")
    return _RULES[type(layer)]


def _supported() -> set[str]:
    return {layer_type.__name__ for layer_type in _RULES}


def _refuse_training_mode(position: Position, layer: nn.Module) -> None:
    if layer.training:
        raise ValueError(f"{_describe(position, layer)} is in training mode; call model.eval() first")


@rule(nn.Conv2d, nn.Linear)
def _linear(walk: _Walk, position: Position, layer: nn.Conv2d | nn.Linear) -> None:
    walk.linear(_operator(walk, position, layer))


def _operator(walk: _Walk, position: Position, layer: nn.Conv2d | nn.Linear) -> Conv | Dense:
    shape = walk.center.shape[1:]
    if isinstance(layer, nn.Conv2d):
        return Conv.of(layer, position, shape)
    if len(shape) != 1:
        raise TypeError(f"{_describe(position, layer)} needs a Flatten before it")
    return Dense.of(layer, position)


@rule(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(walk: _Walk, position: Position, layer: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
    walk.linear(_channelwise(walk, position, *_scale_and_shift(position, layer)))


@rule(_BatchNormed)
def _batch_normed(walk: _Walk, position: Position, layer: _BatchNormed) -> None:
    scale_and_shift = _scale_and_shift(position, layer.normalization)
    walk.linear(_operator(walk, position, layer.linear).rescaled(*scale_and_shift))


def _scale_and_shift(position: Position, layer: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Batch normalisation in eval mode as scale * x + shift, (C,) each."""
    _refuse_training_mode(position, layer)
    if layer.running_var is None:
        raise TypeError(f"{_describe(position, layer)} keeps no running statistics, so it depends on the batch")
    weight, bias = (1, 0) if layer.weight is None else (layer.weight, layer.bias)
    scale = weight * (layer.running_var + layer.eps).rsqrt()
    return scale, bias - layer.running_mean * scale


@rule(Normalize)
def _normalize(walk: _Walk, position: Position, layer: Normalize) -> None:
    scale = (1 / layer.std).expand(walk.center.shape[1])
    walk.linear(_channelwise(walk, position, scale, -layer.mean * scale))


def _channelwise(walk: _Walk, position: Position, scale: Tensor, shift: Tensor) -> Conv | Dense:
    """scale * x + shift for every channel, (C,) each, as a convolution with 1x1 kernels or a diagonal matrix."""
    if walk.center.dim() == 2:
        return Dense(scale.diag(), shift, position)
    return Conv(scale[:, None, None, None], shift, position, walk.center.shape[1:], groups=len(scale))


@rule(nn.AvgPool2d)
def _average_pooling(walk: _Walk, position: Position, layer: nn.AvgPool2d) -> None:
    kernel, stride, padding = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding)
    if layer.ceil_mode or layer.divisor_override or (padding != (0, 0) and not layer.count_include_pad):
        raise TypeError(
            f"{_describe(position, layer)}: ceil_mode, divisor_override and count_include_pad=False are not supported"
        )
    channels = walk.center.shape[1]
    weight = walk.center.new_full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    walk.linear(Conv(weight, None, position, walk.center.shape[1:], stride, padding, groups=channels))


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


@rule(nn.Identity)
def _identity(walk: _Walk, position: Position, layer: nn.Identity) -> None:
    """Nothing changes."""


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d)
def _dropout(walk: _Walk, position: Position, layer: nn.Dropout | nn.Dropout1d | nn.Dropout2d) -> None:
    _refuse_training_mode(position, layer)


@rule(nn.Flatten)
def _flatten(walk: _Walk, position: Position, layer: nn.Flatten) -> None:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise TypeError(f"{_describe(position, layer)} must flatten all but the batch")
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
    """CE over K + 1 logits, those at x and the largest wrong one of `worst`; mean over the batch (Leino et al. 2021).

    logits: (N, K) at x. worst: (N, K) from `worst_logits`. y: (N,) labels.
    """
    return F.cross_entropy(_with_worst_class(logits, worst, y), y)


def _with_worst_class(logits: Tensor, worst: Tensor, y: Tensor) -> Tensor:
    return torch.cat([logits, _largest_wrong(worst, y).unsqueeze(1)], dim=1)  # (N, K + 1)


def _largest_wrong(logits: Tensor, y: Tensor) -> Tensor:
    return logits.scatter(1, y[:, None], -torch.inf).amax(dim=1)  # (N,)


# --- for a network of your own ---------------------------------------------------------------------------------------

# Power iterations and rounds of pinning where the caller names none.
_ITERATIONS, _ROUNDS = 1000, 1000


@dataclass
class Lipschitz:
    """Lipschitz bounds of the logits of a network around N images, with respect to the L2 norm in the space of x.

    Attributes:
        local: (N,) valid in the ball around each image.
        everywhere: scalar, valid for every pair of images.
        local_norms: by position of a linear layer, (N,); their product is `local`.
        global_norms: by position of a linear layer, scalar; their product is `everywhere`.
    """

    local: Tensor
    everywhere: Tensor
    local_norms: dict[Position, Tensor]
    global_norms: dict[Position, Tensor]


@torch.no_grad()
def local_lipschitz(model: nn.Sequential, x: Tensor, epsilon: float | Tensor, norms: Norms | None = None) -> Lipschitz:
    """Lipschitz bounds of the whole network, logits included, in the epsilon-balls around x and everywhere.

    Arguments and errors are those of `propagate`. Without `norms` it takes 1,000 power iterations per norm: estimates,
    which approach the norms from below.
    """
    norms = norms or PowerIteration(_ITERATIONS)
    bound = propagate(model, x, epsilon, norms)
    position, last = _layers(model)[-1]
    operator = Dense.of(last, position)
    whole = norms.whole(operator)
    masked = norms.masked(operator, bound.last_columns, None).expand_as(bound.radius)
    return Lipschitz(
        local=bound.local_lipschitz * masked,
        everywhere=bound.global_lipschitz * whole,
        local_norms=bound.local_norms | {position: masked},
        global_norms=bound.global_norms | {position: whole},
    )


@torch.no_grad()
def certify(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    norms: Norms | None = None,
) -> Tensor:
    """Whether the label y is the network's answer on the whole epsilon-ball around x: (N,) bool.

    A tie, a NaN and an image that is not finite count as no. Arguments and errors are those of `propagate`; y: (N,).
    Without `norms` it takes 1,000 power iterations per norm: estimates, which approach the norms from below.
    """
    bound = propagate(model, x, epsilon, norms or PowerIteration(_ITERATIONS))
    return (worst_margin(worst_logits(bound, y, _ROUNDS), y) > 0) & x.flatten(1).isfinite().all(dim=1)


@torch.no_grad()
def certified_radius(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor | None = None,
    tolerance: float = 1e-3,
    norms: Norms | None = None,
) -> Tensor:
    """The largest certified epsilon per image, found by bisection: (N,), in the space of x.

    The radius returned was itself certified (0 where the network's answer is not y), and one that is larger by
    `tolerance` was not. Without y, (N,), the network's own answer is the label. Arguments otherwise and errors are
    those of `propagate`; without `norms` it takes 1,000 power iterations per norm: estimates from below.
    """
    norms = norms or PowerIteration(_ITERATIONS)
    if y is None:
        y = model(x).argmax(dim=1)
    good = x.new_zeros(len(x))
    possible = certify(model, x, y, good, norms)
    bad = torch.full_like(good, tolerance)
    growing = possible
    while growing.any():
        growing = growing & certify(model, x, y, bad, norms)
        good, bad = torch.where(growing, bad, good), torch.where(growing, 2 * bad, bad)
    while (possible & (bad - good > tolerance)).any():
        middle = (good + bad) / 2
        certified = possible & certify(model, x, y, middle, norms)
        good, bad = torch.where(certified, middle, good), torch.where(certified, bad, middle)
    return good
