"""The dual bound on the drop of a margin, for given multipliers, and how it changes with them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locallip.bound.dual.chain import Chain, Hidden, Scale
from locallip.bound.dual.inputs import in_ball, in_box
from locallip.bound.dual.maxima import Terms
from locallip.bound.tensors import masked, per_image


@dataclass
class Multipliers:
    """What is free in the bound, for P questions about a chain of m hidden layers.

    Attributes:
        g: m tensors (P, *shape) for the outputs of the operators, 0 on eliminated rows.
        delta: (P, m), above 0.
        c: m tensors (P, *shape): references for the steps of the input and of all hidden layers but the last, 0 on
            eliminated columns.
    """

    g: list[Tensor]
    delta: Tensor
    c: list[Tensor]

    def take(self, questions: Tensor) -> Multipliers:
        """Those of some of the questions."""
        return Multipliers([g[questions] for g in self.g], self.delta[questions], [c[questions] for c in self.c])

    def unscaled(self, scale: Scale) -> Multipliers:
        """Those for the chain as it was, in float64, from those for the scaled one."""
        g = [g.double() * (scale.output / value) for g, value in zip(self.g, scale.values[1:])]
        units = [scale.output / value / value for value in scale.values[1:]]
        delta = self.delta.double() * torch.tensor(units, dtype=torch.float64, device=self.delta.device)
        return Multipliers(g, delta, [c.double() * value for c, value in zip(self.c, scale.values)])


@dataclass
class Evaluation:
    """The bound for P questions, and where the maxima in it are attained.

    Attributes:
        value: (P,) upper bound on the drop of the margin in the ball.
        size: (P,) sum of the absolute values of what the value was added up from.
        mu, nu: (P, m) for hidden layers 1 ... m, and (P, m) for 0 ... m-1.
        a: m tensors, W^T g behind the input and behind all hidden layers but the last.
        t: m tensors, D W c.
        steps: m tensors, d of every hidden layer.
        changes: m tensors, of the input and of every hidden layer but the last.
    """

    value: Tensor
    size: Tensor
    mu: Tensor
    nu: Tensor
    a: list[Tensor]
    t: list[Tensor]
    steps: list[Tensor]
    changes: list[Tensor]


def evaluate(chain: Chain, slope: Tensor, multipliers: Multipliers, roundoff: float = 0.0) -> Evaluation:
    """Evaluate the bound on the drop of slope . h, h the last hidden layer's outputs.

    slope: (P, H), the row of the wrong class less that of the label. roundoff: adds what rounding can take from the
    maxima (see `maxima`); the rest is up to `proof`.
    """
    g, c = multipliers.g, multipliers.c
    mu, nu = penalties(chain, multipliers.delta)
    a = [_reshaped(back(layer, g), c) for layer, g, c in zip(chain.hidden, g, c)]
    t = [masked(through(layer, c), layer.rows) for layer, c in zip(chain.hidden, c)]
    halvings = 60 if slope.dtype == torch.float64 else 20
    bottom = (a[0], c[0], nu[:, 0], chain.epsilon)
    term = in_ball(*bottom) if chain.lo is None else in_box(*bottom, chain.lo, chain.hi, halvings)
    value, size = term.value, term.size
    steps, changes = [], [term.step]
    for number, layer in enumerate(chain.hidden):
        is_last = number + 1 == len(chain.hidden)
        own_mu, own_nu = mu[:, number], torch.zeros_like(value) if is_last else nu[:, number + 1]
        # The last layer sees the hidden layer before it flattened.
        behind = slope.reshape(layer.center.shape) if is_last else a[number + 1]
        reference = torch.zeros_like(behind) if is_last else c[number + 1]
        weights = (per_image(own_mu, reference), per_image(own_nu, reference))
        terms = Terms(layer.center, behind, g[number], t[number], reference, *weights, layer.lo, layer.hi)
        best = layer.activation.maximum(terms, roundoff)
        gains = masked(best.value, layer.rows)
        before, after = own_mu / 2 * _square(t[number]), own_nu / 2 * _square(reference)
        value = value + (_total(gains) + after - before)
        size = size + (_total(gains.abs()) + after + before)
        steps.append(masked(best.step, layer.rows))
        changes.append(masked(best.change, layer.rows))
    return Evaluation(value, size, mu, nu, a, t, steps, changes[:-1])


def penalties(chain: Chain, delta: Tensor) -> tuple[Tensor, Tensor]:
    """mu of layers 1 ... m and nu of 0 ... m-1, (P, m) each: mu_l = nu_l + delta_l, nu_(l-1) >= n_l^2 mu_l."""
    mu, nu = [], []
    above = torch.zeros_like(delta[:, 0])
    up = 1 + 8 * torch.finfo(delta.dtype).eps
    for layer, own in zip(reversed(chain.hidden), delta.flip(1).unbind(dim=1)):
        mu.append(above + own)
        above = mu[-1] * layer.norm**2 * up
        nu.append(above)
    return torch.stack(mu[::-1], dim=1), torch.stack(nu[::-1], dim=1)


def gradient(chain: Chain, multipliers: Multipliers, found: Evaluation) -> Multipliers:
    """The gradient of the bound with respect to g, log delta and c, by the envelope theorem.

    The maximising steps are held fixed: where the maximum is unique, the bound changes as the terms there do.
    """
    by_g, by_c = [], []
    by_mu, by_nu = [], torch.zeros_like(found.value)
    for number, layer in enumerate(chain.hidden):
        change, reference = found.changes[number], multipliers.c[number]
        step, mask = found.steps[number], None if number == 0 else chain.hidden[number - 1].columns
        by_g.append(masked(through(layer, change), layer.rows) - step)
        off = step - found.t[number]
        missed = change - reference
        returned = _reshaped(back(layer, off * per_image(found.mu[:, number], off)), reference)
        by_c.append(masked(returned - missed * per_image(found.nu[:, number], missed), mask))
        by_nu = by_nu + _square(missed) / 2
        by_nu = layer.norm**2 * by_nu - _square(off) / 2
        by_mu.append(by_nu)
    return Multipliers(by_g, torch.stack(by_mu, dim=1) * multipliers.delta, by_c)


def through(layer: Hidden, x: Tensor) -> Tensor:
    """What the operator of a layer makes of steps (P, ...) of its input, however these are shaped."""
    return layer.operator.apply(x.reshape(-1, *layer.operator.input_shape)).reshape(-1, *layer.center.shape[1:])


def back(layer: Hidden, g: Tensor) -> Tensor:
    """What the transpose makes of (P, ...), shaped like the layer's centre: (P, *input_shape)."""
    return layer.operator.adjoint(g.reshape(-1, *layer.operator.output_shape))


def _reshaped(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(like.shape)


def _total(x: Tensor) -> Tensor:
    return x.flatten(1).sum(dim=1)


def _square(x: Tensor) -> Tensor:
    return x.flatten(1).square().sum(dim=1)
