"""Operators that are made of others, and the multiplication of entries, which is the simplest part of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from locallip.bound.operators import LinearOperator, Position


class Scaling(LinearOperator):
    """Every entry times its own number.

    weight, bias, bias_size: broadcast over one image's activations, with as many dimensions as these have; the latter
    two may be None.
    """

    told_by_weight = True
    norm_bound_is_exact = True

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        position: Position,
        shape: torch.Size,
        bias_size: Tensor | None = None,
    ):
        self.weight, self.bias, self.position, self.bias_size = weight, bias, position, bias_size
        self.input_shape = self.output_shape = torch.Size(shape)

    @property
    def terms(self) -> tuple[int, int]:
        return 1, 1

    def apply(self, x: Tensor) -> Tensor:
        return x * self.weight

    def adjoint(self, y: Tensor) -> Tensor:
        return y * self.weight

    def affine(self, x: Tensor) -> Tensor:
        return self.apply(x) if self.bias is None else self.apply(x) + self.bias

    def absolute(self, x: Tensor) -> Tensor:
        return x * self.weight.abs()

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(dim=0).sum_to_size(self.weight.shape)

    def row_norms(self) -> Tensor:
        return self.weight.abs()

    def norm_bound(self) -> Tensor:
        return self.weight.abs().max()

    def bias_magnitude(self) -> Tensor:
        if self.bias_size is not None:
            return self.bias_size
        return torch.zeros_like(self.weight) if self.bias is None else self.bias.abs()


@dataclass(frozen=True)
class Branch:
    """A product of operators, the first applied first, times a number."""

    operators: tuple[LinearOperator, ...]
    coefficient: Tensor | float = 1.0

    def through(self, x: Tensor, verb: str) -> Tensor:
        """What the operators make of x by `apply`, `affine` or `absolute`, one behind the other."""
        for operator in self.operators:
            x = getattr(operator, verb)(x.reshape(-1, *operator.input_shape))
        return x * self.coefficient

    def back(self, y: Tensor) -> Tensor:
        """The adjoint of y."""
        for operator in reversed(self.operators):
            y = operator.adjoint(y.reshape(-1, *operator.output_shape))
        return y * self.coefficient

    def gradients(self, x: Tensor, y: Tensor) -> Iterator[Tensor]:
        """Of y . (W x) with respect to every weight; the coefficient is taken to be 1."""
        inputs, outputs = [x], [y]
        for operator in self.operators[:-1]:
            inputs.append(operator.apply(inputs[-1].reshape(-1, *operator.input_shape)))
        for operator in reversed(self.operators[1:]):
            outputs.append(operator.adjoint(outputs[-1].reshape(-1, *operator.output_shape)))
        for operator, before, behind in zip(self.operators, inputs, reversed(outputs)):
            sides = before.reshape(-1, *operator.input_shape), behind.reshape(-1, *operator.output_shape)
            yield operator.weight_gradient(*sides)

    def absolute_row_sums(self) -> Tensor:
        """The largest sum of absolute values along a row, or more, a scalar."""
        ones = self.operators[0].weight.new_ones(1, *self.operators[0].input_shape)
        return self.through(ones, "absolute").max()

    def geometry(self) -> tuple:
        """What its operators and its coefficient are, but for their weights."""
        parts = (
            (type(part), part.weight.shape, part.input_shape, part.output_shape, part.geometry())
            for part in self.operators
        )
        return float(self.coefficient), *parts

    def divided(self, by: Tensor) -> Branch:
        """The branch over a power of two, its operators brought to scale, so that no product of them underflows."""
        coefficient = torch.stack([operator.scale for operator in self.operators]).prod() / by * self.coefficient
        return Branch(tuple(operator.scaled for operator in self.operators), coefficient)


class Sum(LinearOperator):
    """The sum of branches from one input: the affine map of a residual block without activations, x + W x.

    weight: all numbers of all parts in one vector. What `absolute` and `row_norms` give are upper bounds.
    """

    bias = None

    def __init__(
        self, branches: Sequence[Branch], position: Position, input_shape: torch.Size, output_shape: torch.Size
    ):
        self.branches, self.position = tuple(branches), position
        self.input_shape, self.output_shape = input_shape, output_shape

    def _parts(self) -> Iterator[LinearOperator]:
        return (operator for branch in self.branches for operator in branch.operators)

    def _with(self, branches: Iterable[Branch]) -> Sum:
        return Sum(tuple(branches), self.position, self.input_shape, self.output_shape)

    def _through(self, x: Tensor, verb: str) -> Tensor:
        first, *rest = (branch.through(x, verb).reshape(-1, *self.output_shape) for branch in self.branches)
        return sum(rest, start=first)

    @cached_property
    def weight(self) -> Tensor:
        return torch.cat([part.weight.flatten() for part in self._parts()])

    @property
    def terms(self) -> tuple[int, int]:
        by_branch = [zip(*(operator.terms for operator in branch.operators)) for branch in self.branches]
        forward, backward = zip(*([sum(terms) for terms in sides] for sides in by_branch))
        return max(forward) + len(forward), max(backward) + len(backward)

    def with_weight(self, weight: Tensor, bias: Tensor | None = None, bias_size: Tensor | None = None) -> Sum:
        parts, sizes = list(self._parts()), [part.weight.numel() for part in self._parts()]
        changed = iter(part.with_weight(w.view_as(part.weight)) for part, w in zip(parts, weight.split(sizes)))
        return self._with(Branch(tuple(next(changed) for _ in b.operators), b.coefficient) for b in self.branches)

    @property
    def tells_all(self) -> bool:
        return all(part.tells_all for part in self._parts())

    def geometry(self) -> tuple:
        return tuple(branch.geometry() for branch in self.branches)

    def apply(self, x: Tensor) -> Tensor:
        return self._through(x, "apply")

    def adjoint(self, y: Tensor) -> Tensor:
        first, *rest = (branch.back(y).reshape(-1, *self.input_shape) for branch in self.branches)
        return sum(rest, start=first)

    def affine(self, x: Tensor) -> Tensor:
        return self._through(x, "affine")

    def absolute(self, x: Tensor) -> Tensor:
        return self._through(x, "absolute")

    def weight_gradient(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([gradient.flatten() for branch in self.branches for gradient in branch.gradients(x, y)])

    def row_norms(self) -> Tensor:
        return sum(_row_norms(branch).reshape(1, *self.output_shape) for branch in self.branches)

    def norm_bound(self) -> Tensor:
        return sum(
            torch.stack([operator.norm_bound() for operator in branch.operators]).prod() * branch.coefficient
            for branch in self.branches
        )

    @cached_property
    def scale(self) -> Tensor:
        scales = [torch.stack([operator.scale for operator in branch.operators]).prod() for branch in self.branches]
        return torch.stack(scales).max()

    @cached_property
    def scaled(self) -> Sum:
        return self._with(branch.divided(self.scale) for branch in self.branches)

    def divided(self, by: float, dtype: torch.dtype) -> Sum:
        branches = [branch.divided(torch.as_tensor(by, dtype=self.weight.dtype)) for branch in self.branches]
        return self._with(
            Branch(tuple(o.divided(1.0, dtype) for o in branch.operators), branch.coefficient.to(dtype))
            for branch in branches
        )

    def absolute_operator(self) -> Sum:
        return self._with(
            Branch(tuple(operator.absolute_operator() for operator in branch.operators), branch.coefficient)
            for branch in self.branches
        )

    def bias_magnitude(self) -> Tensor:
        """As of any operator; a bias inside of a branch counts by what the rest of the branch can make of it."""
        total = self.weight.new_zeros(1, *self.output_shape)
        for branch in self.branches:
            size = self.weight.new_zeros(1, *self.input_shape)
            for operator in branch.operators:
                size = operator.absolute(size.reshape(1, *operator.input_shape)) + operator.bias_magnitude()
            total = total + size.reshape(1, *self.output_shape) * branch.coefficient
        return total.squeeze(0)

    @cached_property
    def size_of_parts(self) -> Tensor:
        return self.absolute_operator().norm_bound()

    @cached_property
    def spread(self) -> Tensor:
        ends = (Branch(b.operators[first:]) for b in self.branches for first in range(1, len(b.operators)))
        return 1 + sum(end.absolute_row_sums() for end in ends)


def _row_norms(branch: Branch) -> Tensor:
    """A row of A B is a sum of rows of B, none longer than the sum of their lengths."""
    first, *rest = branch.operators
    norms = first.row_norms().expand(1, *first.output_shape)
    return Branch(tuple(rest)).through(norms, "absolute") * branch.coefficient
