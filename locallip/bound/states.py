"""What a walk knows at the places of a network that it has come to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from locallip.bound.activations import Activation
from locallip.bound.norms import Bracket
from locallip.bound.operators import LinearOperator, Position
from locallip.bound.region import Region
from locallip.bound.rounding import ExactArithmetic


@dataclass(frozen=True)
class Open:
    """A linear layer whose local norm waits for the activations behind it to say which rows are left.

    Rows follow as long as every activation treats each entry by itself; one that mixes entries ends that.
    """

    operator: LinearOperator
    whole: Bracket
    columns: Tensor | None
    region: Region | None = None  # behind the layer, where layers are kept
    activations: tuple[Activation, ...] = ()
    rows: Tensor | None = None
    rows_follow: bool = True


@dataclass(frozen=True)
class State:
    """What is known at one place of the network, of N images.

    Attributes:
        region: ball and box.
        local: (N,) product of the local norms so far, but for that of the open layer.
        lowest: (N,) the same of the lower ends of their brackets.
        whole: scalar, product of the global norms so far.
        rounding: of this computation, which ball and box have to allow for.
        deployed: of the network that the bound is for.
        columns: (N, ...) which of the current activations can vary; None: all.
        open: see there.
    """

    region: Region
    local: Tensor
    lowest: Tensor
    whole: Tensor
    rounding: ExactArithmetic
    deployed: ExactArithmetic
    columns: Tensor | None = None
    open: Open | None = None


class States:
    """States by position, each until the last layer has taken it. consumers: how many layers take it."""

    def __init__(self, consumers: Counter[Position | None]):
        self._waiting = consumers.copy()
        self._known: dict[Position | None, State] = {}

    def keep(self, position: Position | None, state: State) -> None:
        """Keep a state for those that will take it."""
        self._known[position] = state

    def are_shared(self, position: Position | None) -> bool:
        """Whether several layers will take what stands there."""
        return self._waiting[position] > 1

    def take(self, positions: Sequence[Position | None]) -> list[State]:
        """The states that a layer takes; what nobody else waits for is forgotten."""
        states = [self._known[position] for position in positions]
        self._waiting.subtract(positions)
        for position in set(positions):
            if not self._waiting[position]:
                del self._known[position]
        return states
