"""The closed forms of the dual's maxima against grids, and against the plain loops of the oracle."""

import math

import dual_oracle
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locallip.bound.dual.elementwise import BentLine, ClippedLine
from locallip.bound.dual.inputs import in_ball, in_box
from locallip.bound.dual.maxima import Terms
from locallip.bound.dual.pairs import ClippedPairs

INF = math.inf
LINES = {
    "relu": ClippedLine(0.0, INF),
    "clipped relu": ClippedLine(0.0, torch.tensor([[0.7]], dtype=torch.float64)),
    "hardtanh": ClippedLine(-1.0, 1.0),
    "identity": ClippedLine(-INF, INF),
    "leaky": BentLine(0.1),
    "absolute": BentLine(-1.0),
    "concave": BentLine(1.0, -0.3),
    "dead": BentLine(0.0, 0.0),
}
PAIRS = {
    "clipped": (-0.4, 0.5),
    "plain": (-INF, INF),
    "thresholds in the wrong order": (0.3, -0.2),
    "one threshold": (-INF, 0.2),
}
numbers = st.floats(-3, 3, allow_subnormal=False).map(lambda v: round(v, 3))
weights = st.floats(0.2, 3).map(lambda v: round(v, 3))
lengths = st.floats(0, 2).map(lambda v: round(v, 3))


def column(*values):
    return torch.tensor([values], dtype=torch.float64)


def value_of(act, terms, step):
    change = act(terms.center + step) - act(terms.center)
    gains = terms.a * change - terms.g * step
    return (gains - terms.mu / 2 * (step - terms.t) ** 2 + terms.nu / 2 * (change - terms.c) ** 2).sum(dim=1)


def largest(act, terms, roundoff=0.0):
    """The maximum with its constants, and where it is."""
    found = act.maximum(terms, roundoff)
    constants = (terms.nu / 2 * terms.c**2 - terms.mu / 2 * terms.t**2).sum(dim=1)
    return found.value.sum(dim=1) + constants, found


def check_on_grid(act, terms, points):
    """No point of the grid is above the maximum, which is attained where it says."""
    top, found = largest(act, terms)
    size = 1 + value_of(act, terms, found.step).abs()
    assert ((top - value_of(act, terms, found.step)).abs() <= 1e-11 * size).all()
    assert (found.change - act(terms.center + found.step) + act(terms.center)).abs().max() < 1e-12
    assert (value_of(act, terms, points) <= top + 1e-10 * size).all()
    with_rounding, _ = largest(act, terms, 2.0**-53)
    assert (with_rounding >= top).all()
    assert (with_rounding - top).max() < 1e-9 * size.max() + 1e-9
    if terms.lo is not None:
        assert ((terms.lo - 1e-12 <= found.step) & (found.step <= terms.hi + 1e-12)).all()


@pytest.mark.parametrize("name", LINES)
@given(data=st.data(), boxed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_point_of_a_grid_is_above_the_maximum_of_a_unit(name, data, boxed):
    z, a, g, t, c = (data.draw(numbers) for _ in range(5))
    nu, own = data.draw(weights), data.draw(weights)
    lo, hi = (-data.draw(lengths), data.draw(lengths)) if boxed else (-20.0, 20.0)
    box = (column(lo), column(hi)) if boxed else (None, None)
    terms = Terms(column(z), column(a), column(g), column(t), column(c), column(nu + own), column(nu), *box)
    check_on_grid(LINES[name], terms, torch.linspace(lo, hi, 3001, dtype=torch.float64)[:, None])


@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data(), boxed=st.booleans())
@settings(max_examples=60, deadline=None)
def test_no_point_of_a_grid_is_above_the_maximum_of_a_pair(name, data, boxed):
    z, a, g, t, c = (column(data.draw(numbers), data.draw(numbers)) for _ in range(5))
    nu, own = data.draw(weights), data.draw(weights)
    ends = [(-data.draw(lengths), data.draw(lengths)) if boxed else (-12.0, 12.0) for _ in range(2)]
    box = [column(*end) for end in zip(*ends)] if boxed else (None, None)
    axes = [torch.linspace(*end, 121, dtype=torch.float64) for end in ends]
    terms = Terms(z, a, g, t, c, column(nu + own), column(nu), *box)
    check_on_grid(ClippedPairs(*PAIRS[name]), terms, torch.cartesian_prod(*axes))


@pytest.mark.parametrize("name", PAIRS)
@given(data=st.data(), boxed=st.booleans())
@settings(max_examples=100, deadline=None)
def test_the_maximum_of_a_pair_is_that_of_the_plain_loops(name, data, boxed):
    z, a, g, t, c = (np.array([data.draw(numbers), data.draw(numbers)]) for _ in range(5))
    nu, own = data.draw(weights), data.draw(weights)
    box = [(-data.draw(lengths), data.draw(lengths)) if boxed else (-INF, INF) for _ in range(2)]
    low, high = PAIRS[name]
    expected = dual_oracle.best_of_pair(z, low, high, (a, g, t, c, nu + own, nu), box)
    ends = [column(*end) for end in zip(*box)] if boxed else (None, None)
    terms = Terms(*(column(*v) for v in (z, a, g, t, c)), column(nu + own), column(nu), *ends)
    top, _ = largest(ClippedPairs(low, high), terms)
    assert float(top) == pytest.approx(expected, rel=1e-11, abs=1e-11)


@given(data=st.data(), boxed=st.booleans(), high=st.sampled_from([0.0, 0.6, INF]))
@settings(max_examples=100, deadline=None)
def test_the_maximum_of_a_unit_is_that_of_the_plain_loops(data, boxed, high):
    unit = [data.draw(numbers) for _ in range(5)]
    nu, own = data.draw(weights), data.draw(weights)
    box = (-data.draw(lengths), data.draw(lengths)) if boxed else (-INF, INF)
    expected = dual_oracle.best_of_line(unit[0], 0.0, high, (*unit[1:], nu + own, nu), box)
    ends = [column(end) for end in box] if boxed else (None, None)
    terms = Terms(*(column(v) for v in unit), column(nu + own), column(nu), *ends)
    top, _ = largest(ClippedLine(0.0, high), terms)
    assert float(top) == pytest.approx(expected, rel=1e-11, abs=1e-11)


@pytest.mark.parametrize("act", [*LINES.values(), *(ClippedPairs(*ends) for ends in PAIRS.values())])
@pytest.mark.parametrize("where", range(5))
def test_a_nan_in_any_term_makes_the_maximum_nan(act, where):
    values = [torch.ones(1, 2, dtype=torch.float64) for _ in range(5)]
    values[where][0, 0] = torch.nan
    found = act.maximum(Terms(*values, column(2.0), column(1.0)), 2.0**-53)
    constants = values[4] ** 2 - values[3] ** 2
    assert (found.value.sum() + constants.sum()).isnan()


def test_units_that_keep_apart_in_touching_boxes_still_have_a_maximum():
    """In a box that allows one order only, where nothing is left of the other and of the tie."""
    pair = Terms(
        *(column(1.0, 0.0), column(1.0, -1.0), column(0.0, 0.0), column(0.0, 0.0), column(0.0, 0.0)),
        *(column(2.0), column(1.0), column(-0.1, -0.1), column(0.1, 0.1)),
    )
    top, found = largest(ClippedPairs(-5.0, 5.0), pair)
    assert top.isfinite().all()
    assert found.step.tolist() == [[0.1, -0.1]]


@pytest.mark.parametrize(("left", "right"), [(1.5, 1.0), (0.1, -2.0), (math.nan, 1.0)])
def test_slopes_beyond_one_are_refused(left, right):
    with pytest.raises(ValueError, match="between -1 and 1"):
        BentLine(left, right)


@given(seed=st.integers(0, 10**6), nu=st.floats(0, 4), epsilon=st.floats(0.05, 3))
@settings(max_examples=60, deadline=None)
def test_the_input_terms_hold_on_points_and_the_exact_one_for_valid_images_is_the_smaller(seed, nu, epsilon):
    generator = torch.Generator().manual_seed(seed)
    a, c = (torch.randn(1, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    x = torch.rand(1, 5, generator=generator, dtype=torch.float64)
    weights = torch.tensor([nu], dtype=torch.float64), torch.tensor([epsilon], dtype=torch.float64)
    ball, box = in_ball(a, c, *weights), in_box(a, c, *weights, -x, 1 - x)
    steps = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
    steps = epsilon * steps / steps.norm(dim=1, keepdim=True)
    steps = torch.cat([steps, ball.step, steps.minimum(1 - x).maximum(-x), box.step])
    steps = steps * (epsilon / steps.norm(dim=1, keepdim=True).clamp(min=1e-9)).clamp(max=1)
    valid = ((steps >= -x) & (steps <= 1 - x)).all(dim=1)
    values = (steps * a).sum(dim=1) + nu / 2 * (steps - c).square().sum(dim=1)
    assert values.max() <= ball.value * (1 + 1e-9) + 1e-9
    assert values[valid].max() <= box.value + 1e-9
    assert box.value <= ball.value + 1e-9
    expected = dual_oracle.best_input(*(v[0].numpy() for v in (a, c)), nu, epsilon, (-x[0].numpy(), 1 - x[0].numpy()))
    assert float(box.value) == pytest.approx(expected, rel=1e-6)
