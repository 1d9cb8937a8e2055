"""What each layer type is: a linear operator, an activation, or a renaming of entries. A walk does the rest.

A rule is a function of a layer and the place where it stands, registered for exactly the types that it is right for.
The rules for PyTorch's layers, and for those of `layers`, are in `linear_rules` and `activation_rules`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallip.bound.activations import Activation
from locallip.bound.joins import Join
from locallip.bound.nodes import Obstacle, Refusal
from locallip.bound.norms import Arithmetic
from locallip.bound.operators import LinearOperator, Position


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
_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {nn.Sequential: nn.Sequential.forward}


def rule(*layer_types: type[nn.Module]) -> Callable[[Rule], Rule]:
    """Register what layers of exactly these types are; a subclass may differ and needs a rule of its own."""

    def register(function: Rule) -> Rule:
        _RULES.update(dict.fromkeys(layer_types, function))
        _FORWARDS.update({layer_type: layer_type.forward for layer_type in layer_types})
        return function

    return register


def meaning_of(layer: nn.Module, place: Place) -> Meaning:
    """What a layer is.

    Raises:
        TypeError: if its type has no rule, or the rule does not know such settings; names layer and position.
        ValueError: if it is in training mode and computes otherwise there.
    """
    if not has_rule(layer):
        raise Refusal([no_rule(place.position, layer)])
    return _RULES[type(layer)](layer, place)


def has_rule(layer: nn.Module) -> bool:
    """Whether layers of exactly this type have a rule."""
    return type(layer) in _RULES


def class_is_patched(kind: type[nn.Module]) -> bool:
    """Whether a class computes otherwise than when its rule was written."""
    return kind in _FORWARDS and kind.forward is not _FORWARDS[kind]


_NORMALIZES = "it divides by a norm or deviation of the image's own, which no constant bounds"
_IS_LAST = "if it is the last, hand over the network without it: it does not change which logit is the largest"
_ADVICE = {
    **dict.fromkeys(("Softmax", "LogSoftmax", "Softmax2d"), _IS_LAST),
    **dict.fromkeys(("LayerNorm", "GroupNorm", "InstanceNorm1d", "InstanceNorm2d", "RMSNorm"), _NORMALIZES),
    "MultiheadAttention": "dot products of activations with each other are not Lipschitz",
}


def no_rule(position: Position, layer: nn.Module, line: str = "") -> Obstacle:
    """The obstacle that a layer without a rule is. line: the user's that calls it."""
    kind, name = type(layer), type(layer).__name__
    called = f" ({line})" if line else ""
    supported = sorted(k.__name__ for k in _RULES if k.__module__ != __name__ and not k.__name__.startswith("_"))
    if not kind.__module__.startswith("torch."):
        name = f"{kind.__module__}.{name}"
    if name in _ADVICE:
        return Obstacle(f"no rule for {name} at position {position}{called}", _ADVICE[name])
    way_out = f"use nn.{kind.__name__}" if kind.__name__ in supported else "write one (@rule)"
    listed = ", ".join(supported)
    return Obstacle(f"no rule for {name} at position {position}{called}", f"{way_out}; supported are {listed}")


def describe(position: Position, layer: nn.Module) -> str:
    """How messages name a layer."""
    return f"{type(layer).__name__} at position {position}"


def refuse(place: Place, layer: nn.Module, why: str) -> None:
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


def shape_of(layer: nn.Module, place: Place) -> torch.Size:
    """The shape of one image's activations behind a layer; nothing is computed."""
    return layer(torch.empty(1, *place.shape, device="meta")).shape[1:]


class BatchNormed(nn.Module):
    """A linear layer with batch normalisation right behind it: one affine map, whose norm is below the product's."""

    def __init__(self, linear: nn.Module, normalization: nn.Module):
        super().__init__()
        self.linear, self.normalization = linear, normalization

    @staticmethod
    def folds(linear: nn.Module, normalization: nn.Module) -> bool:
        """Whether these two, one behind the other, are such a pair."""
        return type(linear) in _NORMALIZED_BY.get(type(normalization), ())


_NORMALIZED_BY = {
    nn.BatchNorm1d: (nn.Linear, nn.Conv1d, nn.ConvTranspose1d),
    nn.BatchNorm2d: (nn.Conv2d, nn.ConvTranspose2d),
    nn.BatchNorm3d: (nn.Conv3d, nn.ConvTranspose3d),
}
