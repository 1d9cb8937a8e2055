"""The rules for activations and for the largest entries of windows."""

from __future__ import annotations

import math

from torch import nn

from locallip.bound.activations import Activation, Clip, ClippedMaxMin
from locallip.bound.layers import ClampGroupSort, ReLU_x
from locallip.bound.linear_rules import per_axis
from locallip.bound.pooling import MaxPool, adaptive_windows, sliding_windows
from locallip.bound.rules import Place, refuse, refuse_other_shapes, rule, shape_of


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


# --- the largest entries of windows ----------------------------------------------------------------------------------

_MAXIMA = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_ADAPTIVE_MAXIMA = {nn.AdaptiveMaxPool1d: 1, nn.AdaptiveMaxPool2d: 2, nn.AdaptiveMaxPool3d: 3}


@rule(*_MAXIMA)
def _max_pooling(layer: nn.Module, place: Place) -> Activation:
    axes = _MAXIMA[type(layer)]
    counts = _counts(layer, place, axes)
    settings = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    by_axis = zip(place.shape[1:], counts, *(per_axis(setting, axes) for setting in settings))
    return MaxPool(layer, [sliding_windows(*axis) for axis in by_axis])


@rule(*_ADAPTIVE_MAXIMA)
def _adaptive_max_pooling(layer: nn.Module, place: Place) -> Activation:
    counts = _counts(layer, place, _ADAPTIVE_MAXIMA[type(layer)])
    return MaxPool(layer, [adaptive_windows(*pair) for pair in zip(place.shape[1:], counts)])


def _counts(layer: nn.Module, place: Place, axes: int) -> tuple[int, ...]:
    """How many windows there are along each axis."""
    refuse_other_shapes(place, layer, 1 + axes)
    if layer.return_indices:
        refuse(place, layer, "return_indices makes two outputs; set it to False")
    return shape_of(layer, place)[1:]
