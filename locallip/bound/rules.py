"""What each layer type is: a linear operator, an activation, or a renaming of entries. A walk does the rest.

A rule is a function of a layer and the place where it stands, registered for exactly the types that it is right for.
The rules for PyTorch's layers, and for those of `layers`, are in `linear_rules` and `activation_rules`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Real
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from locallip.bound.activations import Activation
from locallip.bound.checks import refuse_no_outputs, refuse_width
from locallip.bound.joins import Join
from locallip.bound.nodes import Obstacle, Refusal
from locallip.bound.norms import Arithmetic
from locallip.bound.operators import LinearOperator, Position
from locallip.bound.seen import first_line
from locallip.bound.settings import per_axis


@dataclass(frozen=True)
class Reshape:
    """A renaming of entries, in the same order.

    Attributes:
        function: of a tensor (N, ...).
    """

    function: Callable[[Tensor], Tensor]


Meaning = LinearOperator | Activation | Reshape | Join


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
# What each class computed when its rule was written: who replaces that has another function than the rule's.
# What the call of a module goes through.
METHODS = ("__call__", "_wrapped_call_impl", "_call_impl", "forward", "_conv_forward", "_output_padding")


def _methods(kind: type[nn.Module]) -> list[Any]:
    return [getattr(kind, name, None) for name in METHODS]


_METHODS: dict[type[nn.Module], list[Any]] = {nn.Sequential: _methods(nn.Sequential)}


def rule(*layer_types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register what layers of exactly these types are; a subclass may differ and needs a rule of its own.

    Raises:
        TypeError: for anything but classes of layers, and for a class whose rule is another function by name or module:
            no rule is replaced by accident, but may be defined again.
    """
    wrong = [kind for kind in layer_types if not (isinstance(kind, type) and issubclass(kind, nn.Module))]
    if wrong or not layer_types:
        got = ", ".join(map(first_line, wrong)) or "none"
        raise TypeError(f"rule() takes classes of layers, as in @rule(MyLayer), and got {got}")

    def register(function: Rule) -> Rule:
        for kind in layer_types:
            if _name(_RULES.get(kind, function)) != _name(function):
                raise TypeError(f"{kind.__name__} has a rule already; write yours for a subclass of it")
        _RULES.update(dict.fromkeys(layer_types, function))
        _METHODS.update({layer_type: _methods(layer_type) for layer_type in layer_types})
        return function

    return register


def _name(function: Rule) -> tuple[Any, Any]:
    """Module and name of a rule, which need not be a plain function."""
    return getattr(function, "__module__", None), getattr(function, "__qualname__", type(function))


def _is_ours(function: Rule) -> bool:
    return str(_name(function)[0]).partition(".")[0] == __name__.partition(".")[0]


def meaning_of(layer: nn.Module, place: Place) -> Meaning:
    """What a layer is.

    Raises:
        TypeError: if its type has no rule, or the rule does not know such settings; names layer and position.
        ValueError: if it is in training mode and computes otherwise there, or takes activations of another width.
    """
    if not has_rule(layer):
        raise Refusal([no_rule(layer, place.position)])
    refuse_width(layer, place.position, place.shape)
    meaning = _RULES[type(layer)](layer, place)
    if not isinstance(meaning, Meaning):
        raise TypeError(
            f"the rule for {describe(place.position, layer)} must return what the layer is, a LinearOperator, an "
            f"Activation or a Reshape, and returns {type(meaning).__name__}"
        )
    if isinstance(meaning, LinearOperator):
        refuse_no_outputs(layer, place.position, place.shape, meaning.output_shape)
    if isinstance(meaning, Activation):
        _refuse_numbers(layer, place, meaning)
    if isinstance(meaning, Reshape) and not _is_ours(_RULES[type(layer)]):
        _refuse_reordering(layer, place, meaning)
    return meaning


def _refuse_numbers(layer: nn.Module, place: Place, activation: Activation) -> None:
    """Refuse constants that would make boxes and balls smaller than nothing."""
    known = {name: getattr(activation, name) for name in ("lipschitz", "rounding", "relative_rounding")}
    for name, number in known.items():
        if isinstance(number, Tensor) and not _is_ours(_RULES[type(layer)]):
            number = number.item() if number.numel() == 1 else math.nan
        if not isinstance(number, Tensor | None) and not (isinstance(number, Real) and 0 <= number < math.inf):
            refuse(place, layer, f"its rule must give a finite {name} of 0 or more, and gives {number}")


def _refuse_reordering(layer: nn.Module, place: Place, reshape: Reshape) -> None:
    places = torch.arange(place.shape.numel())
    if not torch.equal(reshape.function(places.view(1, *place.shape)).flatten(), places):
        refuse(place, layer, "its rule calls it a Reshape, which keeps entries and their order; make it an operator")


def has_rule(layer: nn.Module) -> bool:
    """Whether layers of exactly this type have a rule."""
    return type(layer) in _RULES


def class_is_patched(kind: type[nn.Module]) -> bool:
    """Whether a class computes otherwise than when its rule was written."""
    return kind in _METHODS and not all(now is before for now, before in zip(_methods(kind), _METHODS[kind]))


def no_rule(layer: nn.Module, position: Position, line: str = "") -> Obstacle:
    """What a layer without a rule is to a network, and the way out. line: the user's that calls it."""
    called = f" ({line})" if line else ""
    return Obstacle(f"no rule for {_with_advice(layer, describe(position, layer) + called)}")


_HOW = "@rule, see docs/adding_a_layer.md"
# Modules whose layers stand for something else in a network.
_INTERNAL = (__name__, "locallip.bound.plain", "locallip.bound.affine")


def namesake(layer: nn.Module) -> str | None:
    """The layer with a rule that has the name of another class; None: there is none."""
    kinds = {kind.__name__: kind for kind in _RULES if kind.__module__ not in _INTERNAL and kind is not type(layer)}
    known = kinds.get(type(layer).__name__)
    if known is None:
        return None
    return f"{'nn' if known.__module__.startswith('torch.') else 'locallip'}.{known.__name__}"


def _with_advice(layer: nn.Module, where: str) -> str:
    other = namesake(layer)
    if other is not None:
        return f"{type(layer).__module__}.{where}; use {other}, which has one, or write one ({_HOW})"
    for kinds, advice in _ADVICE.items():
        if isinstance(layer, kinds):
            return f"{where}: {advice}"
    known = sorted(kind.__name__ for kind in _RULES if kind.__module__ not in _INTERNAL)
    return f"{where}; write one ({_HOW}), or use one of {', '.join(known)}"


# What is often asked for and cannot be had, and the way out.
_ADVICE: dict[tuple[type[nn.Module], ...], str] = {
    (nn.LayerNorm, nn.GroupNorm, nn.LocalResponseNorm, nn.RMSNorm, nn.modules.instancenorm._InstanceNorm): (
        "it divides by what it measures of the image itself, so that no useful Lipschitz constant is known; train with "
        "batch normalisation or none"
    ),
    (nn.Softmax, nn.LogSoftmax, nn.Softmax2d, nn.Softmin): (
        "take it off the end of the network, where the label that wins is the same without it; elsewhere it has no rule"
    ),
    (nn.MultiheadAttention, nn.Transformer, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer): (
        "attention multiplies activations with one another and has no Lipschitz constant at all; no rule can help"
    ),
    (nn.Hardshrink, nn.Threshold): "it jumps, so that it has no Lipschitz constant; use a continuous activation",
}


def describe(position: Position, layer: nn.Module) -> str:
    """How messages name a layer."""
    where = f"at position {position}" if position != "" else "as the whole network"
    return f"{type(layer).__name__} {where}"


def refuse(place: Place, layer: nn.Module, why: str) -> NoReturn:
    """Refuse settings of a layer, with a TypeError that names it."""
    raise TypeError(f"{describe(place.position, layer)}: {why}")


def refuse_training_mode(place: Place, layer: nn.Module) -> None:
    """Refuse a layer in training mode, with a ValueError that names it."""
    if layer.training:
        raise ValueError(f"{describe(place.position, layer)} is in training mode; call model.eval() first")


def refuse_other_shapes(place: Place, layer: nn.Module, *dims: int) -> None:
    """Refuse a place where an image has another number of dimensions (channels count as one), with a TypeError."""
    if len(place.shape) not in dims:
        needed = " or ".join({1: "(H,)", 2: "(C, L)", 3: "(C, H, W)", 4: "(C, D, H, W)"}[n] for n in dims)
        advice = " needs a Flatten before it:" if dims == (1,) else ""
        refuse(place, layer, f"{advice} takes {needed}, not {tuple(place.shape)}".strip())


@contextmanager
def refusing_what_fails(layer: nn.Module, place: Place) -> Iterator[None]:
    """Refuse settings and shapes that a layer itself does not run with, with a TypeError that names it."""
    try:
        yield
    except (ValueError, RuntimeError, IndexError) as error:
        refuse(place, layer, f"{first_line(error)} (it takes {tuple(place.shape)})")


def shape_of(layer: nn.Module, place: Place) -> torch.Size:
    """The shape of one image's activations behind a layer; nothing is computed."""
    with refusing_what_fails(layer, place):
        return layer(torch.empty(1, *place.shape, device="meta")).shape[1:]


def window_settings(layer: nn.Module, place: Place, axes: int) -> list[tuple[int, ...]]:
    """Kernel, stride, padding and, of a layer that has it, dilation of pooling, along each axis."""
    # Without a stride the windows lie side by side.
    stride = layer.kernel_size if isinstance(layer.stride, Sequence) and not layer.stride else layer.stride
    settings = [layer.kernel_size, stride, layer.padding, *([layer.dilation] if hasattr(layer, "dilation") else [])]
    try:
        return [per_axis(setting, axes) for setting in settings]
    except TypeError as error:
        refuse(place, layer, str(error))


class BatchNormed(nn.Module):
    """A linear layer with batch normalisation right behind it: one affine map, whose norm is below the product's.

    position: of the normalisation, by which messages name it.
    """

    def __init__(self, linear: nn.Module, normalization: nn.Module, position: Position):
        super().__init__()
        self.linear, self.normalization, self.position = linear, normalization, position

    @staticmethod
    def folds(linear: nn.Module, normalization: nn.Module) -> bool:
        """Whether these two, one behind the other, are such a pair."""
        return type(linear) in _NORMALIZED_BY.get(type(normalization), ())


_NORMALIZED_BY = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d, nn.ConvTranspose1d),
    nn.BatchNorm2d: (nn.Conv2d, nn.ConvTranspose2d),
    nn.BatchNorm3d: (nn.Conv3d, nn.ConvTranspose3d),
}
