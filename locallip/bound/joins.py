"""Where branches of a network meet: sums and concatenations of several inputs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from locallip.bound.region import Point, Region


class Join(ABC):
    """A function of several inputs that each make a change of their own.

    Attributes:
        rounds: whether it computes, and does not only put together.
    """

    rounds: ClassVar[bool]

    @abstractmethod
    def __call__(self, *inputs: Tensor) -> Tensor:
        """The function of inputs (N, ...)."""

    @abstractmethod
    def constant(self, constants: Sequence[Tensor]) -> Tensor:
        """The Lipschitz constant behind it, given those of its inputs; so lengths of changes add up too."""

    @abstractmethod
    def varying(self, columns: Sequence[Tensor]) -> Tensor:
        """Which outputs can vary, given which entries of the inputs can, (N, ...) bool each."""

    def region(self, regions: Sequence[Region]) -> Region:
        """The region behind it, but for the radius."""
        center = self(*(region.center for region in regions))
        if any(isinstance(region, Point) for region in regions):
            return Point(center, regions[0].radius)
        return Region(center, *(self(*(getattr(region, end) for region in regions)) for end in ("lower", "upper")))

    def columns(self, columns: Sequence[Tensor | None], regions: Sequence[Region]) -> Tensor | None:
        """As `varying`, where None says that all entries of an input can vary."""
        if all(mask is None for mask in columns):
            return None
        full = (torch.ones_like(region.center, dtype=torch.bool) for region in regions)
        return self.varying([all_of_it if mask is None else mask for mask, all_of_it in zip(columns, full)])


@dataclass(frozen=True)
class Add(Join):
    """The sum of all inputs."""

    rounds: ClassVar[bool] = True

    def __call__(self, *inputs: Tensor) -> Tensor:
        return sum(inputs[1:], start=inputs[0])

    def constant(self, constants: Sequence[Tensor]) -> Tensor:
        return self(*constants)

    def varying(self, columns: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(columns)).any(dim=0)


@dataclass(frozen=True)
class Concatenate(Join):
    """All inputs one behind the other.

    Attributes:
        dim: along which, above 0.
    """

    dim: int
    rounds: ClassVar[bool] = False

    def __call__(self, *inputs: Tensor) -> Tensor:
        return torch.cat(inputs, self.dim)

    def constant(self, constants: Sequence[Tensor]) -> Tensor:
        largest = torch.stack(list(constants)).amax(dim=0)
        safe = torch.where(largest > 0, largest, 1)  # squares that neither under- nor overflow
        return safe * torch.stack([(constant / safe).square() for constant in constants]).sum(dim=0).sqrt()

    def varying(self, columns: Sequence[Tensor]) -> Tensor:
        return self(*columns)
