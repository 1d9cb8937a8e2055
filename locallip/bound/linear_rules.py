"""The rules for linear layers, and for those that change no number."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from locallip.bound.composites import Scaling
from locallip.bound.layers import Normalize
from locallip.bound.operators import Conv, Dense, LinearOperator
from locallip.bound.pooling import AveragePool, adaptive_windows, averages, sliding_windows
from locallip.bound.rules import (
    BatchNormed,
    Place,
    Reshape,
    describe,
    meaning_of,
    refuse,
    refuse_other_shapes,
    refuse_training_mode,
    refusing_what_fails,
    rule,
    shape_of,
    window_settings,
)
from locallip.bound.selection import Selection, places_of
from locallip.bound.settings import per_axis
from locallip.bound.transposed import TransposedConv


def _refuse_deployed(place: Place, layer: nn.Module) -> None:
    if place.arithmetic.deployed:
        refuse(place, layer, "its rounding in float32 is not bounded; fold it into its neighbour")


@rule(nn.Conv1d, nn.Conv2d, nn.Conv3d)
def _convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, place: Place) -> Conv:
    refuse_other_shapes(place, layer, 1 + len(layer.kernel_size))
    return Conv.of(layer, place.position, place.shape, place.arithmetic.factors)


@rule(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
def _transposed_convolution(layer: nn.Module, place: Place) -> TransposedConv:
    axes = len(layer.kernel_size)
    refuse_other_shapes(place, layer, 1 + axes)
    settings = (layer.stride, layer.padding, layer.dilation, layer.output_padding)
    stride, padding, dilation, output_padding = (per_axis(setting, axes) for setting in settings)
    if any(more >= step for more, step in zip(output_padding, stride, strict=True)):
        refuse(place, layer, "output_padding is supported where it is smaller than the stride")
    spans = [d * (k - 1) + 1 - 2 * p for d, k, p in zip(dilation, layer.kernel_size, padding, strict=True)]
    by_axis = zip(place.shape[1:], stride, spans, output_padding, strict=True)
    shape = torch.Size([layer.out_channels, *((size - 1) * step + span + more for size, step, span, more in by_axis)])
    geometry = (stride, padding, dilation, layer.groups, place.arithmetic.factors)
    return TransposedConv(Conv(layer.weight, None, place.position, shape, *geometry), layer.bias)


@rule(nn.Linear)
def _dense(layer: nn.Linear, place: Place) -> Dense:
    refuse_other_shapes(place, layer, 1)
    return Dense.of(layer, place.position)


# --- normalisation ---------------------------------------------------------------------------------------------------

_BATCH_NORM_DIMS = {nn.BatchNorm1d: (1, 2), nn.BatchNorm2d: (3,), nn.BatchNorm3d: (4,)}


@rule(*_BATCH_NORM_DIMS)
def _batch_norm(layer: nn.Module, place: Place) -> LinearOperator:
    _refuse_deployed(place, layer)
    refuse_other_shapes(place, layer, *_BATCH_NORM_DIMS[type(layer)])
    parts = (part.view(-1, *[1] * (len(place.shape) - 1)) for part in _scale_and_shift(layer, place))
    scale, shift, shift_size = parts
    return Scaling(scale, shift, place.position, place.shape, shift_size)


@rule(BatchNormed)
def _batch_normed(layer: BatchNormed, place: Place) -> LinearOperator:
    behind = replace(place, position=layer.position)
    _refuse_deployed(behind, layer.normalization)
    affine = _scale_and_shift(layer.normalization, behind)
    return meaning_of(layer.linear, place).rescaled(*affine)


def _scale_and_shift(layer: nn.Module, place: Place) -> tuple[Tensor, Tensor, Tensor]:
    """Batch normalisation in eval mode as scale * x + shift, and the size of the terms of the shift; (C,) each."""
    refuse_training_mode(place, layer)
    if layer.running_var is None:
        where = describe(place.position, layer)
        raise TypeError(
            f"{where} keeps no running statistics, so it depends on the batch; train it with track_running_stats=True"
        )
    scale = (layer.running_var + layer.eps).rsqrt() * (1 if layer.weight is None else layer.weight)
    center = layer.running_mean * scale
    bias = torch.zeros_like(center) if layer.bias is None else layer.bias
    return scale, bias - center, bias.abs() + center.abs()


@rule(Normalize)
def _normalize(layer: Normalize, place: Place) -> LinearOperator:
    _refuse_deployed(place, layer)
    refuse_other_shapes(place, layer, 3)
    scale = (1 / layer.std).expand(place.shape[0])
    center = layer.mean * scale
    return _channelwise(place, scale, -center, center.abs())


def _channelwise(place: Place, scale: Tensor, shift: Tensor, shift_size: Tensor) -> LinearOperator:
    """scale * x + shift for every channel, (C,) each, as a convolution with 1x1 kernels or a diagonal matrix."""
    if len(place.shape) == 1:
        identity = Dense(torch.ones_like(scale).diag(), None, place.position)
    else:
        ones = torch.ones_like(scale).view(-1, *[1] * len(place.shape))
        identity = Conv(ones, None, place.position, place.shape, groups=len(scale), factors=place.arithmetic.factors)
    return identity.rescaled(scale, shift, shift_size)


# --- average pooling -------------------------------------------------------------------------------------------------

_AVERAGES = {nn.AvgPool1d: 1, nn.AvgPool2d: 2, nn.AvgPool3d: 3}
_ADAPTIVE = {nn.AdaptiveAvgPool1d: 1, nn.AdaptiveAvgPool2d: 2, nn.AdaptiveAvgPool3d: 3}


@rule(*_AVERAGES)
def _average_pooling(layer: nn.Module, place: Place) -> LinearOperator:
    axes = _AVERAGES[type(layer)]
    refuse_other_shapes(place, layer, 1 + axes)
    kernel, stride, padding = window_settings(layer, place, axes)
    counts_padding = layer.count_include_pad or not any(padding)
    divisor = getattr(layer, "divisor_override", None) or 0
    if counts_padding and not layer.ceil_mode and not divisor:
        channels, factors = place.shape[0], place.arithmetic.factors
        weight = place.like.new_full((channels, 1, *kernel), 1 / math.prod(kernel))
        return Conv(weight, None, place.position, place.shape, stride, padding, groups=channels, factors=factors)
    matrices = []
    by_axis = zip(place.shape[1:], shape_of(layer, place)[1:], kernel, stride, padding, strict=True)
    for number, axis in enumerate(by_axis):
        size, count, side, step, pad = axis
        if divisor:
            terms = [1 if number else abs(divisor)] * count
        else:  # of a window that ceil_mode lets stand out, what lies in the padding counts
            terms = [min(side, size + 2 * pad - at * step) for at in range(count)] if counts_padding else None
        matrices.append(averages(sliding_windows(*axis), size, place.like, terms))
    pool = AveragePool(matrices, place.shape[0], place.position)
    return pool.with_weight(-pool.weight) if divisor < 0 else pool


@rule(*_ADAPTIVE)
def _adaptive_average_pooling(layer: nn.Module, place: Place) -> LinearOperator:
    axes = _ADAPTIVE[type(layer)]
    refuse_other_shapes(place, layer, 1 + axes)
    sizes = place.shape[1:]
    counts = shape_of(layer, place)[1:]
    matrices = [averages(adaptive_windows(*pair), pair[0], place.like) for pair in zip(sizes, counts, strict=True)]
    return AveragePool(matrices, place.shape[0], place.position)


# --- moves of entries ------------------------------------------------------------------------------------------------


@rule(nn.ZeroPad1d, nn.ZeroPad2d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ReflectionPad1d, nn.ReflectionPad2d)
@rule(nn.ReplicationPad1d, nn.ReplicationPad2d, nn.CircularPad1d, nn.CircularPad2d)
@rule(nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Unfold, nn.Upsample, nn.UpsamplingNearest2d)
def _move(layer: nn.Module, place: Place) -> Selection:
    with refusing_what_fails(layer, place):
        (places,) = places_of(layer, place.shape, place.like, rounds=isinstance(layer, nn.Upsample))
    return Selection.of(places, place.position, place.shape, place.like)


# --- what changes no number ------------------------------------------------------------------------------------------


def _as_it_is(x: Tensor) -> Tensor:
    return x


@rule(nn.Unflatten)
def _unflatten(layer: nn.Unflatten, place: Place) -> Reshape:
    if layer.dim in (0, -1 - len(place.shape)):
        refuse(place, layer, "mixes images; the first dimension must stay the batch")
    shape = shape_of(layer, place)
    return Reshape(lambda x: x.reshape(len(x), *shape))


@rule(nn.Identity)
def _identity(layer: nn.Identity, place: Place) -> Reshape:
    return Reshape(_as_it_is)


@rule(nn.Dropout, nn.Dropout1d, nn.Dropout2d)
def _dropout(layer: nn.Dropout | nn.Dropout1d | nn.Dropout2d, place: Place) -> Reshape:
    refuse_training_mode(place, layer)
    return Reshape(_as_it_is)


@rule(nn.Flatten)
def _flatten(layer: nn.Flatten, place: Place) -> Reshape:
    if (layer.start_dim, layer.end_dim) != (1, -1):
        raise TypeError(f"{describe(place.position, layer)} must flatten all but the batch")
    return Reshape(layer)
