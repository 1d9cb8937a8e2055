"""Good multipliers for the dual, in float32: gradient descent from the first guess, question by question.

No proof depends on what happens here, nor on the precision of the products: a GPU that is set to TF32 may find less,
and `proof` then says so in float64. Questions are handled together, and each leaves as soon as its bound is below its
margin, or gets there too slowly.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from locallip.bound.dual.chain import Chain, single
from locallip.bound.dual.start import attack, first_guess
from locallip.bound.dual.value import Evaluation, Multipliers, evaluate, gradient
from locallip.bound.tensors import per_image

# Steps of Adam relative to the root mean square of g and c, and of log delta.
_RATES = {"g": 0.05, "delta": 0.2, "c": 0.06}
_DECAYS = 0.7, 0.9
# A question is given up where it lacks more than so many times what the last sixth of all iterations gained.
_HOPE, _WINDOWS = 2.0, 6
# What float32 may have done to a bound, relative to the size of what it is added up from.
_NOISE = 4e-6


@dataclass
class Found:
    """What a search found for P questions.

    Attributes:
        drop: (P,) the largest drop of the margin that the attack attained, in float32.
        step: (P, ...) step of the input at which it did.
        bound: (P,) the smallest bound on the drop seen, in float32.
        done: (P,) bool, the bound was below the margin.
        iterations: (P,) int, evaluations of the bound.
        multipliers: float64, in the order of `done.nonzero()`; None where nothing is done.
    """

    drop: Tensor
    step: Tensor
    bound: Tensor
    done: Tensor
    iterations: Tensor
    multipliers: Multipliers | None


@dataclass
class Tightest:
    """What `tighten` found for P questions.

    Attributes:
        multipliers: float64.
        steps: of the input, (P, ...) each, that an attack may start from: the end of the attack that the search starts
            with, which was the first reference c_0, the last c_0, and where the bound has its worst input. The latter
            two may lie outside of the ball.
    """

    multipliers: Multipliers
    steps: list[Tensor]


@torch.no_grad()
def search(chain: Chain, slope: Tensor, margin: Tensor, iterations: int = 60, attack_steps: int = 8) -> Found:
    """Look for multipliers that show that the margin cannot drop to 0.

    chain: around P images, one per question. slope: (P, H) row of the wrong class less that of the label. margin: (P,)
    at x. Questions whose margin the attack itself takes to 0 are not asked.
    """
    scaled, slope, scale = single(chain.without_boxes(), slope)
    margin = (margin / scale.output).float()
    step, drop = attack(scaled, slope, attack_steps)
    asked = (drop < margin).nonzero().squeeze(1)
    found = Found(
        drop=drop.double() * scale.output,
        step=step.double() * scale.values[0],
        bound=torch.full_like(drop, torch.inf),
        done=torch.zeros_like(drop, dtype=torch.bool),
        iterations=asked.new_zeros(len(drop)),
        multipliers=None,
    )
    kept: list[tuple[Tensor, Multipliers]] = []
    if len(asked):
        descent = _Descent(scaled.take(asked), slope[asked], step[asked], asked)
        bounds = []
        for number in range(iterations):
            evaluation = descent.evaluate()
            places, value = descent.places, evaluation.value
            found.bound[places] = torch.minimum(found.bound[places], value)
            found.iterations[places] = number + 1
            bounds.append(found.bound.clone())
            done = value + _NOISE * evaluation.size < margin[places]
            if done.any():
                kept.append((places[done], descent.multipliers.take(done.nonzero().squeeze(1))))
                found.done[places[done]] = True
            left = ~(done | _is_hopeless(bounds, margin, iterations)[places])
            if not left.any() or number + 1 == iterations:
                break
            descent.improve(evaluation, number, iterations)
            if not left.all():
                descent.keep(left.nonzero().squeeze(1))
    found.bound = found.bound.double() * scale.output
    if kept:
        found.multipliers = _in_order(kept).unscaled(scale)
    return found


@torch.no_grad()
def tighten(chain: Chain, slope: Tensor, iterations: int = 60, attack_steps: int = 8) -> Tightest:
    """Lower the bound on the drop of a margin as far as so many iterations can, however large the margin is.

    chain, slope: as for `search`.
    """
    scaled, slope, scale = single(chain.without_boxes(), slope)
    step, _ = attack(scaled, slope, attack_steps)
    descent = _Descent(scaled, slope, step, torch.arange(len(step), device=step.device))
    for number in range(iterations):
        descent.improve(descent.evaluate(), number, iterations)
    last = descent.evaluate()
    steps = [x.double() * scale.values[0] for x in (step, descent.multipliers.c[0], last.changes[0])]
    return Tightest(descent.multipliers.unscaled(scale), steps)


def _is_hopeless(bounds: list[Tensor], margin: Tensor, iterations: int) -> Tensor:
    """(P,) bool: more is missing than may be hoped for. bounds: after every iteration so far."""
    window = max(1, iterations // _WINDOWS)
    if len(bounds) <= window:
        return torch.zeros_like(margin, dtype=torch.bool)
    now, before = bounds[-1], bounds[-1 - window]
    return now - margin > _HOPE * (before - now)


class _Descent:
    """Questions on their way down, with Adam's moments; `places` are theirs among all."""

    def __init__(self, chain: Chain, slope: Tensor, step: Tensor, places: Tensor):
        self.chain, self.slope, self.places = chain, slope, places
        self.multipliers = first_guess(chain, slope, step)
        parts = [*self.multipliers.g, self.multipliers.delta, *self.multipliers.c]
        rates = [_RATES["g"]] * len(self.multipliers.g) + [None] + [_RATES["c"]] * len(self.multipliers.c)
        # Where the attack found nothing, in units of what it might have found.
        sizes = [slope.norm(dim=1)] * len(self.multipliers.g) + [None] + [chain.epsilon] * len(self.multipliers.c)
        self._rates = [
            torch.full_like(slope[:, 0], _RATES["delta"]) if rate is None else rate * _typical(part, size)
            for part, rate, size in zip(parts, rates, sizes)
        ]
        self._moments = [(torch.zeros_like(part), torch.zeros_like(part)) for part in parts]

    def evaluate(self) -> Evaluation:
        """The bound with the multipliers as they are."""
        return evaluate(self.chain, self.slope, self.multipliers)

    def improve(self, found: Evaluation, number: int, iterations: int) -> None:
        """Take a step; their length falls to 0 along a cosine."""
        gradients = gradient(self.chain, self.multipliers, found)
        factor = (1 + math.cos(math.pi * number / iterations)) / 2
        moves = [
            _adam(moments, part, number) * per_image(factor * rate, part)
            for moments, part, rate in zip(self._moments, [*gradients.g, gradients.delta, *gradients.c], self._rates)
        ]
        layers = len(gradients.g)
        for part, move in zip((*self.multipliers.g, *self.multipliers.c), (*moves[:layers], *moves[layers + 1 :])):
            part -= move
        self.multipliers.delta *= torch.exp(-moves[layers])

    def keep(self, rows: Tensor) -> None:
        """Go on with some of the questions."""
        self.chain, self.slope, self.places = self.chain.take(rows), self.slope[rows], self.places[rows]
        self.multipliers = self.multipliers.take(rows)
        self._rates = [rate[rows] for rate in self._rates]
        self._moments = [(first[rows], second[rows]) for first, second in self._moments]


def _adam(moments: tuple[Tensor, Tensor], gradient: Tensor, number: int) -> Tensor:
    """Adam's direction, with entries of about 1."""
    (first, second), (slow, slower) = moments, _DECAYS
    first.lerp_(gradient, 1 - slow)
    second.mul_(slower).addcmul_(gradient, gradient, value=1 - slower)
    size = (1 - slow ** (number + 1)) / math.sqrt(1 - slower ** (number + 1))
    return first / second.sqrt().mul_(size).add_(1e-16)


def _in_order(kept: list[tuple[Tensor, Multipliers]]) -> Multipliers:
    order = torch.cat([places for places, _ in kept]).argsort()
    parts = [multipliers for _, multipliers in kept]

    def joined(tensors: list[Tensor]) -> Tensor:
        return torch.cat(tensors)[order]

    g = [joined([part.g[number] for part in parts]) for number in range(len(parts[0].g))]
    c = [joined([part.c[number] for part in parts]) for number in range(len(parts[0].c))]
    return Multipliers(g, joined([part.delta for part in parts]), c)


def _typical(x: Tensor, otherwise: Tensor) -> Tensor:
    """Root mean square of the entries that are not 0, or what it is for a vector of length `otherwise`: (P,)."""
    x = x.flatten(1)
    mean = x.norm(dim=1) / (x != 0).sum(dim=1).clamp(min=1).to(x.dtype).sqrt()
    return torch.where(mean > 0, mean, otherwise / x.shape[1] ** 0.5)
