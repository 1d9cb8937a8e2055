"""What lets a module compute otherwise than its class says: hooks, replaced methods, training mode."""

from __future__ import annotations

from collections.abc import Iterator
from types import BuiltinFunctionType, FunctionType

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

from locallip.bound.nodes import Obstacle
from locallip.bound.rules import METHODS, class_is_patched, has_rule

# What layers compute by. PyTorch's own in C are all that matters of `torch`: others are made of them.
_FUNCTIONS = [
    (module, name, function)
    for module in (F, torch._C._nn, torch)
    for name, function in vars(module).items()
    if isinstance(function, BuiltinFunctionType) or (module is F and isinstance(function, FunctionType))
]
_REMOVED_BY = {"WeightNorm": "remove_weight_norm", "SpectralNorm": "remove_spectral_norm"}
# PyTorch's own modules that training mode changes.
_IN_TRAINING_OTHERWISE = (nn.modules.batchnorm._NormBase, nn.modules.dropout._DropoutNd)


def replaced_functions() -> Iterator[str]:
    """Names of functions that layers compute by, and that somebody has put another one in place of."""
    for module, name, function in _FUNCTIONS:
        if getattr(module, name, None) is not function:
            yield f"{module.__name__}.{name}"


def replacements(where: str, module: nn.Module) -> Iterator[Obstacle]:
    """What of a module itself, without those in it, is replaced. where: names it."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, prune.BasePruningMethod):
            name = hook._tensor_name
            yield Obstacle(f"{where} is pruned at {name}", f"call torch.nn.utils.prune.remove(layer, '{name}') first")
        elif type(hook).__name__ in _REMOVED_BY:
            way_out = f"call torch.nn.utils.{_REMOVED_BY[type(hook).__name__]}(layer) first"
            yield Obstacle(f"{where} computes its weight anew in every call", way_out)
        else:
            yield Obstacle(f"{where} has a forward pre-hook, which can change what it computes", "remove the hook")
    if module._forward_hooks:
        yield Obstacle(f"{where} has forward hooks, which can change what it computes", "remove the hooks")
    for method in METHODS:
        if method in vars(module):
            yield Obstacle(f"{where} has a {method} of its own in place of its class's", "write it into a class")
    if module._compiled_call_impl is not None:
        yield Obstacle(f"{where} is compiled in place", "ask before `.compile()`")
    if class_is_patched(type(module)):
        yield Obstacle(f"{where}: the class's forward has been replaced", "give a class of your own a rule (@rule)")


def trains(module: nn.Module) -> bool:
    """Whether a module is in training mode and may compute otherwise there, or learn: a user's may."""
    own = type(module).__module__.startswith("torch.nn.")
    return module.training and (not own or (has_rule(module) and isinstance(module, _IN_TRAINING_OTHERWISE)))
