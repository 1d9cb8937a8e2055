"""Which tensors of a run come from its images, and what the others were computed from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from locallip.bound.operators import Position
from locallip.bound.seen import tensors_in, version


class ChangedInPlaceError(Exception):
    """Something has changed a tensor since it was traced."""


@dataclass(frozen=True)
class _Traced:
    """A tensor of the run: kept, so that its identity is its own, with what changes when its numbers do."""

    tensor: Tensor
    position: Position | None
    state: tuple[int | None, int]


class Traces:
    """The tensors of one run, by their identity."""

    def __init__(self) -> None:
        self._traced: dict[int, _Traced] = {}
        self._computed: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def trace(self, tensor: Tensor, position: Position | None) -> None:
        """Note that a tensor comes from the images, as the output of a node."""
        self._traced[id(tensor)] = _Traced(tensor, position, _state(tensor))

    def depends(self, value: Any) -> bool:
        """Whether a value is a tensor that comes from the images."""
        return isinstance(value, Tensor) and id(value) in self._traced

    def position(self, tensor: Tensor) -> Position | None:
        """The node whose output a tensor is, that comes from the images.

        Raises:
            ChangedInPlaceError: where it is no longer what that has given.
        """
        known = self._traced[id(tensor)]
        if known.state != _state(tensor):
            raise ChangedInPlaceError
        return known.position

    def compute(self, tensors: list[Tensor], result: Any) -> None:
        """Note what was computed without the images, which the tensors that it comes from can change."""
        roots = [root for tensor in tensors for root in self._computed.get(id(tensor), (tensor, [tensor]))[1]]
        if roots:
            self._computed.update({id(t): (t, list({id(r): r for r in roots}.values())) for t in tensors_in(result)})

    def roots(self, tensors: list[Tensor]) -> Iterator[Tensor]:
        """What those of the tensors that were computed come from."""
        for tensor in tensors:
            if id(tensor) in self._computed:
                yield from self._computed[id(tensor)][1]

    def compute_numbers(self, tensors: list[Tensor]) -> bool:
        """Whether any of the tensors was computed and has numbers of its own, and not those of what it comes from."""
        computed = [self._computed[id(tensor)] for tensor in tensors if id(tensor) in self._computed]
        return any(_memory(tensor) not in map(_memory, roots) for tensor, roots in computed)


def _state(tensor: Tensor) -> tuple[int | None, int]:
    """What changes in place, and by `torch.utils.swap_tensors`."""
    with torch._C.DisableTorchFunction():
        return version(tensor), tensor._cdata


def _memory(tensor: Tensor) -> int:
    """Where the numbers of a tensor lie, which views share."""
    return tensor.untyped_storage().data_ptr()
