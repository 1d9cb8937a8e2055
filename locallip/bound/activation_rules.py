"""The rules for activations and for the largest entries of windows."""

from __future__ import annotations

import math

from torch import nn

from locallip.bound import curves
from locallip.bound.activations import Activation, Clip, ClippedMaxMin
from locallip.bound.curves import Bent
from locallip.bound.layers import ClampGroupSort, GroupSort, MaxMin, ReLU_x
from locallip.bound.pooling import MaxPool, adaptive_windows, sliding_windows
from locallip.bound.rules import (
    Place,
    refuse,
    refuse_other_shapes,
    refuse_training_mode,
    rule,
    shape_of,
    window_settings,
)
from locallip.bound.sorting import SortedGroups


@rule(nn.ReLU)
def _relu(layer: nn.ReLU, place: Place) -> Activation:
    return Clip(0.0, math.inf)


@rule(nn.ReLU6, nn.Hardtanh)
def _hardtanh(layer: nn.ReLU6 | nn.Hardtanh, place: Place) -> Activation:
    return Clip(float(layer.min_val), float(layer.max_val))


@rule(ReLU_x)
def _clipped_relu(layer: ReLU_x, place: Place) -> Activation:
    return Clip(0.0, layer.threshold)


@rule(ClampGroupSort)
def _clipped_maxmin(layer: ClampGroupSort, place: Place) -> Activation:
    return ClippedMaxMin(layer.min, layer.max)


@rule(MaxMin)
def _maxmin(layer: MaxMin, place: Place) -> Activation:
    if place.shape[0] % 2:
        refuse(place, layer, f"pairs the channels, so their number must be even, not {place.shape[0]}")
    return ClippedMaxMin(-math.inf, math.inf)


@rule(GroupSort)
def _groupsort(layer: GroupSort, place: Place) -> Activation:
    if place.shape[0] % layer.group_size:
        refuse(place, layer, f"{place.shape[0]} channels cannot be shared out in groups of {layer.group_size}")
    return SortedGroups(layer.group_size)


# --- entry by entry --------------------------------------------------------------------------------------------------


@rule(nn.LeakyReLU)
def _leaky_relu(layer: nn.LeakyReLU, place: Place) -> Activation:
    if math.isnan(layer.negative_slope):
        refuse(place, layer, "its negative_slope is NaN")
    return Bent(float(layer.negative_slope))


@rule(nn.RReLU)
def _randomized_relu(layer: nn.RReLU, place: Place) -> Activation:
    refuse_training_mode(place, layer)
    return Bent((layer.lower + layer.upper) / 2)


@rule(nn.PReLU)
def _learnt_relu(layer: nn.PReLU, place: Place) -> Activation:
    slopes = layer.weight
    if len(slopes) not in (1, place.shape[0]):
        refuse(place, layer, f"has {len(slopes)} slopes for {place.shape[0]} channels")
    return Bent(slopes.view(1, -1, *[1] * (len(place.shape) - 1)))


@rule(nn.Sigmoid)
def _sigmoid(layer: nn.Sigmoid, place: Place) -> Activation:
    return curves.sigmoid()


@rule(nn.Tanh)
def _tanh(layer: nn.Tanh, place: Place) -> Activation:
    return curves.tanh()


@rule(nn.Softsign)
def _softsign(layer: nn.Softsign, place: Place) -> Activation:
    return curves.softsign()


@rule(nn.Tanhshrink)
def _tanhshrink(layer: nn.Tanhshrink, place: Place) -> Activation:
    return curves.tanhshrink()


@rule(nn.LogSigmoid)
def _logsigmoid(layer: nn.LogSigmoid, place: Place) -> Activation:
    return curves.logsigmoid()


@rule(nn.Softplus)
def _softplus(layer: nn.Softplus, place: Place) -> Activation:
    _refuse_unless_positive(layer, place, "beta")
    if not layer.threshold >= 20:
        refuse(
            place, layer, f"jumps where it goes over to x, at a threshold of {layer.threshold}; 20 or more is supported"
        )
    return curves.softplus(float(layer.beta), float(layer.threshold))


@rule(nn.ELU)
def _elu(layer: nn.ELU, place: Place) -> Activation:
    _refuse_unless_positive(layer, place, "alpha")
    return curves.elu(float(layer.alpha))


@rule(nn.CELU)
def _celu(layer: nn.CELU, place: Place) -> Activation:
    _refuse_unless_positive(layer, place, "alpha")
    return curves.elu(float(layer.alpha), width=float(layer.alpha))


@rule(nn.SELU)
def _selu(layer: nn.SELU, place: Place) -> Activation:
    return curves.elu(1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _refuse_unless_positive(layer: nn.Module, place: Place, name: str) -> None:
    value = getattr(layer, name)
    if not value > 0:
        refuse(place, layer, f"{name} must be above 0, got {value}")


@rule(nn.GELU)
def _gelu(layer: nn.GELU, place: Place) -> Activation:
    return curves.gelu(layer.approximate)


@rule(nn.SiLU)
def _silu(layer: nn.SiLU, place: Place) -> Activation:
    return curves.silu()


@rule(nn.Mish)
def _mish(layer: nn.Mish, place: Place) -> Activation:
    return curves.mish()


@rule(nn.Hardsigmoid)
def _hardsigmoid(layer: nn.Hardsigmoid, place: Place) -> Activation:
    return curves.hardsigmoid()


@rule(nn.Hardswish)
def _hardswish(layer: nn.Hardswish, place: Place) -> Activation:
    return curves.hardswish()


# --- the largest entries of windows ----------------------------------------------------------------------------------

_MAXIMA = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_ADAPTIVE_MAXIMA = {nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3}


@rule(*_MAXIMA)
def _max_pooling(layer: nn.Module, place: Place) -> Activation:
    axes = _MAXIMA[type(layer)]
    counts = _counts(layer, place, axes)
    by_axis = zip(place.shape[1:], counts, *window_settings(layer, place, axes), strict=True)
    return MaxPool(layer, [sliding_windows(*axis) for axis in by_axis])


@rule(*_ADAPTIVE_MAXIMA)
def _adaptive_max_pooling(layer: nn.Module, place: Place) -> Activation:
    counts = _counts(layer, place, _ADAPTIVE_MAXIMA[type(layer)])
    return MaxPool(layer, [adaptive_windows(*pair) for pair in zip(place.shape[1:], counts, strict=True)])


def _counts(layer: nn.Module, place: Place, axes: int) -> tuple[int, ...]:
    """How many windows there are along each axis."""
    refuse_other_shapes(place, layer, 1 + axes)
    if layer.return_indices:
        refuse(place, layer, "return_indices makes two outputs; set it to False")
    return shape_of(layer, place)[1:]
