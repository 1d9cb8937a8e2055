"""What keeps a module from computing what its class says: found before anything runs, all of it at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrize
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from locallip.bound.checks import refuse_model
from locallip.bound.nodes import Obstacle, Refusal
from locallip.bound.reading_modules import reads
from locallip.bound.replaced import replaced_functions, replacements
from locallip.bound.rules import describe

_WRAPPERS = {
    "OptimizedModule": ("is compiled", "hand over its `._orig_mod`"),
    "DataParallel": ("is spread over devices", "hand over its `.module`"),
    "DistributedDataParallel": ("is spread over processes", "hand over its `.module`"),
    "FullyShardedDataParallel": ("is spread over processes", "hand over the module before it is wrapped"),
}


def refuse_what_computes_otherwise(model: nn.Module) -> None:
    """Refuse a network with modules that do not compute what their classes say.

    Raises:
        TypeError, ValueError: if it is no module, or its weights are none (see `checks.refuse_model`).
        Refusal: names all such modules, each with its place and a way out.
    """
    refuse_model(model)
    obstacles = [*_of_all_modules(), *_of("", model)]
    if obstacles:
        raise Refusal(obstacles)


def _of_all_modules() -> Iterator[Obstacle]:
    for name in replaced_functions():
        yield Obstacle(f"{name} is another function than when locallip was imported", "put the original back")
    for mode in _get_current_function_mode_stack():
        if not isinstance(mode, DeviceContext):
            kind = type(mode).__name__
            yield Obstacle(f"the mode {kind} is active, which can change what functions compute", "leave it first")
    hooks = (*hooks_of_all._global_forward_hooks.values(), *hooks_of_all._global_forward_pre_hooks.values())
    if not all(map(reads, hooks)):
        yield Obstacle(
            "this process has forward hooks on all modules, which can change what they compute", "remove them"
        )


def _of(path: str, module: nn.Module) -> Iterator[Obstacle]:
    """Of a module and all in it."""
    where = describe(path, module) if path else "the network"
    kind = type(module).__name__
    if kind in _WRAPPERS:
        what, way_out = _WRAPPERS[kind]
        yield Obstacle(f"{where} {what} ({kind})", way_out)
    elif isinstance(module, torch.jit.ScriptModule):
        yield Obstacle(f"{where} is TorchScript, which cannot be read", "hand over the module that it was made of")
    elif parametrize.is_parametrized(module):
        at = f"model.get_submodule('{path}')" if path else "model"
        for name in module.parametrizations:
            way_out = f"call torch.nn.utils.parametrize.remove_parametrizations({at}, '{name}') first"
            yield Obstacle(f"{where} has a parametrization of {name}", way_out)
    else:
        yield from replacements(where, module)
        for name, child in module.named_children():
            yield from _of(f"{path}.{name}" if path else name, child)
