"""The walk through a network with ball and box: the method of Huang et al., NeurIPS 2021 (arXiv 2111.01395).

`propagate` walks once through a network with three things in hand: the activations at x, the radius of a ball around
them, and a box, both of which hold the activations of every x' with ||x' - x||_2 <= epsilon. From the box it reads
which activations cannot vary in the ball (paper, section 3.2); the linear layers lose those rows and columns, and the
norms of what is left multiply to the local Lipschitz constant. All radii are in the space of x, which is pixel space
for every network here.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from locallip.bound.activations import Activation
from locallip.bound.bound import Bound, HiddenLayer
from locallip.bound.checks import refuse_epsilon, refuse_images, refuse_mask, refuse_model, refuse_norms
from locallip.bound.graph import Graph
from locallip.bound.joins import Join
from locallip.bound.nodes import IMAGES
from locallip.bound.norms import Norms
from locallip.bound.operators import Dense, LinearOperator, Position
from locallip.bound.region import CenteredRegion, Point, Region
from locallip.bound.rounding import ExactArithmetic, Rounding
from locallip.bound.rules import Meaning, Reshape
from locallip.bound.states import Open, State, States
from locallip.bound.tensors import per_image


def propagate(
    model: nn.Module | Graph,
    x: Tensor,
    epsilon: float | Tensor,
    norms: Norms,
    clip: tuple[float, float] | None = None,
    sparse_threshold: float | None = None,
    fused: bool = True,
    box: bool = True,
    keep_layers: bool = False,
) -> Bound:
    """Walk through the network with ball and box.

    Args:
        model: every layer and call of it has a rule (see `Graph.of`), or its graph, which saves a run where it is asked
            often and is no plain Sequential.
        x: (N, ...) images.
        epsilon: L2 radius in the space of x, one for all or one per image (N,).
        norms: answers for the spectral norms, e.g. `PowerIteration(5)`.
        clip: smallest and largest value of a valid image, if the bound need hold for valid images only. x has to be
            valid itself: the box must hold it.
        sparse_threshold: asks for `Bound.sparsity`, in which this is the weight of reaching below a threshold of
            clipped ReLU beside reaching above 0.
        fused: take a linear layer's box through its activation in one step where nothing is rounded, or operation by
            operation, which is slower and gives the same but for rounding.
        box: False takes the ball alone along. Then nothing is known to be constant, local norms are the global ones,
            and the walk costs little more than a forward pass (the bound of GloRo: Leino et al. 2021). `clip` makes
            no use of valid images then, and there is no `sparse_threshold`.
        keep_layers: asks for `Bound.layers`, which takes the memory of all activations.

    Raises:
        TypeError: names all layers without a rule and their positions; no layer is ever skipped. For what is no
            network, no images or no epsilon (see `checks`).
        ValueError: for an epsilon that is negative, NaN or infinite, images of another shape, an x outside of `clip`, a
            `sparse_threshold` without a box, batch normalisation or dropout in training mode, or an activation whose
            rounding nobody knows in a proof.
    """
    if not isinstance(model, Graph):
        refuse_model(model)
    refuse_images(x, model)
    refuse_epsilon(epsilon, x)
    refuse_norms(norms)
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    if clip is not None and ((x < clip[0]) | (x > clip[1])).any():
        raise ValueError(f"an image has values outside of {clip}")
    if not box and sparse_threshold is not None:
        raise ValueError("how far boxes reach cannot be told without a box")
    return walk_through(Graph.of(model, x), x, epsilon, norms, clip, sparse_threshold, fused, box, keep_layers)


def walk_through(
    graph: Graph,
    x: Tensor,
    epsilon: Tensor,
    norms: Norms,
    clip: tuple[float, float] | None = None,
    sparse_threshold: float | None = None,
    fused: bool = True,
    box: bool = True,
    keep_layers: bool = False,
) -> Bound:
    """Do what `propagate` does where nothing has to be refused any more, so that no value is looked at.

    epsilon: (N,). For the others see `propagate`.
    """
    meanings = graph.meanings(x, norms.arithmetic)
    walk = _Walk(epsilon, norms, sparse_threshold, fused, keep_layers)
    states = States(graph.consumers())
    states.keep(IMAGES, walk.first(x, clip, box))
    for node, (position, meaning) in zip(graph.hidden, meanings):
        state = walk.behind(states.take(node.inputs), position, meaning)
        # Rows go only with what everything sees that comes behind.
        states.keep(position, walk.closed(state) if states.are_shared(position) else state)
    (state,) = states.take(graph.last.inputs)
    return walk.finish(state, graph.last_operator())


class _Walk:
    """Takes states from layer to layer; asks `norms` for the norms, and keeps what `Bound` reports of the layers."""

    def __init__(self, epsilon: Tensor, norms: Norms, sparse_threshold: float | None, fused: bool, keep_layers: bool):
        self._layers: list[HiddenLayer] | None = [] if keep_layers else None
        self.epsilon, self.norms, self.sparse_threshold = epsilon, norms, sparse_threshold
        self._allows = norms.arithmetic.allows_for_rounding
        # Masks read off a box that underflow has made a point would be wrong; one that allows for rounding is larger.
        self._looks = norms.arithmetic.looks_for_underflow and not self._allows
        self._fused = fused and not self._allows
        self._sparsity = None if sparse_threshold is None else epsilon.new_zeros(())
        self._local_norms: dict[Position, Tensor] = {}
        self._global_norms: dict[Position, Tensor] = {}
        self._varying: dict[Position, Tensor] = {}
        self._masks: dict[Position, tuple[Tensor | None, Tensor | None]] = {}

    def first(self, x: Tensor, clip: tuple[float, float] | None, box: bool) -> State:
        """At the images x (N, ...)."""
        arithmetic, none, one = self.norms.arithmetic, torch.zeros_like(self.epsilon), torch.ones_like(self.epsilon)
        rounding, deployed = (
            Rounding(u, none) if u else ExactArithmetic(arithmetic.looks_for_underflow)
            for u in (arithmetic.own, arithmetic.deployed)
        )
        region = self._first_region(x, clip, rounding) if box else Point(x, self.epsilon)
        return State(region, one, one, self.epsilon.new_ones(()), rounding, deployed)

    def _first_region(self, x: Tensor, clip: tuple[float, float] | None, rounding: ExactArithmetic) -> Region:
        half = per_image(self.epsilon, x)
        if clip is None and not self._allows:
            return CenteredRegion(x, half)
        half = half + rounding.widening(x, half)
        lower, upper = x - half, x + half
        if clip is not None:
            lower, upper = lower.clamp(min=clip[0]), upper.clamp(max=clip[1])
        return Region(x, lower, upper)

    def behind(self, states: list[State], position: Position, meaning: Meaning) -> State:
        """Behind a layer."""
        if isinstance(meaning, Join):
            return self.join(states, meaning)
        (state,) = states
        if isinstance(meaning, LinearOperator):
            return self.linear(state, meaning)
        if isinstance(meaning, Activation):
            return self.activation(state, position, meaning)
        return self.reshape(state, meaning)

    def linear(self, state: State, operator: LinearOperator) -> State:
        """Behind W x + b."""
        state = self.closed(state)
        radius = self._radius(state, state.local if self.norms.local_ball else state.whole)
        length = self._longest(state, radius)
        region = state.region.behind(operator, radius, state.rounding.of_sums(operator, length))
        norm = self.norms.whole(operator)
        self._global_norms[operator.position] = norm.upper
        whole = state.rounding.product(state.whole, norm.upper)
        behind = state.rounding, state.deployed
        if self._allows:
            absolute = self.norms.absolute(operator)
            behind = (rounding.behind_layer(operator, norm.upper, absolute, length) for rounding in behind)
        rounding, deployed = behind
        region = region.of_radius(rounding.product(self.epsilon, whole) + rounding.distance)
        still_open = Open(operator, norm, state.columns, None if self._layers is None else region)
        local = state.local
        if self._looks and region.lost is not None:
            local = torch.where(region.lost, torch.nan, local)
        return State(region, local, state.lowest, whole, rounding, deployed, None, still_open)

    def activation(self, state: State, position: Position, activation: Activation) -> State:
        """Behind an activation."""
        if self._sparsity is not None:
            self._sparsity = self._sparsity + activation.slack(state.region, self.sparse_threshold)
        region, varying = activation.behind(state.region, self._fused)
        if varying is not None:
            refuse_mask(varying, region.center, f"{type(activation).__name__} at position {position}")
        if region.center.shape != state.region.center.shape:
            self._layers = None  # the dual knows no such activation
        state = self._stretched(state, activation)
        if self._allows:
            self._refuse_unknown_rounding(position, activation)
            error, entries = activation.error(region), region.center.shape[1:].numel()
            region = region.widened(error)
            rounding = state.rounding.behind_activation(error, entries, activation.lipschitz)
            deployed = state.deployed.behind_activation(0.0, entries, activation.lipschitz)
            state = replace(state, rounding=rounding, deployed=deployed)
        if isinstance(region, Point):
            region = region.of_radius(self._radius(state, state.whole))
        columns, still_open = state.columns, state.open
        if still_open:
            if self._layers is not None and not still_open.activations:
                still_open = replace(still_open, region=state.region)  # a reshape may have come between
            follow = still_open.rows_follow and activation.elementwise
            still_open = replace(still_open, rows_follow=follow, activations=(*still_open.activations, activation))
        else:
            self._layers = None  # steps of x are not those of the first linear layer's input
        if not activation.elementwise:
            columns = None
        if varying is not None:
            columns = varying if columns is None else varying & columns
            self._varying[position] = columns
            if still_open and still_open.rows_follow:
                rows = columns.reshape(-1, *still_open.operator.output_shape)
                still_open = replace(still_open, rows=rows)
        return replace(state, region=region, columns=columns, open=still_open)

    def _stretched(self, state: State, activation: Activation) -> State:
        """With the constants of an activation multiplied in, where it has others than 1."""
        steepness = activation.steepness(state.region)
        local = _times(state.rounding, state.local, steepness)
        whole = _times(state.rounding, state.whole, activation.lipschitz)
        # Where it depends on the box, smaller norms make it smaller.
        lowest = state.lowest * (steepness if steepness is activation.lipschitz else 0)
        return replace(state, local=local, lowest=lowest, whole=whole)

    def _refuse_unknown_rounding(self, position: Position, activation: Activation) -> None:
        if activation.rounding is None:
            raise ValueError(
                f"the activation at position {position} does not say by how much it rounds; a proof needs that"
            )
        if activation.rounds and self.norms.arithmetic.deployed:
            raise ValueError(
                f"the activation at position {position} rounds, and its rounding in float32 is not bounded"
            )

    def reshape(self, state: State, reshape: Reshape) -> State:
        """Behind a layer that only renames entries, in the same order."""
        columns = None if state.columns is None else reshape.function(state.columns)
        return replace(state, region=state.region.reshape(reshape.function), columns=columns)

    def join(self, states: list[State], join: Join) -> State:
        """Where branches meet, each with constants of its own."""
        self._layers = None  # the dual knows chains alone
        states = [self.closed(state) for state in states]
        regions, roundings = [state.region for state in states], [state.rounding for state in states]
        lengths = [self._longest(state, self._radius(state, state.local)) for state in states]
        rounding = roundings[0].behind_join(join, roundings, lengths)
        deployed = states[0].deployed.behind_join(join, [state.deployed for state in states], lengths)
        constants = [rounding.joint(join, norms) for norms in zip(*((s.local, s.lowest, s.whole) for s in states))]
        region = join.region(regions)
        region = region.widened(rounding.of_join(join, lengths, region.center))
        columns = join.columns([state.columns for state in states], regions)
        state = State(region, *constants, rounding, deployed, columns)
        return replace(state, region=region.of_radius(self._radius(state, state.whole)))

    def finish(self, state: State, last: Dense) -> Bound:
        """Read off the last hidden layer and pass its value at x through the last layer."""
        state = self.closed(state)
        region, radius = state.region, self._radius(state, state.local)
        length, logit_rounding, deployed_rounding = self._longest(state, radius), None, 0.0
        if length is not None:
            # A millionth more outweighs the rounding of the difference of squares in `worst_logits`, which cancels.
            radius = state.rounding.product(radius, radius.new_full((), 1 + 1e-6))
            deployed_rounding = state.deployed.of_logits(last, length)
            logit_rounding = state.rounding.of_logits(last, length) + deployed_rounding
        return Bound(
            logits=last.affine(region.center),
            center=region.center,
            lower=region.lower,
            upper=region.upper,
            radius=radius,
            hidden_lipschitz=state.local,
            lowest_hidden_lipschitz=state.lowest,
            global_hidden_lipschitz=state.whole,
            local_norms=self._local_norms,
            global_norms=self._global_norms,
            varying=self._varying,
            masks=self._masks,
            last=last,
            last_columns=state.columns,
            logit_rounding=logit_rounding,
            deployed_rounding=deployed_rounding,
            layers=self._layers,
            sparsity=self._sparsity,
        )

    def _radius(self, state: State, lipschitz: Tensor) -> Tensor:
        """(N,) of the ball that holds what the whole ball around x becomes, if that is its constant so far."""
        return state.rounding.product(self.epsilon, lipschitz) + state.rounding.distance

    def _longest(self, state: State, radius: Tensor) -> Tensor | None:
        """L2 length (N,) that no vector in box and ball exceeds, nor one that is multiplied; None if nothing asks."""
        if not self._allows:
            return None
        region = state.region
        largest = torch.maximum(region.lower.abs(), torch.maximum(region.upper.abs(), region.center.abs()))
        return largest.flatten(1).norm(dim=1) + radius

    def closed(self, state: State) -> State:
        """Ask for the local norm of the last linear layer, now that its rows are known."""
        if state.open is None:
            return state
        operator, rows, columns = state.open.operator, state.open.rows, state.open.columns
        norm = self.norms.masked(operator, rows, columns, state.open.whole)
        lower, upper = (end.expand_as(self.epsilon) for end in norm)
        if rows is not None:
            self._varying[operator.position] = rows
        self._masks[operator.position] = (rows, columns)
        self._local_norms[operator.position] = upper
        if self._layers is not None:
            kept = state.open
            shape = kept.region.center.shape
            masks = (None if mask is None else mask.reshape(shape) for mask in (rows, state.columns))
            self._layers.append(HiddenLayer(operator, kept.activations, kept.region, *masks, upper))
        local = state.rounding.product(state.local, upper)
        return replace(state, local=local, lowest=state.lowest * lower, open=None)


def _times(rounding: ExactArithmetic, norm: Tensor, factor: Tensor | float) -> Tensor:
    return norm if isinstance(factor, float) and factor == 1 else rounding.product(norm, factor)
