"""Calls of functions that are layers too: convolutions, activations, pooling."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip.bound.calls import Call, NoTranslationError, Step, Translation, means
from locallip.bound.plain import View

# --- linear layers ---------------------------------------------------------------------------------------------------


def _with(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """A layer that has these tensors in place of its parameters and buffers, which they need not be themselves."""
    for name, tensor in tensors.items():
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
        object.__setattr__(layer, name, tensor)
    return layer.eval()


@means(F.linear)
def _linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Step:
    layer = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    return Step(_with(layer, weight=weight, bias=bias), (input,))


@means("matmul", "mm", "__matmul__")
def _matmul(call: Call, input: Tensor, other: Tensor) -> Step:
    if call.depends(other):
        raise NoTranslationError("multiplies by activations, so that no Lipschitz constant is known")
    if (input.dim(), other.dim()) != (2, 2):
        raise NoTranslationError("has a rule for activations (N, features) times a matrix alone")
    layer = nn.Linear(*other.shape, bias=False, device="meta")
    return Step(_with(layer, weight=other.t(), bias=None), (input,), (other,))


def _convolution(kind: type[nn.Module]) -> Translation:
    def translation(
        call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> Step:  # fmt: skip
        channels, kernel = (weight.shape[1] * groups, len(weight)), weight.shape[2:]
        layer = kind(*channels, kernel, stride, padding, dilation, groups, bias=False, device="meta")
        return Step(_with(layer, weight=weight, bias=bias), (input,))

    return translation


def _transposed_convolution(kind: type[nn.Module]) -> Translation:
    def translation(
        call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        output_padding: Any = 0, groups: int = 1, dilation: Any = 1,
    ) -> Step:  # fmt: skip
        channels, kernel = (len(weight), weight.shape[1] * groups), weight.shape[2:]
        geometry = (stride, padding, output_padding, groups)
        layer = kind(*channels, kernel, *geometry, bias=False, dilation=dilation, device="meta")
        return Step(_with(layer, weight=weight, bias=bias), (input,))

    return translation


means("conv1d", F.conv1d)(_convolution(nn.Conv1d))
means("conv2d", F.conv2d)(_convolution(nn.Conv2d))
means("conv3d", F.conv3d)(_convolution(nn.Conv3d))
means("conv_transpose1d", F.conv_transpose1d)(_transposed_convolution(nn.ConvTranspose1d))
means("conv_transpose2d", F.conv_transpose2d)(_transposed_convolution(nn.ConvTranspose2d))


@means(F.batch_norm)
def _batch_norm(
    call: Call, input: Tensor, running_mean: Tensor | None, running_var: Tensor | None, weight: Tensor | None = None,
    bias: Tensor | None = None, training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Step:  # fmt: skip
    kind = {4: nn.BatchNorm2d, 5: nn.BatchNorm3d}.get(input.dim(), nn.BatchNorm1d)
    layer = kind(input.shape[1], eps, affine=False, track_running_stats=False, device="meta")
    layer = _with(layer, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
    return Step(layer.train(training), (input,))


# --- activations and pooling -----------------------------------------------------------------------------------------

# Layers that take the arguments of the call behind its input.
_LAYERS: dict[type[nn.Module], tuple[Any, ...]] = {
    nn.ReLU: ("relu", F.relu, F.relu_, Tensor.relu_),
    nn.ReLU6: (F.relu6,),
    nn.LeakyReLU: (F.leaky_relu, F.leaky_relu_),
    nn.Hardtanh: (F.hardtanh, F.hardtanh_),
    nn.Sigmoid: ("sigmoid", "sigmoid_", F.sigmoid, torch.special.expit),
    nn.Tanh: ("tanh", "tanh_", F.tanh),
    nn.Softplus: (F.softplus,),
    nn.ELU: (F.elu, F.elu_),
    nn.SELU: ("selu", F.selu),
    nn.CELU: ("celu", F.celu),
    nn.GELU: (F.gelu,),
    nn.SiLU: (F.silu,),
    nn.Mish: (F.mish,),
    nn.Hardsigmoid: (F.hardsigmoid,),
    nn.Hardswish: (F.hardswish,),
    nn.Softsign: (F.softsign,),
    nn.LogSigmoid: (F.logsigmoid,),
    nn.Dropout: (F.dropout,),
    nn.Dropout1d: (F.dropout1d,),
    nn.Dropout2d: (F.dropout2d,),
    nn.AvgPool1d: (F.avg_pool1d,),
    nn.AvgPool2d: (F.avg_pool2d,),
    nn.AdaptiveAvgPool1d: (F.adaptive_avg_pool1d,),
    nn.AdaptiveAvgPool2d: (F.adaptive_avg_pool2d,),
    nn.AdaptiveMaxPool2d: (F.adaptive_max_pool2d,),
}


def _layer(kind: type[nn.Module]) -> Translation:
    def translation(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Step:
        return Step(kind(*args, **kwargs).eval(), (input,))

    return translation


def _dropout(kind: type[nn.Module]) -> Translation:
    def translation(call: Call, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Step:
        if training and p > 0:
            raise NoTranslationError("drops activations in eval mode too; call it with training=self.training")
        return Step(kind(p).eval(), (input,))

    return translation


for _kind, _functions in _LAYERS.items():
    means(*_functions)(_dropout(_kind) if issubclass(_kind, nn.modules.dropout._DropoutNd) else _layer(_kind))


def _max_pooling(kind: type[nn.Module]) -> Translation:
    def translation(
        call: Call, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Step:  # fmt: skip
        return Step(kind(kernel_size, stride, padding, dilation, return_indices, ceil_mode), (input,))

    return translation


means("max_pool1d", F.max_pool1d)(_max_pooling(nn.MaxPool1d))
means("max_pool2d", F.max_pool2d)(_max_pooling(nn.MaxPool2d))


@means(F.prelu, "prelu")
def _prelu(call: Call, input: Tensor, weight: Tensor) -> Step:
    return Step(_with(nn.PReLU(weight.numel(), device="meta"), weight=weight), (input,))


@means("softmax", F.softmax)
def _softmax(call: Call, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Step:
    return Step(nn.Softmax(dim), (input,))


@means("log_softmax", F.log_softmax)
def _log_softmax(call: Call, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Step:
    return Step(nn.LogSoftmax(dim), (input,))


@means("clamp", "clamp_", "clip", "clip_")
def _clamp(call: Call, input: Tensor, min: float | None = None, max: float | None = None) -> Step:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise NoTranslationError("has tensors for ends, which have no rule")
    return Step(nn.Hardtanh(-math.inf if min is None else min, math.inf if max is None else max), (input,))


@means("clamp_min", "clamp_min_")
def _clamp_min(call: Call, input: Tensor, min: float) -> Step:
    return _clamp(call, input, min)


@means("mean")
def _mean(call: Call, input: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Step:
    dims = sorted(d % input.dim() for d in ([dim] if isinstance(dim, int) else dim))
    if input.dim() != 4 or dims != [2, 3]:
        raise NoTranslationError("is understood over the pixels of maps (N, C, H, W) alone")
    pooled = Step(nn.AvgPool2d(tuple(input.shape[2:])), (input,))
    return pooled if keepdim else Step(View(input.shape[1:2]), (pooled,))
