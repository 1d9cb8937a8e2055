"""Calls that only tensors have: arithmetic, joins, and what changes no number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from locallip.bound.calls import Call, NoTranslationError, Step, means
from locallip.bound.plain import Add, Affine, Concatenate, Extremum, Select, View
from locallip.bound.seen import tensors_in
from locallip.bound.selection import places_of

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


def _exact(constant: float | Tensor) -> float | Tensor:
    """To compute with: a result in lower precision would be another constant than the network's."""
    return constant.double() if isinstance(constant, Tensor) else constant


def _made_from(value: Any) -> tuple[Tensor, ...]:
    return (value,) if isinstance(value, Tensor) else ()


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
    shift = _constant(second, first)
    if signs[1] == 1:
        return Step(Affine(float(signs[0]), shift), (first,))
    return Step(Affine(float(signs[0]), signs[1] * _exact(shift)), (first,), _made_from(second))


@means("add", "add_")
def _add(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Step:
    return _sum(call, input, other, (1, alpha))


@means("sub", "sub_", "subtract", "subtract_")
def _subtract(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Step:
    return _sum(call, input, other, (1, -alpha))


@means("rsub", Tensor.__rsub__)
def _subtract_from(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Step:
    return _sum(call, input, other, (-alpha, 1))


@means("mul", "mul_", "multiply", "multiply_")
def _multiply(call: Call, input: Any, other: Any) -> Step:
    if call.depends(input) and call.depends(other):
        raise NoTranslationError("multiplies activations, which is not Lipschitz; x * sigmoid(x) is nn.SiLU")
    if not call.depends(input):
        input, other = other, input
    return Step(Affine(scale=_constant(other, input)), (input,))


@means("div", "div_", "divide", "divide_", "true_divide")
def _divide(call: Call, input: Any, other: Any, *, rounding_mode: str | None = None) -> Step:
    if call.depends(other) or rounding_mode is not None:
        raise NoTranslationError("divides by activations, or rounds")
    return Step(Affine(scale=1 / _exact(_constant(other, input))), (input,), _made_from(other))


@means("neg", "neg_", "negative", "negative_")
def _negative(call: Call, input: Tensor) -> Step:
    return Step(Affine(scale=-1.0), (input,))


@means("cat", torch.concat, torch.concatenate)
def _concatenate(call: Call, tensors: Sequence[Tensor], dim: int = 0, *, axis: int | None = None) -> Step:
    dim = (dim if axis is None else axis) % tensors[0].dim()
    if dim == 0:
        raise NoTranslationError("joins batches; give it a dim above 0")
    if not all(call.depends(tensor) for tensor in tensors):
        raise NoTranslationError("joins activations with constants")
    return Step(Concatenate(dim), tuple(tensors))


_LARGER = (torch.maximum, torch.max, Tensor.maximum, Tensor.max)
_ALONE = (
    "has no rule but in cat([max(a, b), min(a, b)], 1) of the halves a and b of the channels; local_bound.MaxMin and "
    "GroupSort, which sort channels, have one"
)


@means("maximum", "minimum", "max", "min")
def _extremum(call: Call, input: Any, other: Any = None, *args: Any, **kwargs: Any) -> Step:
    both = call.depends(input) and call.depends(other)
    if not both or args or kwargs or input.shape != other.shape:
        raise NoTranslationError(_ALONE)
    return Step(Extremum(call.function in _LARGER), (input, other), alone=_ALONE)


# --- moves of entries ------------------------------------------------------------------------------------------------

_MOVES = (
    *("permute", "transpose", "swapaxes", "swapdims", "movedim", "moveaxis", "flip", "fliplr", "flipud", "rot90"),
    *("roll", "narrow", "select", "index_select", "repeat_interleave", "tile", "broadcast_to"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
)
_MOVES_OF_TENSORS = (Tensor.__getitem__, Tensor.repeat, Tensor.expand, Tensor.unfold)
_MOVES_APART = ("chunk", "split", "tensor_split", "unbind")


@means(*_MOVES, *_MOVES_OF_TENSORS, *_MOVES_APART, F.pad, F.unfold, F.interpolate)
def _move(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> tuple[Step, ...]:
    constants = tuple(tensors_in((args, kwargs)))
    if any(map(call.depends, constants)):
        raise NoTranslationError("takes from the images which entries to move")
    rounds = call.function is F.interpolate
    try:
        found = places_of(lambda x: call.function(x, *args, **kwargs), input.shape[1:], input, len(input), rounds)
    except ValueError as error:
        raise NoTranslationError(str(error)) from None
    return tuple(Step(Select(places), (input,), constants) for places in found)


# --- what changes no number ------------------------------------------------------------------------------------------


@means("reshape", "view", "flatten", "squeeze", "unsqueeze", "unflatten", "view_as")
def _view(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Step:
    if call.result.dtype != input.dtype:
        raise NoTranslationError("reads the bits of numbers as others")
    if call.result.dim() < 2 or len(call.result) != len(input):
        raise NoTranslationError("mixes images; the first dimension must stay the batch")
    return Step(View(call.result.shape[1:]), (input,))


@means("clone", "detach", "contiguous", "positive", "alias", Tensor.requires_grad_)
def _as_it_is(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Step:
    return Step(None, (input,))


@means("to", "type", "type_as", "float", "double", "half", "bfloat16", "cpu", "cuda")
def _convert(call: Call, input: Tensor, *args: Any, **kwargs: Any) -> Step:
    if not isinstance(call.result, Tensor) or call.result.dtype != input.dtype:
        raise NoTranslationError("rounds to another dtype; a certificate computes in float64, so leave the dtype alone")
    return Step(None, (input,))
