"""Nodes in their order: those of a Sequential, those that the output needs, with batch normalisation folded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import nn

from locallip.bound.layers import MaxMin
from locallip.bound.nodes import IMAGES, Node
from locallip.bound.operators import Position
from locallip.bound.plain import Concatenate, Extremum, Select
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


def with_maxmin(nodes: list[Node], output: Position | None) -> list[Node]:
    """The nodes with `MaxMin` in place of the calls that make it, cat([max(a, b), min(a, b)], 1).

    a and b are the two halves of the channels of one tensor. output: of the network.
    """
    known = {node.position: node for node in nodes}
    consumers = Counter((output, *(position for node in nodes for position in node.inputs)))
    result, parts = [], set()
    for node in nodes:
        half = _half_of_sorted(node, known)
        if half is not None:
            parts.update(position for position in node.inputs if consumers[position] == 1)
            node = replace(node, layer=MaxMin().eval(), inputs=half.inputs, shape=half.shape)
        result.append(node)
    return [node for node in result if node.position not in parts]


def _half_of_sorted(node: Node, known: Mapping[Position | None, Node]) -> Node | None:
    """One of the halves that a node puts together sorted, which takes what was halved; None: it does something else."""
    if not (isinstance(node.layer, Concatenate) and node.layer.dim == 1 and len(node.inputs) == 2):
        return None
    both = [known.get(position) for position in node.inputs]
    if not all(part is not None and isinstance(part.layer, Extremum) for part in both):
        return None
    larger, smaller = both
    halves = [known.get(position) for position in larger.inputs]
    in_order = larger.layer.larger and not smaller.layer.larger and set(larger.inputs) == set(smaller.inputs)
    if not in_order or not all(half is not None and isinstance(half.layer, Select) for half in halves):
        return None
    first, second = sorted(halves, key=lambda half: int(half.layer.places.flatten()[0]))
    places = torch.cat([first.layer.places, second.layer.places])
    is_whole = first.inputs == second.inputs and first.shape == places.shape
    everything = torch.arange(places.numel(), device=places.device).view_as(places)
    return first if is_whole and torch.equal(places, everything) else None


def free_name(name: str, nodes: list[Node]) -> str:
    """The name, or one with a number behind it where a node has it."""
    taken = {node.position for node in nodes}
    return next(free for free in (name, *(f"{name}#{n}" for n in range(2, len(nodes) + 3))) if free not in taken)
