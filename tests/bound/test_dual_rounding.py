"""The dual's maxima in float64 beside exact rationals: with the allowance for rounding none is below the true maximum.

The oracle's loops take fractions as well as floats, and are exact then.
"""

import math
import random
from dataclasses import dataclass
from fractions import Fraction

import dual_oracle
import numpy as np
import pytest
import torch

from locallip.bound.dual.elementwise import BentLine, ClippedLine
from locallip.bound.dual.maxima import Terms
from locallip.bound.dual.pairs import ClippedPairs
from locallip.bound.dual.proof import _OWN_SHARE

INF = math.inf
ROUNDOFF = 2.0**-53


@dataclass
class Unit:
    """The terms of a unit, or of a pair: lists with an entry per input; all floats."""

    z: list
    a: list
    g: list
    t: list
    c: list
    mu: float
    nu: float
    box: list

    def terms(self):
        def row(values):
            return torch.tensor([values], dtype=torch.float64)

        ends = [row(end) for end in zip(*self.box)] if all(map(math.isfinite, sum(self.box, ()))) else (None, None)
        values = (row(x) for x in (self.z, self.a, self.g, self.t, self.c))
        return Terms(*values, row([self.mu]), row([self.nu]), *ends)

    def exact(self):
        """The same in fractions, as the oracle takes them; infinite ends stay floats."""
        parts = [np.array([Fraction(x) for x in part]) for part in (self.z, self.a, self.g, self.t, self.c)]
        box = [tuple(end if math.isinf(end) else Fraction(end) for end in ends) for ends in self.box]
        return (*parts, Fraction(self.mu), Fraction(self.nu), box)


def any_size(rng, spread):
    """A number of any sign and magnitude: 2 ** +-spread."""
    return rng.choice((-1, 1)) * rng.random() * 2.0 ** rng.uniform(-spread, spread) if rng.random() < 0.95 else 0.0


def nudged(rng, x):
    """x, or a neighbour, or a number some rounding errors off."""
    return x * (1 + rng.choice((0, 0, 1, -1, 3, -5, 2**20)) * 2 * ROUNDOFF)


def draw(rng, inputs, thresholds):
    """A unit of numbers of all magnitudes, on purpose near to where pieces meet and terms cancel."""
    spread = rng.choice((0, 3, 30))
    z, a, g, t, c = ([any_size(rng, spread) for _ in range(inputs)] for _ in range(5))
    nu = 0.0 if rng.random() < 0.1 else 2.0 ** rng.uniform(-spread, spread)
    mu = nu + max(nu, 2.0 ** rng.uniform(-spread, spread)) * 2.0 ** rng.uniform(math.log2(_OWN_SHARE), 1)
    while mu - nu < 2 * _OWN_SHARE * mu:
        mu = nu + 2 * (mu - nu) + 4 * _OWN_SHARE * mu
    for i in range(inputs):
        if rng.random() < 0.3:
            t[i] = c[i]
        if rng.random() < 0.3:
            g[i] = nudged(rng, a[i] - nu * c[i] + mu * t[i])  # the two slopes cancel
        if rng.random() < 0.3:
            z[i] = nudged(rng, rng.choice(thresholds)) if all(map(math.isfinite, thresholds)) else z[i]
    if inputs == 2 and rng.random() < 0.4:
        z[1] = nudged(rng, z[0])
    if inputs == 2 and rng.random() < 0.3:  # both units want to end where they meet
        g[1] = nudged(rng, a[1] - nu * c[1] + mu * (t[1] - (z[0] - z[1])))
    box = [(-INF, INF)] * inputs
    if rng.random() < 0.5:
        box = [(-abs(any_size(rng, spread)), abs(any_size(rng, spread))) for _ in range(inputs)]
    return Unit(z, a, g, t, c, mu, nu, box)


def constants(unit):
    """What `maximum` leaves out."""
    _, _, _, t, c, mu, nu, _ = unit.exact()
    return nu / 2 * (c @ c) - mu / 2 * (t @ t)


def best_of_bent_line(act, z, unit, box):
    """The exact maximum of a unit with two slopes."""
    a, g, t, c, mu, nu = unit
    left, right = Fraction(act.left), Fraction(act.right)

    def activation(v):
        return left * v if v < 0 else right * v

    def terms(d):
        change = activation(z + d) - activation(z)
        return a * change - g * d - mu / 2 * (d - t) ** 2 + nu / 2 * (change - c) ** 2

    best = []
    for slope, ends in (
        (left, (box[0], min(max(-z, box[0]), box[1]))),
        (right, (min(max(-z, box[0]), box[1]), box[1])),
    ):
        offset = slope * z - activation(z)  # change = slope d + offset in this piece
        top = (slope * (a + nu * (offset - c)) - g + mu * t) / (mu - nu * slope**2)
        best.append(terms(min(max(top, ends[0]), ends[1])))
    return max(best)


def largest(act, unit):
    """The exact maximum, without the constants that `maximum` leaves out."""
    z, a, g, t, c, mu, nu, box = unit.exact()
    if act.pairs:
        low, high = (Fraction(end) if math.isfinite(end) else end for end in (act.low, act.high))
        found = dual_oracle.best_of_pair(z, low, high, (a, g, t, c, mu, nu), box)
    else:
        single = (a[0], g[0], t[0], c[0], mu, nu)
        if isinstance(act, BentLine):
            found = best_of_bent_line(act, z[0], single, box[0])
        else:
            low, high = (Fraction(end) if math.isfinite(end) else end for end in (act.low, act.high))
            found = dual_oracle.best_of_line(z[0], low, high, single, box[0])
    return found - constants(unit)


ACTIVATIONS = {
    "relu": ClippedLine(0.0, INF),
    "clipped relu": ClippedLine(0.0, 0.7),
    "hardtanh": ClippedLine(-1e-3, 1e3),
    "identity": ClippedLine(-INF, INF),
    "leaky": BentLine(0.1),
    "absolute": BentLine(-1.0),
    "concave": BentLine(1.0, -0.3),
    "clipped pairs": ClippedPairs(-0.4, 0.5),
    "pairs": ClippedPairs(-INF, INF),
    "pairs, thresholds in the wrong order": ClippedPairs(0.3, -0.2),
    "pairs, one threshold": ClippedPairs(-INF, 0.2),
}


def units(act, count, seed):
    rng = random.Random(seed)
    ends = (0.0,) if isinstance(act, BentLine) else (act.low, act.high)
    return [draw(rng, 2 if act.pairs else 1, ends) for _ in range(count)]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_no_exact_maximum_is_above_the_one_computed_with_its_allowance(name):
    """Nor would it be with a quarter of the constant: there is room left."""
    act = ACTIVATIONS[name]
    short = 0
    for unit in units(act, 400, seed=0):
        exact = largest(act, unit)
        assert exact <= Fraction(float(act.maximum(unit.terms(), ROUNDOFF).value))
        assert exact <= Fraction(float(act.maximum(unit.terms(), ROUNDOFF / 4).value))
        short += exact > Fraction(float(act.maximum(unit.terms()).value))
    assert short, "nothing was rounded down: these units would not notice a missing allowance"
