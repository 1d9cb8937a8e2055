"""Function calls as layers: every call that a network may make means what a layer with the same rule means.

A translation takes the arguments of a call and gives `Step`s. What is not in the table is an obstacle.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip.bound.plain import Add, Affine, Concatenate, View


@dataclass(frozen=True)
class Step:
    """A layer that a call means, and what it is applied to: activations of the network, or further steps.

    Attributes:
        layer: None stands for what changes no number.
    """

    layer: nn.Module | None
    inputs: tuple[Tensor | Step, ...]


@dataclass(frozen=True)
class Call:
    """A call as a translation sees it.

    Attributes:
        depends: whether a value comes from the images.
        result: what the call has returned.
    """

    depends: Callable[[Any], bool]
    result: Any


class NoTranslationError(TypeError):
    """A call with arguments that mean no layer; the message says why."""


Translation = Callable[..., Step]
_TABLE: dict[Callable[..., Any], Translation] = {}


def translate(function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], call: Call) -> Step:
    """The steps that a call means.

    Raises:
        NoTranslationError: where there are none.
    """
    if function not in _TABLE:
        raise NoTranslationError("has no rule")
    try:
        return _TABLE[function](call, *args, **kwargs)
    except NoTranslationError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise NoTranslationError(f"has arguments without a rule ({error})") from None


def _means(*functions: Callable[..., Any] | str) -> Callable[[Translation], Translation]:
    """Register a translation for functions; a name stands for the function of torch and the method of tensors."""

    def register(translation: Translation) -> Translation:
        for function in functions:
            owners = (torch, Tensor) if isinstance(function, str) else ()
            found = [getattr(owner, function, None) for owner in owners] or [function]
            _TABLE.update({f: translation for f in found if callable(f)})
        return translation

    return register


# --- linear layers ---------------------------------------------------------------------------------------------------


def _with(layer: nn.Module, **tensors: Tensor | None) -> nn.Module:
    """A layer that has these tensors in place of its parameters and buffers, which they need not be themselves."""
    for name, tensor in tensors.items():
        layer._parameters.pop(name, None)
        layer._buffers.pop(name, None)
        object.__setattr__(layer, name, tensor)
    return layer.eval()


@_means(F.linear)
def _linear(call: Call, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Step:
    layer = nn.Linear(weight.shape[1], len(weight), bias=False, device="meta")
    return Step(_with(layer, weight=weight, bias=bias), (input,))


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


_means("conv1d", F.conv1d)(_convolution(nn.Conv1d))
_means("conv2d", F.conv2d)(_convolution(nn.Conv2d))
_means("conv3d", F.conv3d)(_convolution(nn.Conv3d))
_means("conv_transpose1d", F.conv_transpose1d)(_transposed_convolution(nn.ConvTranspose1d))
_means("conv_transpose2d", F.conv_transpose2d)(_transposed_convolution(nn.ConvTranspose2d))


@_means(F.batch_norm)
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
        return Step(kind(p).train(training and p > 0), (input,))

    return translation


for _kind, _functions in _LAYERS.items():
    _means(*_functions)(_dropout(_kind) if issubclass(_kind, nn.modules.dropout._DropoutNd) else _layer(_kind))


def _max_pooling(kind: type[nn.Module]) -> Translation:
    def translation(
        call: Call, input: Tensor, kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
        ceil_mode: bool = False, return_indices: bool = False,
    ) -> Step:  # fmt: skip
        return Step(kind(kernel_size, stride, padding, dilation, return_indices, ceil_mode), (input,))

    return translation


_means("max_pool1d", F.max_pool1d)(_max_pooling(nn.MaxPool1d))
_means("max_pool2d", F.max_pool2d)(_max_pooling(nn.MaxPool2d))


@_means(F.prelu, "prelu")
def _prelu(call: Call, input: Tensor, weight: Tensor) -> Step:
    return Step(_with(nn.PReLU(weight.numel(), device="meta"), weight=weight), (input,))


@_means("softmax", F.softmax)
def _softmax(call: Call, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Step:
    return Step(nn.Softmax(dim), (input,))


@_means("log_softmax", F.log_softmax)
def _log_softmax(call: Call, input: Tensor, dim: int | None = None, *args: Any, **kwargs: Any) -> Step:
    return Step(nn.LogSoftmax(dim), (input,))


@_means("clamp", "clamp_", "clip", "clip_")
def _clamp(call: Call, input: Tensor, min: float | None = None, max: float | None = None) -> Step:
    if isinstance(min, Tensor) or isinstance(max, Tensor):
        raise NoTranslationError("has tensors for ends, which have no rule")
    return Step(nn.Hardtanh(-math.inf if min is None else min, math.inf if max is None else max), (input,))


@_means("clamp_min", "clamp_min_")
def _clamp_min(call: Call, input: Tensor, min: float) -> Step:
    return _clamp(call, input, min)


@_means("mean")
def _mean(call: Call, input: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Step:
    dims = sorted(d % input.dim() for d in ([dim] if isinstance(dim, int) else dim))
    if input.dim() != 4 or dims != [2, 3]:
        raise NoTranslationError("is understood over the pixels of maps (N, C, H, W) alone")
    pooled = Step(nn.AvgPool2d(tuple(input.shape[2:])), (input,))
    return pooled if keepdim else Step(View(input.shape[1:2]), (pooled,))


# --- arithmetic ------------------------------------------------------------------------------------------------------


def _constant(value: Any, like: Tensor) -> float | Tensor:
    """A number, or a tensor over one image's activations."""
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, Tensor) or value.is_complex():
        raise NoTranslationError(f"is asked about a {type(value).__name__}")
    if value.dim() == like.dim():
        if len(value) != 1:
            raise NoTranslationError("has a constant of its own for every image")
        value = value[0]
    if value.dim() > like.dim() or torch.broadcast_shapes(value.shape, like.shape[1:]) != like.shape[1:]:
        raise NoTranslationError("makes its input larger by broadcasting")
    return value if value.is_floating_point() else value.to(like.dtype)


def _scaled(x: Tensor, scale: float) -> Tensor | Step:
    return x if scale == 1 else Step(Affine(scale=float(scale)), (x,))


def _sum(call: Call, first: Any, second: Any, signs: tuple[float, float]) -> Step:
    """signs[0] * first + signs[1] * second, where one of them may be a constant."""
    if call.depends(first) and call.depends(second):
        if first.shape != second.shape:
            raise NoTranslationError(f"adds activations of shapes {tuple(first.shape)} and {tuple(second.shape)}")
        return Step(Add(), (_scaled(first, signs[0]), _scaled(second, signs[1])))
    if not call.depends(first):
        first, second, signs = second, first, signs[::-1]
    return Step(Affine(float(signs[0]), signs[1] * _constant(second, first)), (first,))


@_means("add", "add_")
def _add(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Step:
    return _sum(call, input, other, (1, alpha))


@_means("sub", "sub_", "subtract", "subtract_")
def _subtract(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Step:
    return _sum(call, input, other, (1, -alpha))


@_means("rsub", Tensor.__rsub__)
def _subtract_from(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Step:
    return _sum(call, input, other, (-alpha, 1))


@_means("mul", "mul_", "multiply", "multiply_")
def _multiply(call: Call, input: Any, other: Any) -> Step:
    if call.depends(input) and call.depends(other):
        raise NoTranslationError("multiplies activations with each other, which is not Lipschitz")
    if not call.depends(input):
        input, other = other, input
    return Step(Affine(scale=_constant(other, input)), (input,))


@_means("div", "div_", "divide", "divide_", "true_divide")
def _divide(call: Call, input: Any, other: Any, *, rounding_mode: str | None = None) -> Step:
    if call.depends(other) or rounding_mode is not None:
        raise NoTranslationError("divides by activations, or rounds")
    return Step(Affine(scale=1 / _constant(other, input)), (input,))


@_means("neg", "neg_", "negative", "negative_")
def _negative(call: Call, input: Tensor) -> Step:
    return Step(Affine(scale=-1.0), (input,))


@_means("cat", torch.concat, torch.concatenate)
def _concatenate(call: Call, tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None) -> Step:
    dim = (dim if axis is None else axis) % tensors[0].dim()
    if dim == 0:
        raise NoTranslationError("joins batches; give it a dim above 0")
    if not all(call.depends(tensor) for tensor in tensors):
        raise NoTranslationError("joins activations with constants")
    return Step(Concatenate(dim), tuple(tensors))


# --- what changes no number ------------------------------------------------------------------------------------------


@_means("reshape", "view", "flatten", "squeeze", "unsqueeze", "unflatten", "view_as", "reshape_as")
def _view(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Step:
    if call.result.dtype != input.dtype:
        raise NoTranslationError("reads the bits of numbers as others")
    if call.result.dim() < 2 or len(call.result) != len(input):
        raise NoTranslationError("mixes images; the first dimension must stay the batch")
    return Step(View(call.result.shape[1:]), (input,))


@_means("clone", "detach", "contiguous", "positive", "alias", Tensor.requires_grad_, Tensor.data.__get__)
def _as_it_is(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Step:
    return Step(None, (input,))


@_means("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda")
def _convert(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Step:
    if not isinstance(call.result, Tensor) or call.result.dtype != input.dtype:
        raise NoTranslationError("rounds to another dtype; a certificate computes in float64, so leave the dtype alone")
    return Step(None, (input,))
