"""Nodes in their order: those of a Sequential, those that the output needs, with batch normalisation folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from torch import nn

from locallip.bound.nodes import IMAGES, Node
from locallip.bound.operators import Position
from locallip.bound.rules import BatchNormed


def flat(model: nn.Sequential, inputs: tuple[Position | None, ...] = (IMAGES,), path: str = "") -> Iterator[Node]:
    """The layers of a Sequential and of those in it, one behind the other."""
    for number, layer in enumerate(model):
        position = f"{path}{number}" if path else number
        if type(layer) is nn.Sequential:
            nodes = list(flat(layer, inputs, f"{position}."))
        else:
            nodes = [Node(position, layer, inputs)]
        yield from nodes
        inputs = (nodes[-1].position,) if nodes else inputs


def needed(nodes: list[Node], output: Position | None) -> list[Node]:
    """The nodes that something of the output comes from."""
    wanted, result = {output}, []
    for node in reversed(nodes):
        if node.position in wanted:
            wanted.update(node.inputs)
            result.append(node)
    return result[::-1]


def folded(nodes: list[Node]) -> list[Node]:
    """The nodes with batch normalisation folded into the linear layer before it, if nothing else sees that."""
    consumers = Counter(position for node in nodes for position in node.inputs)
    renamed: dict[Position | None, Position | None] = {}
    result: dict[Position, Node] = {}
    for node in nodes:
        node = replace(node, inputs=tuple(renamed.get(position, position) for position in node.inputs))
        linear = result.get(node.inputs[0])
        if linear is not None and consumers[linear.position] == 1 and BatchNormed.folds(linear.layer, node.layer):
            renamed[node.position] = linear.position
            node = replace(linear, layer=BatchNormed(linear.layer, node.layer, node.position))
        result[node.position] = node
    return list(result.values())


def free_name(name: str, nodes: list[Node]) -> str:
    """The name, or one with a number behind it where a node has it."""
    taken = {node.position for node in nodes}
    return next(free for free in (name, *(f"{name}#{n}" for n in range(2, len(nodes) + 3))) if free not in taken)
