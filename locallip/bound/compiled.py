"""Functions of a few tensor operations each, which `torch.compile` makes one or two passes over memory of.

Where there is no compiler they run as they stand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.fx.experimental._config
from torch import Tensor

from locallip.bound.seen import first_line

_ALL: list[Compilable] = []


class Compilable:
    """A function that runs compiled behind `compile_all`, where the caller says that it pays.

    Compiled, its results carry no gradient.

    Attributes:
        plain: the function as it stands.
        compiled: the same compiled, if it is.
    """

    def __init__(self, function: Callable[..., Any]):
        self.plain, self.compiled = function, None
        _ALL.append(self)

    def __call__(self, *args: Tensor | float | bool | None, pays: bool) -> Any:
        return (self.compiled or self.plain)(*args) if pays else self.plain(*args)


def compile_all() -> None:
    """Compile all such functions for this process, at their first use, which takes some ten seconds for each.

    Without a compiler they run as they stand, and a warning says so.
    """
    # By activation, rank and number of stacked tensors a function has up to nine versions for float32 alone.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    for function in _ALL:
        function.compiled = _compiled(function.plain)


def as_they_stand() -> None:
    """Compile none of them any more."""
    for function in _ALL:
        function.compiled = None


def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for all shapes, or all of them as they stand from the first failure to compile one."""
    compiled = torch.compile(plain, dynamic=True)

    def call(*args: Tensor | float | bool | None) -> Any:
        # What has a gradient, or is a parameter, would be compiled anew; so would sizes that happened to be equal.
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        try:
            with torch.fx.experimental._config.patch(use_duck_shape=False):
                return compiled(*args)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
            warnings.warn(f"no compiler, going on without: {first_line(error)[:160]}", stacklevel=1)
            as_they_stand()
            return plain(*args)

    return call
