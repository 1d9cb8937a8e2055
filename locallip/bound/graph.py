"""A network as a graph of layers: what there is, in which order, and what each layer is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallip.bound.activations import Activation
from locallip.bound.checks import refuse_width
from locallip.bound.norms import Arithmetic
from locallip.bound.operators import Dense, LinearOperator, Position
from locallip.bound.rules import BatchNormed, Meaning, Place, describe, meaning_of


@dataclass(frozen=True)
class Node:
    """A layer and its position: an index into the network, in a nested Sequential a string such as "2.0"."""

    position: Position
    layer: nn.Module


@dataclass(frozen=True)
class Graph:
    """A network that is a chain: hidden layers in order, then a Linear that makes the logits.

    Attributes:
        hidden: all layers but the last.
        last: the last one.
    """

    hidden: tuple[Node, ...]
    last: Node

    @classmethod
    def of(cls, model: nn.Module) -> Graph:
        """The graph of a Sequential; nothing is computed.

        Raises:
            TypeError: names what is no Sequential, has hooks, is empty, or does not end in a Linear.
        """
        if type(model) is not nn.Sequential:
            raise TypeError(f"the network must be an nn.Sequential, got {type(model).__name__}")
        for name, module in model.named_modules():
            if module._forward_hooks or module._forward_pre_hooks:
                where = describe(name, module) if name else "the network"
                raise TypeError(f"{where} has forward hooks, which can change what it computes")
        nodes = _folded(_flat(model))
        if not nodes:
            raise TypeError("the network is empty")
        *hidden, last = nodes
        if type(last.layer) is not nn.Linear:
            raise TypeError(f"the network must end in Linear, not in {describe(last.position, last.layer)}")
        return cls(tuple(hidden), last)

    def meanings(self, x: Tensor, arithmetic: Arithmetic) -> list[tuple[Position, Meaning]]:
        """What every hidden layer is, for images x (N, ...), by position; nothing is computed.

        Raises:
            TypeError: names the first layer without a rule and its position; no layer is ever skipped.
            ValueError: names a layer in training mode, or one that takes activations of another width.
        """
        shape, result = x.shape[1:], []
        for node in self.hidden:
            meaning = meaning_of(node.layer, Place(node.position, shape, x, arithmetic))
            shape = _shape_behind(meaning, shape, x)
            result.append((node.position, meaning))
        refuse_width(self.last.layer, self.last.position, shape)
        return result

    def operators(self, x: Tensor) -> list[LinearOperator]:
        """The hidden linear layers in order, for images x (N, ...); errors as `meanings`."""
        return [m for _, m in self.meanings(x, Arithmetic()) if isinstance(m, LinearOperator)]

    def activations(self, x: Tensor) -> list[Activation]:
        """The activations in order, for images x (N, ...); errors as `meanings`."""
        return [m for _, m in self.meanings(x, Arithmetic()) if isinstance(m, Activation)]

    @property
    def classes(self) -> int:
        """How many logits it has."""
        return len(self.last.layer.weight)

    def last_operator(self) -> Dense:
        """The linear layer that makes the logits."""
        return Dense.of(self.last.layer, self.last.position)


def _shape_behind(meaning: Meaning, shape: torch.Size, x: Tensor) -> torch.Size:
    if isinstance(meaning, LinearOperator):
        return meaning.output_shape
    return shape if isinstance(meaning, Activation) else meaning.function(x.new_empty(1, *shape)).shape[1:]


def _flat(model: nn.Sequential) -> Iterator[Node]:
    for position, layer in enumerate(model):
        if type(layer) is nn.Sequential:
            yield from (Node(f"{position}.{node.position}", node.layer) for node in _flat(layer))
        else:
            yield Node(position, layer)


def _folded(nodes: Iterator[Node]) -> list[Node]:
    """The nodes with batch normalisation folded into the linear layer before it."""
    result: list[Node] = []
    for node in nodes:
        if result and BatchNormed.folds(result[-1].layer, node.layer):
            linear = result.pop()
            node = Node(linear.position, BatchNormed(linear.layer, node.layer))
        result.append(node)
    return result
