"""The dual bound in float64, with everything that rounding can do to it.

The network is the exact function of the weights, x' any point of the ball, h'_l and z'_l its exact values there. Let
z_l be the computed centres of the chain, whatever they are, h_l = act(z_l) exactly, h_0 = x. With d_l = z'_l - z_l and
p_l = h'_l - h_l = phi_l(d_l), everything that follows holds for these computed centres:

    d_l = W_l p_(l-1) + s_l    with    s_l = W_l h_(l-1) + b_l - z_l,

so that errors of earlier layers do not add up: what one layer's sums miss, ||s_l||, is measured. On outputs that the
box shows to be constant, p_l is 0 exactly. For class j, a = w_j - w_y:

    f_j(x') - f_y(x') = a . p_m + (a . h_m + b_j - b_y).

Add, for every layer, 0 = g_l . (W_l p_(l-1) + s_l - d_l), and 0 <= mu_l/2 (n_l^2 ||p_(l-1) - c_(l-1)||^2 - ||D_l (d_l -
s_l - W_l c_(l-1))||^2), which holds because p_(l-1) and c_(l-1) are 0 on the eliminated columns. Computed a_(l-1) and
t_l stand for W_l^T g_l and D_l W_l c_(l-1); with r and rho what they (and s_l) are off by, and reach_l >= ||p_l||, this
costs at most

    ||r|| reach_(l-1) + ||g_l|| ||s_l|| + mu_l ||rho|| (n_l (reach_(l-1) + ||c_(l-1)||) + ||rho||).

What is left is a sum of maxima, one per unit, which `maxima` bounds with their rounding; the sum itself is off by at
most gamma_n times the sum of absolute values. Sums are sums, and gamma_n has twice the size and 16 terms more than
needed, as in `rounding`. Numbers beyond 1e90 and penalties below 1e-90 prove nothing; what underflows in between is
below 1e-90 in all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from locallip.bound.dual.chain import Chain, Hidden
from locallip.bound.dual.value import Evaluation, Multipliers, evaluate
from locallip.bound.operators import LinearOperator
from locallip.bound.tensors import norm

_ROUNDOFF = 2.0**-53
_LARGEST, _SMALLEST = 1e90, 1e-90
# The least share of a penalty that has to be the layer's own, see `maxima`.
_OWN_SHARE = 1e-9
_EXTRA_TERMS = 16


@torch.no_grad()
def proven_margin(
    chain: Chain, y: Tensor, other: Tensor, multipliers: Multipliers, besides: Tensor | float = 0.0
) -> Tensor:
    """A lower bound on f_y - f_other in the whole ball, for each of P questions: (P,); -inf where nothing is proven.

    Certified against that class is where it is > 0.

    Args:
        chain: in float64 around P images, one per question.
        y, other: (P,) labels and wrong classes.
        multipliers: in float64.
        besides: (P,) what else the margin may lose, such as the rounding of the deployed network.

    Raises:
        ValueError: for another precision, or multipliers that are not 0 on eliminated rows and columns.
    """
    _refuse(chain, multipliers)
    slope = chain.weight[other] - chain.weight[y]
    offset = chain.bias[other] - chain.bias[y]
    values, missed, reach = _forward(chain)
    found = evaluate(chain, slope, multipliers, _ROUNDOFF)

    entries = sum(x[0].numel() for x in (*found.steps, *found.changes))
    off = _gamma(entries) * found.size
    for number, layer in enumerate(chain.hidden):
        off = off + _off_in_layer(number, layer, multipliers, found.mu[:, number], missed, reach)
    last = values[-1].flatten(1)
    off = off + norm(slope) * (2 * _ROUNDOFF * reach[-1] + _activation_error(chain.hidden[-1]))
    biases = chain.bias[other].abs() + chain.bias[y].abs()
    off = off + _gamma(slope.shape[1]) * (norm(slope) * norm(last) + biases)
    drop = found.value + (slope * last).sum(dim=1) + offset
    margin = -drop - (off * (1 + 1e-6) + _SMALLEST) - besides
    return torch.where(_in_range(chain, multipliers, found, values) & ~margin.isnan(), margin, -torch.inf)


def _refuse(chain: Chain, multipliers: Multipliers) -> None:
    tensors = [chain.weight, *(layer.center for layer in chain.hidden), *multipliers.g, *multipliers.c]
    if any(x.dtype != torch.float64 for x in (*tensors, multipliers.delta)):
        raise ValueError("a proof needs the chain and the multipliers in float64")
    for kind, parts, masks in (
        ("a reference", multipliers.c, chain.reference_masks()),
        ("g", multipliers.g, [layer.rows for layer in chain.hidden]),
    ):
        for number, (part, mask) in enumerate(zip(parts, masks)):
            if mask is not None and part[~mask].any():
                raise ValueError(f"{kind} of layer {number} is not 0 where its output is constant: that proves nothing")


def _forward(chain: Chain) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """The values h_0 ... h_m, bounds (P,) on ||s_1|| ... ||s_m||, and bounds (P,) on ||p_0|| ... ||p_m||."""
    values, missed, reach = [chain.x], [], [chain.epsilon]
    before = torch.zeros_like(chain.epsilon)
    for layer in chain.hidden:
        operator = layer.operator
        inputs = values[-1].reshape(-1, *operator.input_shape)
        seen = norm(operator.affine(inputs).reshape(layer.center.shape) - layer.center)
        sums = layer.absolute * norm(inputs) + _bias_size(operator)
        fresh = _gamma(operator.terms[0]) * (sums + norm(layer.center)) + layer.absolute * before
        missed.append((seen + fresh) * (1 + 1e-6))
        reach.append((layer.norm * reach[-1] + missed[-1]) * (1 + 1e-6))
        before = _activation_error(layer)
        values.append(layer.activation(layer.center))
    return values, missed, reach


def _off_in_layer(
    number: int, layer: Hidden, multipliers: Multipliers, mu: Tensor, missed: list[Tensor], reach: list[Tensor]
) -> Tensor:
    """What the layer's computed a, t and centre cost: (P,), see the head of this module."""
    g, c = norm(multipliers.g[number]), norm(multipliers.c[number])
    terms, adjoint_terms = layer.operator.terms
    r = _gamma(adjoint_terms) * layer.absolute * g
    rho = _gamma(terms) * layer.absolute * c + missed[number]
    return r * reach[number] + g * missed[number] + mu * rho * (layer.norm * (reach[number] + c) + rho)


def _in_range(chain: Chain, multipliers: Multipliers, found: Evaluation, values: list[Tensor]) -> Tensor:
    """(P,) bool: nothing is too large or too small for the model of rounding; a NaN is."""
    fits = torch.ones_like(chain.epsilon, dtype=torch.bool)
    for x in (*multipliers.g, *multipliers.c, *found.a, *found.t, *values, *(layer.center for layer in chain.hidden)):
        fits &= norm(x) < _LARGEST
    for layer in chain.hidden:
        fits &= (layer.absolute < _LARGEST) & (layer.norm >= 0) & (layer.norm < _LARGEST)
    for number, mu in enumerate(found.mu.unbind(dim=1)):
        own = mu - found.nu[:, number + 1] if number + 1 < len(chain.hidden) else mu
        fits &= (own >= _OWN_SHARE * mu) & (mu > _SMALLEST) & (mu < _LARGEST)
    return fits & (found.nu[:, 0] < _LARGEST) & (found.size < _LARGEST) & chain.epsilon.isfinite()


def _gamma(terms: int) -> float:
    product = (terms + _EXTRA_TERMS) * _ROUNDOFF
    return 2 * product / (1 - product)


def _bias_size(operator: LinearOperator) -> Tensor:
    """L2 norm over all outputs of the absolute values from which the bias was added up."""
    size = operator.bias_magnitude()
    return size.norm() * (operator.output_shape.numel() / size.numel()) ** 0.5


def _activation_error(layer: Hidden) -> Tensor:
    """By how much the activation's values at the centre can be off, in L2: (P,)."""
    activation, entries = layer.activation, layer.center[0].numel()
    return activation.rounds * 2 * _ROUNDOFF * norm(layer.center) + activation.rounding * entries**0.5 * (1 + 1e-6)
