"""What is known of a network while it is read: where its tensors come from, its nodes so far, what is in the way."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from locallip.bound.constants import Constants
from locallip.bound.nodes import IMAGES, Node, Obstacle, Refusal
from locallip.bound.operators import Position
from locallip.bound.ordering import with_maxmin
from locallip.bound.origins import UNSEEN, Origins
from locallip.bound.rules import describe, namesake
from locallip.bound.seen import users_line
from locallip.bound.traces import ChangedInPlaceError, Traces

BY_VALUE = "a graph holds for all images only if nothing but their shape decides what happens; say it with tensors"


class Stop(BaseException):
    """Ends a run that nothing more can be learnt from; no `except Exception` of the user's may hold it."""


@dataclass
class Captured:
    """What one run has shown.

    Attributes:
        nodes: in the order of the calls.
        output: position of the node that makes the logits.
        shape: of one image's output.
        roots: tensors that nodes were made from and do not hold themselves; not the images.
        computes: whether weights or constants of nodes were computed in the run, by more than views.
        draws: whether the run has drawn random numbers.
    """

    nodes: list[Node] = field(default_factory=list)
    output: Position | None = IMAGES
    shape: torch.Size = field(default_factory=torch.Size)
    roots: list[Tensor] = field(default_factory=list)
    computes: bool = False
    draws: bool = False

    def keep(self, *roots: Tensor) -> None:
        """Note roots, each once."""
        self.roots = list({id(root): root for root in (*self.roots, *roots)}.values())


class Reading:
    """A run that is being followed.

    Args:
        model: the network, in eval mode.
        images: of the run.
        origins: which tensors have been there before the run, or were made in it by what can be seen.

    Attributes:
        captured: so far.
        obstacles: so far.
        traces: which tensors depend on the images, and through which node.
        constants: the network's weights and buffers, to be found as they were.
        inside: the modules that are running, outermost first.
        leaf: the one of them that is a node by itself, in which nothing is followed.
        parts: by position, what is in the way where a node turns out to be no part of a layer with others.
    """

    def __init__(self, model: nn.Module, images: Tensor, origins: Origins):
        self.images, self.origins = images, origins
        self.captured, self.obstacles = Captured(), []
        self.traces, self.constants = Traces(), Constants(model)
        self.inside: list[nn.Module] = []
        self.leaf: nn.Module | None = None
        self.parts: dict[Position, Obstacle] = {}
        self._failed: list[str] = []
        self._names: set[Position] = set()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._thread = threading.get_ident()
        self.traces.trace(images, IMAGES)

    def is_elsewhere(self) -> bool:
        """Whether what is running now is of another thread."""
        return threading.get_ident() != self._thread

    def finish(self, output: Any) -> Captured:
        """What was read, given what the network has returned.

        Raises:
            Refusal: names all obstacles.
        """
        if not isinstance(output, Tensor):
            self.obstacles.append(
                Obstacle(
                    f"the network gives a {type(output).__name__}, not one tensor of logits",
                    "wrap it in a module whose forward returns the logits alone",
                )
            )
        elif not self.obstacles and not self.traces.depends(output):
            self.obstacles.append(Obstacle("the logits do not come from the images by calls that can be seen"))
        output_of = self._output(output)
        self.join_parts(output_of)
        self.obstacles.extend(Obstacle(f"{what} fails, and the network goes on", BY_VALUE) for what in self._failed)
        if not self.constants.are_as_they_were():
            self.obstacles.append(
                Obstacle("the network changes weights or constants while it runs", "compute new tensors from them")
            )
        if self.obstacles:
            raise Refusal(self.obstacles)
        self.captured.output, self.captured.shape = output_of, output.shape[1:]
        return self.captured

    def _output(self, output: Any) -> Position | None:
        """The node that has made the output, if it is known."""
        try:
            return self.position(output) if isinstance(output, Tensor) and self.traces.depends(output) else None
        except Stop:
            self.join_parts()
            raise Refusal(self.obstacles) from None

    def join_parts(self, output: Position | None = None) -> None:
        """Put calls that make a layer together in its place; those that are left over are in the way."""
        self.captured.nodes = with_maxmin(self.captured.nodes, output)
        self.obstacles.extend(self.parts[n.position] for n in self.captured.nodes if n.position in self.parts)

    # --- nodes -------------------------------------------------------------------------------------------------------

    def position(self, tensor: Tensor) -> Position | None:
        """The node that has made a tensor; None: it is behind an obstacle."""
        try:
            return self.traces.position(tensor)
        except ChangedInPlaceError:
            what = f"activations that something has changed in place are used again{self.where()}"
            self.stop(Obstacle(what, "write the change without the underscore, or take inplace=True away"))

    def trace(self, tensor: Tensor, position: Position | None) -> None:
        """Note what a node has made; stop where changes of it could not be seen."""
        if tensor.is_inference():
            self.stop(Obstacle(f"the network computes in inference mode{self.where()}", "leave the mode to callers"))
        self.traces.trace(tensor, position)

    def add(self, name: Position, layer: Any, inputs: tuple[Position | None, ...], shape: torch.Size) -> Position:
        """Add a node: its position, the name or one with a number behind it where a layer is used again.

        shape: of one image's first input.
        """
        position, number = name, 1
        while position in self._names:
            number += 1
            position = f"{name}#{number}"
        self._names.add(position)
        self.captured.nodes.append(Node(position, layer, inputs, shape, users_line()))
        return position

    # --- obstacles ---------------------------------------------------------------------------------------------------

    def refuse_unknown(self, tensors: Iterable[Tensor], taker: str) -> None:
        """Stop where one of the tensors depends on the images perhaps. taker: names what is given them."""
        if not self.origins.are_known(tensor for tensor in tensors if not self.traces.depends(tensor)):
            what = f"{taker}{self.where()} takes a tensor from an earlier run or from {UNSEEN}"
            self.stop(Obstacle(what, f"keep a constant in a buffer (register_buffer), or {self.way_out()}"))

    def fails(self, what: str) -> None:
        """Note what has raised an error; an obstacle if the network goes on."""
        self._failed.append(what)

    def go_on(self, tensors: list[Tensor]) -> None:
        """Follow what an obstacle has given, so that all obstacles can be named at once."""
        assert self.obstacles, "only what is refused in the end may be unknown"
        for tensor in tensors:
            self.traces.trace(tensor, None)

    def stop(self, obstacle: Obstacle) -> None:
        """End the run with an obstacle."""
        self.obstacles.append(obstacle)
        raise Stop

    def path(self, module: nn.Module) -> str:
        """Where the network lists a module."""
        return self._paths.get(id(module), f"<{type(module).__name__} that the network does not list>")

    def description(self, module: nn.Module) -> str:
        """A module's type and position."""
        return describe(position_of(self.path(module)), module)

    def where(self) -> str:
        """The running module and the user's line, to be put behind what is there."""
        if not self.inside:
            return users_line(" ({})")
        module = self.inside[-1]
        kind, path = type(module).__name__, self.path(module)
        kind = f"{type(module).__module__}.{kind}" if namesake(module) else kind
        return f" in {kind}{f' at position {path}' if path else ''}{users_line(' ({})')}"

    def way_out(self) -> str:
        """What to do about a call without a rule in the running module."""
        other = namesake(self.inside[-1]) if self.inside else None
        use = f"use {other}, which has one, or " if other else ""
        return f"{use}put what it does into a module of its own with a rule (@rule, see docs/adding_a_layer.md)"


def position_of(path: str) -> Position:
    """The position of a module by its path: a number where it is one."""
    return int(path) if path.isdecimal() else path
