"""What a walk finds."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from locallip.bound.activations import Activation
from locallip.bound.operators import Dense, LinearOperator, Position
from locallip.bound.region import Region


@dataclass(frozen=True)
class HiddenLayer:
    """A linear layer and what stands between it and the next one, around N images.

    Attributes:
        operator: W x + b.
        activations: those behind it, in order; an empty tuple where another linear layer follows.
        region: ball and box of the operator's outputs, shaped as the first activation takes them.
        rows, columns: (N, ...) bool, shaped like them, which outputs of the operator, and which of the activations
            behind it, can vary in the ball; None: all.
        norm: (N,) of what is left of the operator.
    """

    operator: LinearOperator
    activations: tuple[Activation, ...]
    region: Region
    rows: Tensor | None
    columns: Tensor | None
    norm: Tensor


@dataclass
class Bound:
    """What `propagate` knows about a batch of N images, K classes and H units in the last hidden layer.

    Attributes:
        logits: (N, K) at x.
        center, lower, upper: (N, H) the last hidden layer: its value at x, and the box that holds it in the whole ball.
        radius: (N,) ball radius at the last hidden layer: epsilon times `hidden_lipschitz`, and in a proof rounding.
        hidden_lipschitz: (N,) Lipschitz constant up to there in the ball: of a chain the product of the local norms and
            of the activations' own constants, where branches meet what the join makes of theirs.
        lowest_hidden_lipschitz: (N,) the same of the lower ends of their brackets: no norms can make it smaller.
        global_hidden_lipschitz: scalar, the same of the global norms: valid everywhere.
        local_norms: by position in the network, (N,).
        global_norms: by position in the network, scalar.
        varying: by position, (N, ...) bool: which outputs of that layer can vary in the ball. At an activation it gives
            the columns that remain of the next linear layer, at a linear layer the rows that remain of itself.
        masks: by position of a linear layer, the (rows, columns) that its local norm was taken of; None: all.
        last: the layer that makes the logits.
        last_columns: (N, H) bool, which of its inputs can vary in the ball; None: all.
        logit_rounding: (N, K) by how much rounding can change what `worst_logits` adds up; None: exact arithmetic.
        deployed_rounding: the part of it that is the deployed network's, (N, K) or 0.
        layers: the hidden layers in order; None unless `propagate` was asked to keep them, and where the dual knows no
            such network: an activation before the first of them, one that changes the shape, branches.
        sparsity: scalar, by how much boxes reach where activations vary; None unless `propagate` was asked for it.
    """

    logits: Tensor
    center: Tensor
    lower: Tensor
    upper: Tensor
    radius: Tensor
    hidden_lipschitz: Tensor
    lowest_hidden_lipschitz: Tensor
    global_hidden_lipschitz: Tensor
    local_norms: dict[Position, Tensor]
    global_norms: dict[Position, Tensor]
    varying: dict[Position, Tensor]
    masks: dict[Position, tuple[Tensor | None, Tensor | None]]
    last: Dense
    last_columns: Tensor | None
    logit_rounding: Tensor | None
    deployed_rounding: Tensor | float = 0.0
    layers: list[HiddenLayer] | None = None
    sparsity: Tensor | None = None
