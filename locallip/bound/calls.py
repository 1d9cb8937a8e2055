"""Function calls as layers: every call that a network may make means what a layer with the same rule means.

A translation takes the arguments of a call and gives a `Step`. What is not in the table is an obstacle. The
translations are in `calls_of_layers` and `calls_of_tensors`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from locallip.bound.seen import tensors_in


@dataclass(frozen=True)
class Step:
    """A layer that a call means, and what it is applied to: activations of the network, or further steps.

    Attributes:
        layer: None stands for what changes no number.
        inputs: what it is applied to.
        made_from: constants that the layer was made from and does not hold itself.
        alone: why the call is an obstacle unless it turns out to be a part of a layer with others.
    """

    layer: nn.Module | None
    inputs: tuple[Tensor | Step, ...]
    made_from: tuple[Tensor, ...] = ()
    alone: str = ""

    def tensors(self) -> Iterator[Tensor]:
        """The activations that it is applied to in the end."""
        for value in self.inputs:
            yield from value.tensors() if isinstance(value, Step) else (value,)


@dataclass(frozen=True)
class Call:
    """A call as a translation sees it.

    Attributes:
        function: what was called.
        depends: whether a value comes from the images.
        result: what the call has returned.
    """

    function: Callable[..., Any]
    depends: Callable[[Any], bool]
    result: Any


class NoTranslationError(TypeError):
    """A call with arguments that mean no layer; the message says why."""


Translation = Callable[..., Step | tuple[Step, ...]]
_TABLE: dict[Callable[..., Any], Translation] = {}


def translate(args: tuple, kwargs: dict[str, Any], call: Call) -> tuple[Step, ...]:
    """The steps that a call means, one for each tensor that it gives.

    Raises:
        NoTranslationError: where there are none.
    """
    if call.function not in _TABLE:
        raise NoTranslationError("has no rule")
    try:
        steps = _TABLE[call.function](call, *args, **kwargs)
    except NoTranslationError:
        raise
    except (TypeError, ValueError, ArithmeticError, IndexError, AssertionError) as error:
        raise NoTranslationError(f"has arguments without a rule ({error})") from None
    steps = steps if isinstance(steps, tuple) else (steps,)
    if len(steps) != len(list(tensors_in(call.result))):
        raise NoTranslationError("gives several tensors")
    return steps


def means(*functions: Callable[..., Any] | str) -> Callable[[Translation], Translation]:
    """Register a translation for functions; a name stands for the function of torch and the method of tensors."""

    def register(translation: Translation) -> Translation:
        for function in functions:
            owners = (torch, Tensor) if isinstance(function, str) else ()
            found = [getattr(owner, function, None) for owner in owners] or [function]
            _TABLE.update({f: translation for f in found if callable(f)})
        return translation

    return register
