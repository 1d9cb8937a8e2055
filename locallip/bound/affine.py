"""Residual blocks without activations: branches of affine layers from one place to one sum are one operator."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from locallip.bound import plain
from locallip.bound.composites import Branch, Scaling, Sum
from locallip.bound.nodes import Node
from locallip.bound.norms import Arithmetic
from locallip.bound.operators import LinearOperator, Position
from locallip.bound.rules import Place, Reshape, meaning_of, rule


class AffineSum(nn.Module):
    """A sum of branches. branches: the layers of each, one behind the other; an empty one is the input itself."""

    def __init__(self, branches: list[list[Node]], shape: torch.Size):
        super().__init__()
        self.branches, self.shape = branches, shape

    def forward(self, x: Tensor) -> Tensor:
        return sum(nn.Sequential(*(node.layer for node in branch))(x) for branch in self.branches)


@rule(AffineSum)
def _affine_sum(layer: AffineSum, place: Place) -> Sum:
    branches = [_branch(nodes, place) for nodes in layer.branches]
    return Sum(branches, place.position, place.shape, layer.shape)


def _branch(nodes: list[Node], place: Place) -> Branch:
    places = [replace(place, position=node.position, shape=node.shape) for node in nodes]
    meanings = [meaning_of(node.layer, own) for node, own in zip(nodes, places)]
    operators = tuple(meaning for meaning in meanings if isinstance(meaning, LinearOperator))
    if operators:
        return Branch(operators)
    one = place.like.new_ones([1] * len(place.shape))
    return Branch((Scaling(one, None, place.position, place.shape),))


def is_affine(node: Node, x: Tensor) -> bool:
    """Whether a node is an affine map of one input, or renames its entries."""
    place = Place(node.position, node.shape, x, Arithmetic())
    return isinstance(meaning_of(node.layer, place), LinearOperator | Reshape)


def with_sums(nodes: list[Node], affine: Callable[[Node], bool]) -> list[Node]:
    """The nodes, with every sum whose inputs come from one place by affine layers alone as one node.

    affine: whether a node with one input is an affine map.
    """
    consumers = Counter(position for node in nodes for position in node.inputs)
    result: dict[Position, Node] = {}

    def back(position: Position | None) -> tuple[Position | None, list[Node]]:
        """Where a branch begins, and its nodes: all affine, and seen by nothing else."""
        branch: list[Node] = []
        while position in result and consumers[position] == 1 and len(result[position].inputs) == 1:
            if not affine(result[position]):
                break
            branch.insert(0, result[position])
            (position,) = result[position].inputs
        return position, branch

    for node in nodes:
        result[node.position] = node
        if type(node.layer) is not plain.Add:
            continue
        sources, branches = zip(*(back(position) for position in node.inputs))
        if len(set(sources)) > 1:
            continue
        begins = next((branch[0].shape for branch in branches if branch), node.shape)
        for inner in (n for branch in branches for n in branch):
            del result[inner.position]
        layer = AffineSum(list(branches), node.shape)
        result[node.position] = Node(node.position, layer, sources[:1], begins, node.line)
    return list(result.values())
