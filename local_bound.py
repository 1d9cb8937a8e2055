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

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fused_activation import Clip, activation, through_activation
from proven_norm import ProvenNorms
from rounding import ExactArithmetic, Rounding
from spectral_norm import Conv, Dense, LinearOperator, PowerIteration, per_image
from utils import ClampGroupSort, Normalize, ReLU_x

Position = int | str


class Norms(Protocol):
    """Where the walk gets its spectral norms from, whether they make the box, and how rounding is treated.

    The attributes and questions are those of `spectral_norm`.
    """

    local_ball: bool
    roundoffs: tuple[float, float]
    factors: torch.dtype | None

    def whole(self, operator: LinearOperator) -> Tensor:
        """||W||, a scalar."""

    def absolute(self, operator: LinearOperator) -> Tensor:
        """At least || |W| ||, a scalar; asked for only where a roundoff is not 0."""

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
        logit_rounding: (N, K) by how much rounding can change what `worst_logits` adds up; None: exact arithmetic.
        sparsity: scalar, by how much boxes reach where activations vary; None unless `propagate` was asked for it.
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
    logit_rounding: Tensor | None
    sparsity: Tensor | None = None


def propagate(
    model: nn.Sequential,
    x: Tensor,
    epsilon: float | Tensor,
    norms: Norms,
    clip: tuple[float, float] | None = None,
    sparse_threshold: float | None = None,
    fused: bool = True,
    box: bool = True,
) -> Bound:
    """Walk through the network with ball and box.

    Args:
        model: ends in an `nn.Linear`; every layer before it has a registered rule.
        x: (N, ...) images.
        epsilon: L2 radius in the space of x, one for all or one per image (N,).
        norms: answers `whole` and `masked`, e.g. `spectral_norm.PowerIteration(5)`.
        clip: smallest and largest value of a valid image, if the bound need hold for valid images only. x has to be
            valid itself: the box must hold it.
        sparse_threshold: asks for `Bound.sparsity`, in which this is the weight of reaching below a threshold of
            clipped ReLU beside reaching above 0.
        fused: take a linear layer's box through its activation in one step (`fused_activation`) where nothing is
            rounded, or operation by operation, which is slower and gives the same but for rounding.
        box: False takes the ball alone along. Then nothing is known to be constant, local norms are the global ones,
            and the walk costs little more than a forward pass (the bound of GloRo: Leino et al. 2021). `clip` makes
            no use of valid images then, and there is no `sparse_threshold`.

    Raises:
        TypeError: names the first layer without a rule and its position; no layer is ever skipped.
        ValueError: for an epsilon that is negative or NaN, an x outside of `clip`, a `sparse_threshold` without a box,
            norms that allow for rounding and round factors too, or batch normalisation or dropout in training mode.
    """
    valid = (epsilon >= 0).all() if isinstance(epsilon, Tensor) else epsilon >= 0
    if not valid:
        raise ValueError(f"epsilon must not be negative, got {epsilon}")
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    if clip is not None and ((x < clip[0]) | (x > clip[1])).any():
        raise ValueError(f"an image has values outside of {clip}")
    *hidden, (position, last) = _layers(model)
    if type(last) is not nn.Linear:
        raise TypeError(f"the network must end in Linear, not in {_describe(position, last)}")
    if not box and sparse_threshold is not None:
        raise ValueError("how far boxes reach cannot be told without a box")
    walk = (_Walk if box else _BallWalk)(x, epsilon, norms, clip, sparse_threshold, fused)
    for position, layer in hidden:
        _rule_for(position, layer)(walk, position, layer)
    return walk.finish(last)


def _layers(model: nn.Module) -> list[tuple[Position, nn.Module]]:
    """The layers in order: position and module. Within a nested Sequential the position is a string such as "2.0"."""
    if type(model) is not nn.Sequential:
        raise TypeError(f"the network must be an nn.Sequential, got {type(model).__name__}")
    for name, module in model.named_modules():
        if module._forward_hooks or module._forward_pre_hooks:
            where = _describe(name, module) if name else "the network"
            raise TypeError(f"{where} has forward hooks, which can change what it computes")
    layers: list[tuple[Position, nn.Module]] = []
    for position, layer in _flat(model):
        folds = (
            type(layer) in (nn.BatchNorm1d, nn.BatchNorm2d) and layers and type(layers[-1][1]) in (nn.Conv2d, nn.Linear)
        )
        if folds:
            layers[-1] = (layers[-1][0], _BatchNormed(layers[-1][1], layer))
        else:
            layers.append((position, layer))
    if not layers:
        raise TypeError("the network is empty")
    return layers


def _flat(model: nn.Sequential) -> Iterator[tuple[Position, nn.Module]]:
    for position, layer in enumerate(model):
        if type(layer) is nn.Sequential:
            yield from ((f"{position}.{inner}", module) for inner, module in _flat(layer))
        else:
            yield position, layer


class _BatchNormed(nn.Module):
    """A linear layer with batch normalisation right behind it: one affine map, whose norm is below the product's."""

    def __init__(self, linear: nn.Conv2d | nn.Linear, normalization: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        self.linear, self.normalization = linear, normalization


def _describe(position: Position, layer: nn.Module) -> str:
    return f"{type(layer).__name__} at position {position}"


class _Region:
    """A ball's centre and a box, (N, ...) each, the box given by its ends.

    Attributes:
        center, lower, upper: centre of the ball, ends of the box.
        stack: (2N, ...) the centre and the middle of the box, so that a linear layer takes one call for both; (N, ...)
            if they are the same.
        half: half-width of the box; (N, 1, ...) if it is the same for all entries.
    """

    def __init__(self, center: Tensor, lower: Tensor, upper: Tensor):
        self.center, self.lower, self.upper = center, lower, upper

    @cached_property
    def stack(self) -> Tensor:
        return torch.cat([self.center, (self.upper + self.lower) / 2])

    @cached_property
    def half(self) -> Tensor:
        return (self.upper - self.lower) / 2

    def map(self, monotone: Callable[[Tensor], Tensor]) -> _Region:
        """The region behind a monotone function."""
        # First all three: a function that works in place would spoil what the ends are still to be made from.
        center, lower, upper = self.center, self.lower, self.upper
        return _Region(monotone(center), monotone(lower), monotone(upper))

    def reshape(self, shape: Callable[[Tensor], Tensor]) -> _Region:
        """The region with its entries renamed."""
        return self.map(shape)


class _CenteredRegion(_Region):
    """The same, given by stack and half-width."""

    def __init__(self, stack: Tensor, half: Tensor):
        self.stack, self.half = stack, half
        self.center, self._middle = stack[: len(half)], stack[-len(half) :]

    @cached_property
    def lower(self) -> Tensor:
        return self._middle - self.half

    @cached_property
    def upper(self) -> Tensor:
        return self._middle + self.half

    def reshape(self, shape: Callable[[Tensor], Tensor]) -> _Region:
        return _CenteredRegion(shape(self.stack), shape(self.half.expand_as(self.center)))


class _UncutRegion(_Region):
    """The same behind a linear layer: a box still to be intersected with the ball's own box, centre +- reach.

    Attributes:
        uncut_stack, uncut_half: centre, middle and half-width of the box, before the intersection.
        reach: half-width of the ball's own box.
    """

    def __init__(self, uncut_stack: Tensor, uncut_half: Tensor, reach: Tensor):
        self.uncut_stack, self.uncut_half, self.reach = uncut_stack, uncut_half, reach
        self.center, self._middle = uncut_stack[: len(uncut_half)], uncut_stack[-len(uncut_half) :]

    @cached_property
    def lower(self) -> Tensor:
        return torch.maximum(self._middle - self.uncut_half, self.center - self.reach)

    @cached_property
    def upper(self) -> Tensor:
        return torch.minimum(self._middle + self.uncut_half, self.center + self.reach)


class _Point(_Region):
    """The centre of a ball alone."""

    def __init__(self, center: Tensor):
        self.center = center

    def map(self, monotone: Callable[[Tensor], Tensor]) -> _Region:
        return _Point(monotone(self.center))


class _Walk:
    """Ball, box and mask on their way through the layers. The rules below move it; it asks `norms` for the norms."""

    def __init__(
        self,
        x: Tensor,
        epsilon: Tensor,
        norms: Norms,
        clip: tuple[float, float] | None,
        sparse_threshold: float | None,
        fused: bool,
    ):
        if norms.factors is not None and any(norms.roundoffs):
            raise ValueError("norms that allow for rounding cannot round the factors of convolutions too")
        self.norms = norms
        self.sparse_threshold = sparse_threshold
        self.sparsity = None if sparse_threshold is None else x.new_zeros(())
        self.epsilon = epsilon
        # Of this computation, which the ball and the box have to allow for, and of the deployed network.
        self.rounding, self.deployed = (Rounding(u, epsilon) if u else ExactArithmetic() for u in norms.roundoffs)
        self._fused = fused and not any(norms.roundoffs)
        self.region = self._first_box(x, clip)
        self.columns: Tensor | None = None  # (N, ...) which of the current activations can vary; None: all
        self.local_norms: dict[Position, Tensor] = {}
        self.global_norms: dict[Position, Tensor] = {}
        self.varying: dict[Position, Tensor] = {}
        self.masks: dict[Position, tuple[Tensor | None, Tensor | None]] = {}
        self.local_lipschitz = torch.ones_like(epsilon)  # (N,)
        self.global_lipschitz = epsilon.new_ones(())
        self._open: _OpenLayer | None = None

    @property
    def center(self) -> Tensor:
        """(N, ...) the activations of x."""
        return self.region.center

    @property
    def lower(self) -> Tensor:
        """(N, ...) the smallest activations in the ball."""
        return self.region.lower

    @property
    def upper(self) -> Tensor:
        """(N, ...) the largest activations in the ball."""
        return self.region.upper

    def _first_box(self, x: Tensor, clip: tuple[float, float] | None) -> _Region:
        half = per_image(self.epsilon, x)
        if clip is None and not any(self.norms.roundoffs):
            return _CenteredRegion(x, half)
        half = half + self.rounding.widening(x, half)
        lower, upper = x - half, x + half
        if clip is not None:
            lower, upper = lower.clamp(min=clip[0]), upper.clamp(max=clip[1])
        return _Region(x, lower, upper)

    def linear(self, operator: LinearOperator) -> None:
        """Move through W x + b."""
        self._close()
        operator.factors = self.norms.factors
        self._open = _OpenLayer(operator, self.columns)
        lipschitz = self.local_lipschitz if self.norms.local_ball else self.global_lipschitz
        radius = self.epsilon * lipschitz + self.rounding.distance
        length = self._longest(radius)
        self.region = self._region_behind(operator, radius, length)
        self.columns = None
        norm = self.norms.whole(operator)
        self.global_norms[operator.position] = norm
        self.global_lipschitz = self.rounding.at_least(self.global_lipschitz * norm)
        if length is not None:
            absolute = self.norms.absolute(operator)
            self.rounding.pass_layer(operator, norm, absolute, length)
            self.deployed.pass_layer(operator, norm, absolute, length)

    def _region_behind(self, operator: LinearOperator, radius: Tensor, length: Tensor | None) -> _Region:
        """The region behind a linear layer. radius: (N,) of the ball before it. length: see `_longest`."""
        rounding = self.rounding.of_sums(operator, length)
        reach = radius.view(-1, *[1] * len(operator.output_shape)) * operator.row_norms() + rounding
        stack, half = self.region.stack, self.region.half
        if half.shape[1:] == operator.input_shape:
            half = operator.absolute(half)
        else:
            half = operator.absolute(half.new_ones(1, *operator.input_shape)) * half
        return _UncutRegion(operator.affine(stack), half + rounding, reach)

    def _longest(self, radius: Tensor) -> Tensor | None:
        """L2 length (N,) that no vector in box and ball exceeds, nor one that is multiplied; None if nothing asks."""
        if not any(self.norms.roundoffs):
            return None
        largest = torch.maximum(self.lower.abs(), torch.maximum(self.upper.abs(), self.center.abs()))
        return largest.flatten(1).norm(dim=1) + radius

    def elementwise(self, position: Position, layer: nn.Module, varying: Tensor) -> None:
        """Move through a monotone activation that treats every entry by itself and has Lipschitz constant 1.

        varying: (N, ...) entries of which the output can vary in the ball. The others eliminate columns of the next
        linear layer and, if only such activations lie between, rows of the linear layer before.
        """
        self.region = self.region.map(layer)
        self._eliminate(position, varying)

    def clipping(self, position: Position, layer: nn.Module, clip: Clip) -> None:
        """Move through a layer that does what `clip` says. With pairs, only columns of the next linear layer go."""
        before = self.region
        if self.sparsity is not None:
            self.sparsity = self.sparsity + clip.slack(before.lower, before.upper, self.sparse_threshold)
        if self._fused and isinstance(before, _UncutRegion) and clip.fits(before.center):
            stack, half, varying = through_activation(before.uncut_stack, before.uncut_half, before.reach, clip)
            self.region = _CenteredRegion(stack, half)
        else:
            varying = ~clip.constant(before.lower, before.upper)
            self.region = before.map(layer)
        if clip.pairs:
            self.columns = None
            if self._open:
                self._open.rows_follow = False
        self._eliminate(position, varying)

    def _eliminate(self, position: Position, varying: Tensor) -> None:
        self.columns = varying if self.columns is None else varying & self.columns
        self.varying[position] = self.columns
        if self._open and self._open.rows_follow:
            self._open.rows = self.columns.reshape(-1, *self._open.operator.output_shape)

    def reshape(self, shape: Callable[[Tensor], Tensor]) -> None:
        """Move through a layer that only renames entries, in the same order."""
        self.region = self.region.reshape(shape)
        self.columns = None if self.columns is None else shape(self.columns)

    def finish(self, last: nn.Linear) -> Bound:
        """Read off the last hidden layer and pass its value at x through the last layer."""
        self._close()
        radius = self.epsilon * self.local_lipschitz + self.rounding.distance
        length, logit_rounding = self._longest(radius), None
        if length is not None:
            # A millionth more outweighs the rounding of the difference of squares in `worst_logits`, which cancels.
            radius = self.rounding.at_least(radius * (1 + 1e-6))
            logit_rounding = self.rounding.of_logits(last, length) + self.deployed.of_logits(last, length)
        return Bound(
            logits=last(self.center),
            center=self.center,
            lower=self.lower,
            upper=self.upper,
            radius=radius,
            logit_rounding=logit_rounding,
            local_lipschitz=self.local_lipschitz,
            global_lipschitz=self.global_lipschitz,
            local_norms=self.local_norms,
            global_norms=self.global_norms,
            varying=self.varying,
            masks=self.masks,
            last_weight=last.weight,
            last_columns=self.columns,
            sparsity=self.sparsity,
        )

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
        self.local_lipschitz = self.rounding.at_least(self.local_lipschitz * norm)
        self._open = None


class _BallWalk(_Walk):
    """The ball without a box: all that is known of an entry is the radius, so that all of them vary."""

    @property
    def lower(self) -> Tensor:
        return self.center - self._reach()

    @property
    def upper(self) -> Tensor:
        return self.center + self._reach()

    def _reach(self) -> Tensor:
        radius = self.epsilon * self.global_lipschitz + self.rounding.distance
        return per_image(radius * (1 + 1e-6), self.center)  # a millionth more, as in `finish`

    def _first_box(self, x: Tensor, clip: tuple[float, float] | None) -> _Region:
        return _Point(x)

    def _region_behind(self, operator: LinearOperator, radius: Tensor, length: Tensor | None) -> _Region:
        return _Point(operator.affine(self.center))

    def clipping(self, position: Position, layer: nn.Module, clip: Clip) -> None:
        self.region = _Point(activation(self.center, clip)) if self._fused else self.region.map(layer)

    def _eliminate(self, position: Position, varying: Tensor) -> None:
        """Nothing is known to be constant."""


@dataclass
class _OpenLayer:
    """A linear layer whose local norm waits for the activations behind it to say which rows are left.

    Rows follow as long as every activation treats each entry by itself; one that mixes entries ends that.
    """

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
    return _RULES[type(layer)]


def _supported() -> set[str]:
    return {layer_type.__name__ for layer_type in _RULES}


def _refuse_deployed(walk: _Walk, position: Position, layer: nn.Module) -> None:
    if walk.norms.roundoffs[1]:
        raise TypeError(
            f"{_describe(position, layer)}: its rounding in float32 is not bounded; fold it into its neighbour"
        )


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
    _refuse_deployed(walk, position, layer)
    walk.linear(_channelwise(walk, position, *_scale_and_shift(position, layer)))


@rule(_BatchNormed)
def _batch_normed(walk: _Walk, position: Position, layer: _BatchNormed) -> None:
    _refuse_deployed(walk, position, layer.normalization)
    affine = _scale_and_shift(position, layer.normalization)
    walk.linear(_operator(walk, position, layer.linear).rescaled(*affine))


def _scale_and_shift(position: Position, layer: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in eval mode as scale * x + shift, and the size of the terms of the shift; (C,) each."""
    _refuse_training_mode(position, layer)
    if layer.running_var is None:
        raise TypeError(f"{_describe(position, layer)} keeps no running statistics, so it depends on the batch")
    weight, bias = (1, 0) if layer.weight is None else (layer.weight, layer.bias)
    scale = weight * (layer.running_var + layer.eps).rsqrt()
    center = layer.running_mean * scale
    return scale, bias - center, abs(bias) + center.abs()


@rule(Normalize)
def _normalize(walk: _Walk, position: Position, layer: Normalize) -> None:
    _refuse_deployed(walk, position, layer)
    scale = (1 / layer.std).expand(walk.center.shape[1])
    center = layer.mean * scale
    walk.linear(_channelwise(walk, position, scale, -center, center.abs()))


def _channelwise(walk: _Walk, position: Position, scale: Tensor, shift: Tensor, shift_size: Tensor) -> Conv | Dense:
    """scale * x + shift for every channel, (C,) each, as a convolution with 1x1 kernels or a diagonal matrix."""
    if walk.center.dim() == 2:
        identity = Dense(torch.ones_like(scale).diag(), None, position)
    else:
        ones = torch.ones_like(scale)[:, None, None, None]
        identity = Conv(ones, None, position, walk.center.shape[1:], groups=len(scale))
    return identity.rescaled(scale, shift, shift_size)


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
    walk.clipping(position, nn.ReLU() if layer.inplace else layer, Clip(0.0, math.inf))


@rule(ReLU_x)
def _clipped_relu(walk: _Walk, position: Position, layer: ReLU_x) -> None:
    walk.clipping(position, layer, Clip(0.0, layer.threshold))


@rule(ClampGroupSort)
def _clipped_maxmin(walk: _Walk, position: Position, layer: ClampGroupSort) -> None:
    walk.clipping(position, layer, Clip(layer.min, layer.max, pairs=True))


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
    worst = bound.logits + on_faces + _sqrt(radius_left) * _sqrt(free)
    if bound.logit_rounding is None:
        return worst
    # A margin is off by what its two logits are off by.
    rounding = bound.logit_rounding + bound.logit_rounding.gather(1, y[:, None])
    return worst + rounding.scatter(1, y[:, None], 0)


# Rounds of pinning between two looks at whether anything still leaves the box: a GPU is waited for at every look.
_ROUNDS_PER_LOOK = {"cpu": 1, "cuda": 16}


@torch.no_grad()
def _pinned(direction: Tensor, face: Tensor, radius: Tensor, rounds: int) -> Tensor:
    """Which entries (N, K, H) end up on a face when the longest step along `direction` is pushed back into the box."""
    pinned = torch.zeros_like(direction, dtype=torch.bool)
    rounds_per_look = _ROUNDS_PER_LOOK.get(direction.device.type, 1)
    for number in range(1, rounds + 1):
        radius_left = radius**2 - torch.where(pinned, face, 0).square().sum(dim=2, keepdim=True)
        free = torch.where(pinned, 0, direction).square().sum(dim=2, keepdim=True)
        scale = radius_left.clamp(min=0).sqrt() / free.sqrt()  # (N, K, 1); infinite or NaN once nothing is free
        leaves = (direction * scale).abs() > face.abs()
        if number % rounds_per_look == 0 and not (leaves & ~pinned).any():
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


# --- proven certificates ---------------------------------------------------------------------------------------------

# Lanczos steps of the stages of a proof; images that one stage decides do not reach the next.
STAGES = (0, 25, 75, 250)
# Rounds of pinning at most; they end by themselves when nothing leaves the box any more.
_ROUNDS = 1000


@dataclass
class Proof:
    """What `prove` found for N images.

    Attributes:
        logits: (N, K) at x.
        margin: (N,) by how much the label's logit exceeds every other in the whole ball; certified is where it is > 0.
        local_lipschitz: (N,) the upper bound that decided, up to the last hidden layer; the global one where that did.
        global_lipschitz: scalar, upper bound.
        eliminated: two (N, L), the shares of rows and columns that the ball switches off of each local norm.
        decided: number of images that each stage decided; last, how many stayed open to the end.
    """

    logits: Tensor
    margin: Tensor
    local_lipschitz: Tensor
    global_lipschitz: Tensor
    eliminated: tuple[Tensor, Tensor]
    decided: list[int]


@torch.no_grad()
def prove(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    norms: ProvenNorms,
    clip: tuple[float, float] | None = None,
) -> Proof:
    """Certify in stages: global norms first, then more and more Lanczos steps for the images that are still open.

    An image is decided when its margin is positive, or when it would not be with norms at the lower ends of their
    brackets. Only the first certifies; the second saves work. Arguments and errors are those of `propagate`.

    model, x: float64. y: (N,) int64; anything else is a ValueError.
    """
    _refuse_labels(y, x)
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    still_open = torch.arange(len(x), device=x.device)
    decided: list[int] = []
    for steps in STAGES:
        norms.steps = steps
        bound = propagate(model, x[still_open], epsilon[still_open], norms, clip)
        margin, possible = _margins(bound, y[still_open], epsilon[still_open], norms)
        found = [bound.logits, margin, bound.local_lipschitz, *eliminated(bound)]
        if not decided:
            known = [column.clone() for column in found]
        for every, some in zip(known, found):
            every[still_open] = some
        rest = ~(margin > 0) & possible
        decided.append(int((~rest).sum()))
        still_open = still_open[rest]
        if not len(still_open):
            break
    logits, margin, local, *shares = known
    return Proof(logits, margin, local, bound.global_lipschitz, tuple(shares), [*decided, len(still_open)])


def _refuse_labels(y: Tensor, x: Tensor) -> None:
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(f"need one label per image, (N,) int64, got {tuple(y.shape)} {y.dtype} for {len(x)} images")


def _margins(bound: Bound, y: Tensor, epsilon: Tensor, norms: ProvenNorms) -> tuple[Tensor, Tensor]:
    """The margin in the ball (N,), and whether more steps could make it positive (N,) bool."""
    margin = worst_margin(worst_logits(bound, y, _ROUNDS), y)
    if norms.steps == 0:
        # Nothing is known of masked norms yet, but an image that is misclassified stays so.
        return margin, worst_margin(bound.logits, y) > 0
    lowest = torch.ones_like(margin)
    for position in bound.local_norms:
        lowest = lowest * norms.lower[position]
    best = worst_margin(worst_logits(replace(bound, radius=epsilon * lowest), y, _ROUNDS), y)
    return margin, best > 0


def eliminated(bound: Bound) -> tuple[Tensor, Tensor]:
    """Shares (N, L) of the rows and of the columns that the ball switches off, of each of the L local norms."""

    def share(mask: Tensor | None) -> Tensor:
        return torch.zeros_like(bound.radius) if mask is None else (~mask).flatten(1).to(bound.radius.dtype).mean(dim=1)

    if not bound.masks:
        return bound.radius.new_zeros(len(bound.radius), 0), bound.radius.new_zeros(len(bound.radius), 0)
    columns, rows = zip(*bound.masks.values())
    return torch.stack([share(mask) for mask in rows], dim=1), torch.stack([share(mask) for mask in columns], dim=1)


# --- for a network of your own ---------------------------------------------------------------------------------------

# Power iterations of an estimate.
_ITERATIONS = 1000


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
def local_lipschitz(
    model: nn.Sequential,
    x: Tensor,
    epsilon: float | Tensor,
    certificate: str | Norms = "proven",
    failure_probability: float = 1e-6,
) -> Lipschitz:
    """Lipschitz bounds of the whole network, logits included, in the epsilon-balls around x and everywhere.

    Arguments and errors are those of `certify`, which also says what `certificate` means.
    """
    model, x, norms = _prepare(model, x, certificate, failure_probability)
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
    certificate: str | Norms = "proven",
    failure_probability: float = 1e-6,
) -> Tensor:
    """Whether the label y is the network's answer on the whole epsilon-ball around x: (N,) bool.

    A tie, a NaN and an image that is not finite count as no.

    Args:
        model: as for `propagate`; it is not changed. The certificate is for the function that its weights define in
            exact arithmetic.
        x: (N, ...) images.
        y: (N,) labels.
        epsilon: L2 radius in the space of x, one for all or one per image (N,).
        certificate: `proven` computes in float64 with upper bounds on all norms and allows for rounding. `estimate` is
            the published protocol: 1,000 power iterations per norm, which approach the norms from below, in the
            precision of the model. A norms object of your own (see `spectral_norm`) is asked as it is.
        failure_probability: of a proven certificate: that any norm of the call is too small (see `proven_norm`).

    Raises:
        TypeError: names the first layer without a rule and its position.
        ValueError: as `propagate`, for labels of another shape, or for a certificate of another name.
    """
    model, x, norms = _prepare(model, x, certificate, failure_probability)
    return _certified(model, x, y, epsilon, norms)


@torch.no_grad()
def certified_radius(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor | None = None,
    tolerance: float = 1e-3,
    certificate: str | Norms = "proven",
    failure_probability: float = 1e-6,
    limit: float = 1e3,
) -> Tensor:
    """The largest certified epsilon per image, found by bisection: (N,), in the space of x.

    The radius returned was itself certified (0 where the network's answer is not y), and one that is larger by
    `tolerance` at most was not. Images that are certified up to `limit`, which is more than any two images of 0.3
    million pixels in [0, 1] lie apart, get `limit`. Without y, (N,), the network's own answer is the label. Arguments
    otherwise and errors are those of `certify`.
    """
    if not (0 < tolerance < math.inf and 0 < limit < math.inf):
        raise ValueError(f"tolerance and limit must be finite and above 0, got {tolerance} and {limit}")
    # Doubling and halving between the tolerance and the limit, and the question at 0.
    questions = 3 + 2 * math.ceil(max(0.0, math.log2(limit / tolerance)))
    model, x, norms = _prepare(model, x, certificate, failure_probability, questions)
    if y is None:
        # Not by a call of the model, which a layer in training mode would learn from before it is refused.
        y = propagate(model, x, 0.0, norms, box=False).logits.argmax(dim=1)
    good = x.new_zeros(len(x))
    possible = _certified(model, x, y, good, norms)
    bad = torch.full_like(good, min(tolerance, limit))
    growing = possible
    while growing.any():
        growing = growing & _certified(model, x, y, bad, norms)
        good = torch.where(growing, bad, good)
        growing = growing & (bad < limit)
        bad = torch.where(growing, (2 * bad).clamp(max=limit), bad)
    while True:
        middle = (good + bad) / 2
        # In low precision the interval may not shrink to the tolerance.
        splits = possible & (bad - good > tolerance) & (good < middle) & (middle < bad)
        if not splits.any():
            return good
        certified = splits & _certified(model, x, y, middle, norms)
        good, bad = torch.where(certified, middle, good), torch.where(splits & ~certified, middle, bad)


def _prepare(
    model: nn.Sequential, x: Tensor, certificate: str | Norms, failure_probability: float, questions: int = 1
) -> tuple[nn.Sequential, Tensor, Norms]:
    """Model, images and norms of a certificate of that name, good for so many radii."""
    if not isinstance(certificate, str):
        return model, x, certificate
    if certificate == "estimate":
        return model, x, PowerIteration(_ITERATIONS)
    if certificate != "proven":
        raise ValueError(f"the certificate must be 'proven' or 'estimate', got '{certificate}'")
    planned = len(x) * len(_layers(model)) * len(STAGES) * questions
    return copy.deepcopy(model).double(), x.double(), ProvenNorms(failure_probability, planned, steps=STAGES[-1])


def _certified(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float | Tensor, norms: Norms) -> Tensor:
    if isinstance(norms, ProvenNorms):
        margin = prove(model, x, y, epsilon, norms).margin
    else:
        _refuse_labels(y, x)
        bound = propagate(model, x, epsilon, norms)
        margin = worst_margin(worst_logits(bound, y, _ROUNDS), y)
    return (margin > 0) & x.flatten(1).isfinite().all(dim=1)
