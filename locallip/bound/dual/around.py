"""The chain that the dual works on, from what a walk has found."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from locallip.bound.activations import Activation
from locallip.bound.bound import Bound, HiddenLayer
from locallip.bound.dual.chain import Chain, Hidden
from locallip.bound.dual.elementwise import ClippedLine
from locallip.bound.dual.maxima import DualActivation
from locallip.bound.joins import Join
from locallip.bound.norms import Norms
from locallip.bound.operators import LinearOperator, Position
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.rules import Meaning
from locallip.bound.walk import propagate


def is_chain(meanings: Sequence[tuple[Position, Meaning]]) -> bool:
    """Whether the dual can be asked about a network of such layers: see `chain_of`."""
    behind: list[list[Activation]] = []
    for _, meaning in meanings:
        if isinstance(meaning, Join):
            return False
        if isinstance(meaning, LinearOperator):
            behind.append([])
        elif isinstance(meaning, Activation):
            if not behind:
                return False
            behind[-1].append(meaning)
    return bool(behind) and all(_in_dual(activations) is not None for activations in behind)


def chain_of(
    bound: Bound,
    x: Tensor,
    epsilon: Tensor,
    norms: Norms,
    clip: tuple[float, float] | None = None,
    masks: bool = True,
) -> Chain | None:
    """The chain around images x (N, ...), or None where the dual does not know an activation or the order of layers.

    bound: of a walk around x in float64 that kept its layers. epsilon: (N,) radius. norms: those of the walk. masks:
    False leaves out boxes and masks, for norms that made no use of them.
    """
    hidden = [_hidden(layer, norms, masks) for layer in bound.layers or []]
    if not hidden or None in hidden:
        return None
    last = bound.last
    bias = x.new_zeros(len(last.weight)) if last.bias is None else last.bias
    return Chain(x, epsilon, hidden, last.weight, bias).within(clip)


def _in_dual(activations: Sequence[Activation]) -> DualActivation | None:
    """What stands behind one linear operator, as the dual takes it: nothing, or one activation that it knows."""
    if not activations:
        return ClippedLine(-torch.inf, torch.inf)
    return activations[0].in_dual() if len(activations) == 1 else None


def _hidden(layer: HiddenLayer, norms: Norms, masks: bool) -> Hidden | None:
    activation = _in_dual(layer.activations)
    if activation is None:
        return None
    rows, columns, box = None, None, None
    if masks and layer.columns is not None and layer.activations:
        columns, box = layer.columns, (layer.region.lower, layer.region.upper)
        rows = None if activation.pairs else columns
    absolute = norms.absolute(layer.operator)
    return Hidden.around(layer.operator, activation, layer.region.center, layer.norm, absolute, rows, columns, box)


@torch.no_grad()
def chain_around(
    model: nn.Module,
    x: Tensor,
    epsilon: float | Tensor,
    norms: ProvenNorms,
    clip: tuple[float, float] | None = None,
) -> Chain:
    """The chain of a network in float64 around images x: arguments are those of `propagate`.

    Where the norms answer masked norms with the whole ones (`steps` is 0), masks are left out.

    Raises:
        TypeError: where the dual does not know an activation or the order of layers.
    """
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    bound = propagate(model, x, epsilon, norms, clip, keep_layers=True)
    chain = chain_of(bound, x, epsilon, norms, clip, masks=norms.steps > 0)
    if chain is None:
        raise TypeError("the network is no chain of linear layers with one activation behind each that the dual knows")
    return chain
