"""What each layer type is: a linear operator, an activation, or a renaming of entries. A walk does the rest.

A rule is a function of a layer and the place where it stands, registered for exactly the types that it is right for.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallip.bound.activations import Activation, Clip, ClippedMaxMin
from locallip.bound.checks import refuse_no_outputs, refuse_width
from locallip.bound.layers import ClampGroupSort, Normalize, ReLU_x
from locallip.bound.norms import Arithmetic
from locallip.bound.operators import Conv, Dense, LinearOperator, Position


@dataclass(frozen=True)
class Reshape:
    """A renaming of entries, in the same order.

    Attributes:
        function: of a tensor (N, ...).
    """

    function: Callable[[Tensor], Tensor]


Meaning = LinearOperator | Activation | Reshape


@dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
        position: in the network.
        shape: of one image's activations before the layer, without the batch.
        like: a tensor of the network's dtype and device.
        arithmetic: how the walk that asks computes.
    """

    position: Position
    shape: torch.Size
    like: Tensor
    arithmetic: Arithmetic


Rule = Callable[[nn.Module, Place], Meaning]
_RULES: dict[type[nn.Module], Rule] = {}


def rule(*layer_types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register what layers of exactly these types are; a subclass may differ and needs a rule of its own."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(layer_types, function))
        return function

    return register


def meaning_of(layer: nn.Module, place: Place) -> Meaning:
    """What a layer is.

    Raises:
        TypeError: if its type has no rule, or the rule does not know such settings; names layer and position.
        ValueError: if it is in training mode and computes otherwise there, or takes activations of another width.
    """
    if type(layer) not in _RULES:
        supported = ", ".join(sorted({layer_type.__name__ for layer_type in _RULES if layer_type is not BatchNormed}))
        raise TypeError(f"no rule for {describe(place.position, layer)}; supported are {supported}")
    refuse_width(layer, place.position, place.shape)
    meaning = _RULES[type(layer)](layer, place)
    if isinstance(meaning, LinearOperator):
        refuse_no_outputs(layer, place.position, place.shape, meaning.output_shape)
    return meaning


def describe(position: Position, layer: nn.Module) -> str:
    """How messages name a layer."""
    return f"{type(layer).__name__} at position {position}"


def _refuse_deployed(place: Place, layer: nn.Module) -> None:
    if place.arithmetic.deployed:
        where = describe(place.position, layer)
        raise TypeError(f"{where}: its rounding in float32 is not bounded; fold it into its neighbour")


def _refuse_training_mode(place: Place, layer: nn.Module) -> None:
    if layer.training:
        raise ValueError(f"{describe(place.position, layer)} is in training mode; call model.eval() first")


# --- linear layers ---------------------------------------------------------------------------------------------------


@rule(nn.Conv2d)
def _convolution(layer: nn.Conv2d, place: Place) -> Conv:
    return Conv.of(layer, place.position, place.shape, place.arithmetic.factors)


@rule(nn.Linear)
def _dense(layer: nn.Linear, place: Place) -> Dense:
    if len(place.shape) != 1:
        raise TypeError(f"{describe(place.position, layer)} needs a Flatten before it")
    return Dense.of(layer, place.position)


@rule(nn.BatchNorm1d, nn.BatchNorm2d)
def _batch_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d, place: Place) -> LinearOperator:
    _refuse_deployed(place, layer)
    return _channelwise(place, *_scale_and_shift(layer, place))


class BatchNormed(nn.Module):
    """A linear layer with batch normalisation right behind it: one affine map, whose norm is below the product's."""

    def __init__(self, linear: nn.Conv2d | nn.Linear, normalization: nn.BatchNorm1d | nn.BatchNorm2d):
        super().__init__()
        self.linear, self.normalization = linear, normalization

    @staticmethod
    def folds(linear: nn.Module, normalization: nn.Module) -> bool:
        """Whether these two, one behind the other, are such a pair."""
        is_norm = type(normalization) in (nn.BatchNorm1d, nn.BatchNorm2d)
        return is_norm and type(linear) in (nn.Conv2d, nn.Linear)


@rule(BatchNormed)
def _batch_normed(layer: BatchNormed, place: Place) -> LinearOperator:
    _refuse_deployed(place, layer.normalization)
    affine = _scale_and_shift(layer.normalization, place)
    return meaning_of(layer.linear, place).rescaled(*affine)


def _scale_and_shift(layer: nn.BatchNorm1d | nn.BatchNorm2d, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in eval mode as scale * x + shift, and the size of the terms of the shift; (C,) each."""
    _refuse_training_mode(place, layer)
    if layer.running_var is None:
        where = describe(place.position, layer)
        raise TypeError(f"{where} keeps no running statistics, so it depends on the batch")
    weight, bias = (1, 0) if layer.weight is None else (layer.weight, layer.bias)
    scale = weight * (layer.running_var + layer.eps).rsqrt()
    center = layer.running_mean * scale
    return scale, bias - center, abs(bias) + center.abs()


@rule(Normalize)
def _normalize(layer: Normalize, place: Place) -> LinearOperator:
    _refuse_deployed(place, layer)
    scale = (1 / layer.std).expand(place.shape[0])
    center = layer.mean * scale
    return _channelwise(place, scale, -center, center.abs())


def _channelwise(place: Place, scale: Tensor, shift: Tensor, shift_size: Tensor) -> LinearOperator:
    """scale * x + shift for every channel, (C,) each, as a convolution with 1x1 kernels or a diagonal matrix."""
    if len(place.shape) == 1:
        identity = Dense(torch.ones_like(scale).diag(), None, place.position)
    else:
        ones = torch.ones_like(scale)[:, None, None, None]
        identity = Conv(ones, None, place.position, place.shape, groups=len(scale), factors=place.arithmetic.factors)
    return identity.rescaled(scale, shift, shift_size)


@rule(nn.AvgPool2d)
def _average_pooling(layer: nn.AvgPool2d, place: Place) -> Conv:
    kernel, stride, padding = _pair(layer.kernel_size), _pair(layer.stride), _pair(layer.padding)
    if layer.ceil_mode or layer.divisor_override or (padding != (0, 0) and not layer.count_include_pad):
        where = describe(place.position, layer)
        raise TypeError(f"{where}: ceil_mode, divisor_override and count_include_pad=False are not supported")
    channels, factors = place.shape[0], place.arithmetic.factors
    weight = place.like.new_full((channels, 1, *kernel), 1 / (kernel[0] * kernel[1]))
    return Conv(weight, None, place.position, place.shape, stride, padding, groups=channels, factors=factors)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


# --- activations -----------------------------------------------------------------------------------------------------


@rule(nn.ReLU)
def _relu(layer: nn.ReLU, place: Place) -> Activation:
    return Clip(0.0, math.inf)


@rule(ReLU_x)
def _clipped_relu(layer: ReLU_x, place: Place) -> Activation:
    return Clip(0.0, layer.threshold)


@rule(ClampGroupSort)
def _clipped_maxmin(layer: ClampGroupSort, place: Place) -> Activation:
    return ClippedMaxMin(layer.min, layer.max)


# --- what changes no number ------------------------------------------------------------------------------------------


def _as_it_is(x: Tensor) -> Tensor:
    return x


@rule(nn.Identity)
def _identity(layer: nn.Identity, place: Place) -> Reshape:
    return Reshape(_as_it_is)


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d)
def _dropout(layer: nn.Dropout | nn.Dropout1d | nn.Dropout2d, place: Place) -> Reshape:
    _refuse_training_mode(place, layer)
    return Reshape(_as_it_is)


@rule(nn.Flatten)
def _flatten(layer: nn.Flatten, place: Place) -> Reshape:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise TypeError(f"{describe(place.position, layer)} must flatten all but the batch")
    return Reshape(layer)
