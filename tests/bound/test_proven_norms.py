"""Brackets of norms: no upper end too small, no lower end too large, and what they leave to chance."""

import math

import pytest
import torch
from hypothesis import given
from oracles import (
    SURELY,
    convolutions,
    masked_matrix,
    masked_operators,
    matrix_of,
    more_examples,
    norm_of,
    with_spectrum,
)

from locallip.bound import lanczos, proven_norms
from locallip.bound.budget import Budget
from locallip.bound.composites import Branch, Sum
from locallip.bound.norms import Arithmetic
from locallip.bound.operators import Conv, Dense
from locallip.bound.proven_norms import ProvenNorms, sure_bound
from locallip.bound.rounding import FLOAT32, FLOAT64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- whole norms -----------------------------------------------------------------------------------------------------


@more_examples
@given(convolutions())
def test_the_whole_norm_is_between_the_true_one_and_the_sure_bound(conv):
    (lower, upper), true = ProvenNorms(SURELY, 0, seed=0).whole(conv), norm_of(matrix_of(conv))
    assert lower <= true <= upper <= sure_bound(conv) * (1 + 1e-7)
    assert upper <= true * (1 + 1e-2) + 1e-50


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 9), (9, 1)])
def test_the_whole_norm_of_a_matrix_is_its_largest_singular_value(shape):
    weight = torch.randn(shape).double()
    lower, upper = ProvenNorms(SURELY, 0).whole(Dense(weight, None, 0))
    assert lower <= norm_of(weight) <= upper <= norm_of(weight) * (1 + 1e-7)


@more_examples
@given(convolutions())
def test_the_absolute_norm_is_above_that_of_the_absolute_matrix(conv):
    norms = ProvenNorms(SURELY, 0, whole_steps=5)
    norms.whole(conv)
    assert norms.absolute(conv) >= norm_of(matrix_of(conv).abs())


@pytest.mark.parametrize("terms", [10, 100_000])
def test_the_rounding_margin_grows_with_the_length_of_the_sums(terms):
    upper = ProvenNorms(SURELY, 0).whole(Dense(torch.ones(1, terms).double(), None, 0)).upper
    margin = upper.item() / terms**0.5 - 1
    assert terms * 2**-53 < margin < 1e-6


def test_a_model_in_single_precision_is_refused():
    with pytest.raises(ValueError, match=r"float64.*position 3"):
        ProvenNorms(SURELY, 0).whole(Dense(torch.ones(2, 2), None, 3))


def test_changed_weights_are_noticed():
    norms, weight = ProvenNorms(SURELY, 0), torch.eye(3).double()
    small = norms.whole(Dense(weight, None, 0)).upper
    weight *= 2
    assert norms.whole(Dense(weight, None, 0)).upper > 1.9 * small


@pytest.mark.parametrize("inside", [False, True], ids=["alone", "in a sum"])
def test_an_operator_that_does_not_say_what_makes_it_besides_its_weight_is_asked(inside):
    class Times(Dense):
        def __init__(self, weight, factor):
            super().__init__(weight, None, "place")
            self.factor = factor

        def apply(self, x):
            return self.factor * super().apply(x)

        def adjoint(self, y):
            return self.factor * super().adjoint(y)

        def norm_bound(self):
            return abs(self.factor) * super().norm_bound()

    norms, weight = ProvenNorms(1e-6, 10), torch.eye(3, dtype=torch.float64)

    def operator(factor):
        times, size = Times(weight, factor), torch.Size([3])
        return Sum([Branch((times,))], "place", size, size) if inside else times

    found = [norms.whole(operator(factor)).upper.item() for factor in (1, 4, 4, 2)]
    assert found == pytest.approx([1, 4, 4, 2], rel=1e-9)
    assert norms.budget._wholes_left == 1_000 - 3


def test_another_geometry_is_noticed():
    norms, weight = ProvenNorms(SURELY, 0), torch.randn(2, 2, 2, 2).double()
    for padding, dilation in (((1, 0), (2, 1)), ((0, 0), (1, 1))):
        conv = Conv(weight, None, 0, torch.Size([2, 3, 3]), padding=padding, dilation=dilation)
        lower, upper = norms.whole(conv)
        assert lower <= norm_of(matrix_of(conv)) <= upper <= norm_of(matrix_of(conv)) * 1.01


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-30, 1e30, 1e150, 1e300])
@pytest.mark.parametrize("kind", ["convolution", "matrix"])
def test_the_norm_is_not_lost_in_overflow_or_underflow(kind, scale):
    weight = torch.randn(2, 1, 3, 3).double()
    conv = Conv(scale * weight, None, 0, torch.Size([1, 6, 6]))
    operator = conv if kind == "convolution" else Dense(scale * weight.flatten(1), None, 0)
    lower, upper = ProvenNorms(SURELY, 0, seed=0).whole(operator)
    true = norm_of(matrix_of(operator) / scale)
    assert lower / scale <= true <= upper / scale <= true * 1.01


@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 3, 3)])
def test_a_weight_that_is_not_finite_makes_every_norm_nan(shape, spoiled):
    weight = torch.randn(shape, dtype=torch.float64)
    weight.flatten()[1] = spoiled
    operator = Dense(weight, None, 0) if len(shape) == 2 else Conv(weight, None, 0, torch.Size([1, 6, 6]))
    norms = ProvenNorms(SURELY, 10)
    whole = norms.whole(operator)
    masked = norms.masked(operator, torch.rand(3, *operator.output_shape) < 0.5, None, whole)
    assert all(end.isnan().all() for end in (*whole, *masked, norms.absolute(operator)))


@pytest.mark.parametrize("shape", [(3, 4), (2, 1, 3, 3)])
def test_a_layer_of_zeros_has_norm_zero(shape):
    weight = torch.zeros(shape, dtype=torch.float64)
    operator = Dense(weight, None, 0) if len(shape) == 2 else Conv(weight, None, 0, torch.Size([1, 6, 6]))
    norms = ProvenNorms(SURELY, 10)
    assert norms.whole(operator) == (0, 0)
    assert norms.absolute(operator) == 0


# --- masked norms ----------------------------------------------------------------------------------------------------


def maskable():
    torch.manual_seed(0)
    more, fewer = torch.randn(4, 2, 3, 3).double(), torch.randn(2, 3, 3, 3).double()
    return {
        "wide": Dense(torch.randn(5, 9, dtype=torch.float64), None, 0),
        "tall": Dense(torch.randn(9, 5, dtype=torch.float64), None, 0),
        "more outputs": Conv(more, None, 0, torch.Size([2, 5, 5]), padding=(1, 1)),
        "fewer outputs": Conv(fewer, None, 0, torch.Size([3, 6, 6]), stride=(2, 2)),
    }


MASKABLE = maskable()


def masks(shape):
    """Nothing left, one entry left, everything left, and random ones: (6, *shape)."""
    shares = torch.tensor([0.1, 0.5, 0.9]).view(3, *[1] * len(shape))
    one = torch.zeros(shape, dtype=torch.bool)
    one.flatten()[shape.numel() // 2] = True
    return torch.cat([torch.stack([one & False, one, one | True]), torch.rand(3, *shape) < shares])


def sides_to_mask(operator, sides):
    """(rows, columns) of 36 images, all pairs of masks; None where a side is not to be masked."""
    columns = masks(operator.input_shape).repeat_interleave(6, dim=0) if "columns" in sides else None
    rows = masks(operator.output_shape).repeat(6, *[1] * len(operator.output_shape)) if "rows" in sides else None
    return rows, columns


@pytest.mark.parametrize("sides", ["columns", "rows", "columns and rows"])
@pytest.mark.parametrize("steps", [0, 8, 250])
@pytest.mark.parametrize("name", MASKABLE)
def test_the_bracket_holds_the_norm_whatever_the_mask(name, steps, sides):
    operator = MASKABLE[name]
    norms = ProvenNorms(SURELY, 100, steps=steps, seed=0)
    whole = norms.whole(operator)
    pair = sides_to_mask(operator, sides)
    (lower, upper), true = norms.masked(operator, *pair, whole), norm_of(masked_matrix(operator, *pair))
    assert lower.shape == upper.shape == true.shape
    assert (lower <= true).all()
    assert (true <= upper).all()
    assert (upper <= whole.upper).all()
    if steps == 250:  # more than there are dimensions
        torch.testing.assert_close(upper, true, rtol=1e-2, atol=1e-50)
    elif steps == 0:
        assert (upper == whole.upper).all()


@more_examples
@given(masked_operators())
def test_the_bracket_holds_the_norm_of_every_operator(case):
    operator, rows, columns = case
    norms = ProvenNorms(SURELY, 10, steps=30, seed=0)
    lower, upper = norms.masked(operator, rows, columns, norms.whole(operator))
    true = norm_of(masked_matrix(operator, rows, columns))
    assert (lower <= true).all()
    assert (true <= upper).all()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
@pytest.mark.parametrize("name", MASKABLE)
def test_a_masked_norm_is_not_lost_in_overflow_or_underflow(name, scale):
    operator = MASKABLE[name]
    large_or_small = operator.with_weight(operator.weight * scale)
    norms = ProvenNorms(SURELY, 100, steps=250, seed=0)
    pair = sides_to_mask(operator, "columns and rows")
    lower, upper = norms.masked(large_or_small, *pair, norms.whole(large_or_small))
    true = norm_of(masked_matrix(operator, *pair))
    assert (lower / scale <= true).all()
    assert (true <= upper / scale).all()
    torch.testing.assert_close(upper / scale, true, rtol=1e-2, atol=1e-50)


@pytest.mark.parametrize("steps", [8, 40])
def test_a_large_matrix_is_bracketed_by_lanczos_until_singular_values_cost_little_more(steps):
    matrix = Dense(torch.randn(160, 200).double(), None, 0)
    norms = ProvenNorms(0.01, planned=3 if steps == 8 else 0, steps=steps)
    columns = torch.rand(3, 200) < 0.9
    lower, upper = norms.masked(matrix, None, columns, norms.whole(matrix))
    true = norm_of(masked_matrix(matrix, None, columns))
    assert (lower <= true).all()
    assert (true <= upper).all()
    torch.testing.assert_close(lower, true, rtol=0.1 if steps == 8 else 1e-6, atol=0)


@pytest.mark.parametrize("name", MASKABLE)
def test_what_eliminates_nothing_is_the_whole_norm_and_spends_no_planned_one(name):
    operator = MASKABLE[name]
    norms = ProvenNorms(SURELY, planned=0, steps=50)
    whole = norms.whole(operator)
    everything = torch.ones(3, *operator.input_shape, dtype=torch.bool)
    assert norms.masked(operator, None, None, whole) == whole
    lower, upper = norms.masked(operator, None, everything, whole)
    assert (lower == whole.lower).all()
    assert (upper == whole.upper).all()
    lower, upper = norms.with_steps(0).masked(operator, None, ~everything, whole)
    assert (lower == 0).all()
    assert (upper == whole.upper).all()


# --- the budget ------------------------------------------------------------------------------------------------------


def test_more_norms_than_planned_are_refused():
    conv = MASKABLE["more outputs"]
    norms = ProvenNorms(SURELY, planned=5, steps=8)
    whole = norms.whole(conv)
    nothing = torch.zeros(3, *conv.input_shape, dtype=torch.bool)
    norms.masked(conv, None, nothing, whole)
    with pytest.raises(RuntimeError, match="planned"):
        norms.masked(conv, None, nothing, whole)


def test_norms_by_other_steps_spend_the_same_budget_and_know_the_same_whole_norms():
    conv = MASKABLE["more outputs"]
    norms = ProvenNorms(SURELY, planned=5, steps=8)
    more = norms.with_steps(20)
    assert (norms.steps, more.steps) == (8, 20)
    whole = norms.whole(conv)
    assert more.whole(conv) == whole
    nothing = torch.zeros(3, *conv.input_shape, dtype=torch.bool)
    more.masked(conv, None, nothing, whole)
    with pytest.raises(RuntimeError, match="planned"):
        norms.masked(conv, None, nothing, whole)


def test_norms_by_other_steps_draw_on_from_the_same_generator():
    conv = with_spectrum(SPECTRA["falling slowly"])
    norms = ProvenNorms(SURELY, 100, steps=4, seed=7)
    first = some_masked_norms(norms, conv)
    assert not torch.equal(first, some_masked_norms(norms.with_steps(4), conv))


def test_a_budget_gives_no_more_than_the_failure_probability_in_all():
    budget = Budget(0.1, planned=50)
    masked = sum(10 * budget.for_masked(10) for _ in range(5))
    whole = sum(budget.for_whole() for _ in range(1000))
    assert masked == pytest.approx(0.05)
    assert whole == pytest.approx(0.05)
    with pytest.raises(RuntimeError, match="planned"):
        budget.for_masked(1)
    with pytest.raises(RuntimeError, match="planned"):
        budget.for_whole()


def test_a_layer_of_which_everything_is_known_spends_its_whole_norm_once():
    norms = ProvenNorms(SURELY, 0)
    for _ in range(1100):
        norms.whole(MASKABLE["wide"])


@pytest.mark.parametrize("probability", [0, 1, -0.1, 1.5, math.nan])
def test_a_failure_probability_that_is_none_is_refused(probability):
    with pytest.raises(ValueError, match="probability"):
        ProvenNorms(probability, 10)


# --- chance ----------------------------------------------------------------------------------------------------------

SPECTRA = {
    "two nearly equal": torch.cat([torch.tensor([1.0, 0.999]), torch.linspace(0.98, 0, 38)]),
    "falling slowly": torch.linspace(1, 0, 40),
    "one far above": torch.tensor([1.0, *[0.1] * 39]),
    "almost flat": torch.linspace(1, 0.9, 40),
}
USEFUL = (torch.arange(41) < 40).view(1, 41, 1, 1)


@pytest.mark.parametrize("name", SPECTRA)
def test_no_more_upper_bounds_fail_than_the_probability_says(name):
    conv = with_spectrum(SPECTRA[name])
    seeds, estimated_too_small, bounded_too_small = 200, 0, 0
    for seed in range(seeds):
        # Half of the probability goes to the masked norms, of which this is the only one.
        norms = ProvenNorms(0.4, planned=1, steps=4, whole_steps=2, seed=seed)
        lower, upper = norms.masked(conv, None, USEFUL, norms.whole(conv))
        bounded_too_small += int(upper < 1 - 1e-9)
        estimated_too_small += int(lower < 1 - 1e-6)
    assert bounded_too_small <= 0.2 * seeds
    if name != "one far above":
        assert estimated_too_small > 0.95 * seeds


def some_masked_norms(norms, conv):
    return norms.masked(conv, None, USEFUL.expand(3, -1, -1, -1), norms.whole(conv)).lower


def test_every_norm_starts_from_a_vector_of_its_own_and_a_seed_repeats_them():
    conv = with_spectrum(SPECTRA["falling slowly"])
    norms = ProvenNorms(SURELY, 100, steps=4, seed=7)
    first = some_masked_norms(norms, conv)
    assert len(set(first.tolist())) == 3
    assert torch.equal(first, some_masked_norms(ProvenNorms(SURELY, 100, steps=4, seed=7), conv))
    assert not torch.equal(first, some_masked_norms(ProvenNorms(SURELY, 100, steps=4, seed=8), conv))
    assert not torch.equal(first, some_masked_norms(norms, conv))


def test_a_part_that_is_done_again_meets_the_same_chance_and_another_part_another():
    conv = with_spectrum(SPECTRA["falling slowly"])
    norms = ProvenNorms(SURELY, 100, steps=4, seed=7)
    norms.whole(conv)
    found = []
    for place in (3, 4, 3):
        norms.restart(place)
        found.append(some_masked_norms(norms, conv))
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])


def test_the_seed_comes_from_the_operating_system_whatever_the_seed_of_pytorch():
    seeds = set()
    for _ in range(3):
        torch.manual_seed(0)
        seeds.add(ProvenNorms(SURELY, 0).seed)
    assert len(seeds) == 3
    assert ProvenNorms(SURELY, 0, seed=5).seed == 5


# --- arithmetic ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("deployed", "roundoff"), [("exact", 0.0), ("float32", FLOAT32)])
def test_the_arithmetic_is_float64_and_that_of_what_is_deployed(deployed, roundoff):
    norms = ProvenNorms(SURELY, 10, deployed=deployed)
    assert norms.arithmetic == Arithmetic(own=FLOAT64, deployed=roundoff)
    assert norms.arithmetic.allows_for_rounding


@pytest.mark.parametrize("rounded", [{"own": FLOAT64}, {"deployed": FLOAT32}])
def test_norms_that_allow_for_rounding_take_no_rounded_factors(rounded):
    with pytest.raises(ValueError, match="cannot round"):
        Arithmetic(**rounded, factors=torch.bfloat16)


def test_one_cannot_deploy_in_any_other_precision():
    with pytest.raises(ValueError, match="bfloat16"):
        ProvenNorms(SURELY, 10, deployed="bfloat16")


# --- norms that cannot be below the whole one ------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1e-100, 1e100])
def test_norms_that_are_left_off_early_come_to_the_same(scale, monkeypatch):
    conv = Conv(torch.randn(5, 3, 3, 3).double() * scale, None, 0, torch.Size([3, 7, 7]), 1, 1)
    keep = torch.tensor([0.99, 0.02, 0.98, 0.05, 0.97, 0.1, 0.95, 0.2, 0.8, 0.5])
    rows, columns = (torch.rand(10, *shape) < keep.view(-1, 1, 1, 1) for shape in (conv.output_shape, conv.input_shape))
    asked = []

    def ask(early):
        def watched(gram, draw, steps, enough=None):
            def count(v, places):
                asked.append(len(places))
                return gram(v, places)

            return lanczos.largest_ritz_value(count, draw, steps, enough if early else None)

        monkeypatch.setattr(proven_norms, "largest_ritz_value", watched)
        norms = ProvenNorms(SURELY, 10, steps=40, seed=0)
        whole = norms.whole(conv)
        asked.clear()
        return norms.masked(conv, rows, columns, whole), whole

    late, _ = ask(early=False)
    assert set(asked) == {10}
    early, whole = ask(early=True)
    assert asked[0] == 10 > asked[-1] > 0
    torch.testing.assert_close(early.upper, late.upper, rtol=1e-12, atol=0)
    true = norm_of(masked_matrix(conv, rows, columns))
    assert (early.lower <= true).all()
    assert (true <= early.upper).all()
    assert (early.upper < whole.upper).any()
    assert (early.upper == whole.upper).any()
