"""What is known of a whole operator within one set of norms, and whether it is still the same operator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locallip.bound.norms import Bracket
from locallip.bound.operators import LinearOperator
from locallip.bound.tensors import same


@dataclass
class Whole:
    """What is known of a whole operator: a bracket of ||W||, and a bound on || |W| ||."""

    operator: LinearOperator
    norm: Bracket
    absolute: Tensor

    def __post_init__(self) -> None:
        self._weight, self._image = self.operator.weight.detach().clone(), _image(self.operator)

    def is_of(self, operator: LinearOperator) -> bool:
        """Whether this is the same operator still: another network's, or changed weights, must never be mistaken."""
        mine = self.operator
        same_place = (mine.input_shape, mine.output_shape) == (operator.input_shape, operator.output_shape)
        same_place = same_place and type(mine) is type(operator)
        alike = same_place and mine.geometry() == operator.geometry() and same(self._weight, operator.weight)
        return alike and torch.equal(self._image, _image(operator))


def _image(operator: LinearOperator) -> Tensor:
    """W r of one random r, which tells operators apart whose class does not say what besides the weight makes them."""
    if operator.tells_all:
        return operator.weight.new_zeros(0)
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(1, *operator.input_shape, generator=generator, dtype=torch.float64, device="cpu")
    return operator.apply(chance.to(operator.weight)).nan_to_num()
