"""What a graph is made of: layers by name, and where their inputs come from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from locallip.bound.operators import Position

# The name of the images among the inputs of a node.
IMAGES = None


@dataclass(frozen=True)
class Node:
    """A layer at its place in a network.

    Attributes:
        position: its name, of which there is no other in the graph: an index into a Sequential, or a path such as
            "2.0" or "block1.conv"; of a function's call, the path of the module that makes it and the function's name.
        layer: what it computes.
        inputs: positions of the nodes whose outputs it takes, or `IMAGES`.
        shape: of one image's activations before it; None: nobody has run the network.
        line: file and line of the user's that calls it; empty where nobody has run the network.
    """

    position: Position
    layer: nn.Module
    inputs: tuple[Position | None, ...] = (IMAGES,)
    shape: torch.Size | None = None
    line: str = ""


@dataclass(frozen=True)
class Obstacle:
    """Why a network has no bound.

    Attributes:
        what: the layer or call, by name and place, and what is wrong with it.
        way_out: what the user can do.
    """

    what: str
    way_out: str = ""

    def __str__(self) -> str:
        return f"{self.what}; {self.way_out}" if self.way_out else self.what


class Refusal(TypeError):
    """A network that has no bound, with all that is in the way."""

    def __init__(self, obstacles: list[Obstacle]):
        one, *more = obstacles = list(dict.fromkeys(obstacles))
        listed = "".join(f"\n  - {obstacle}" for obstacle in obstacles)
        super().__init__(f"{len(obstacles)} obstacles in the network:{listed}" if more else str(one))
        self.obstacles = obstacles
