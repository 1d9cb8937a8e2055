"""Spectral norms by power iteration."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import BATCH, batch, examples, masked_matrix, masked_operators, matrix_of, norm_of
from torch import nn

from locallip.bound.norms import Arithmetic, Bracket
from locallip.bound.operators import Conv, Dense
from locallip.bound.power_iteration import PowerIteration

UNKNOWN = Bracket(torch.tensor(torch.nan), torch.tensor(torch.nan))
both_ways = pytest.mark.parametrize("ascend", [False, True])


@pytest.fixture
def operator():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    return Conv.of(layer, 0, torch.Size([2, 6, 6]))


def masked_of(norms, operator, rows, columns, whole=UNKNOWN):
    return norms.masked(operator, rows, columns, whole).upper


def ask(norms, operator, rows, columns):
    """The masked norms, one for every image; the whole norm comes first, as always."""
    return masked_of(norms, operator, rows, columns, norms.whole(operator)).expand(BATCH)


@both_ways
@examples
@given(case=masked_operators())
def test_norms_approach_those_of_the_dense_matrix_from_below(case, ascend):
    operator, rows, columns = case
    norms = PowerIteration(300 if ascend else 1000, ascend=ascend)  # ascent needs fewer
    with torch.no_grad():
        whole = norms.whole(operator)
        masked = norms.masked(operator, rows, columns, whole).upper.expand(BATCH)
        for estimate, true in (
            (whole.upper, norm_of(matrix_of(operator))),
            (masked, norm_of(masked_matrix(operator, rows, columns))),
        ):
            assert (estimate <= true * (1 + 1e-9)).all()
            assert (estimate >= true * (1 - 1e-3)).all()
    assert (masked <= whole.upper * (1 + 1e-3)).all()


@both_ways
@examples
@given(case=masked_operators(), iterations=st.integers(1, 4))
def test_few_iterations_stay_below_the_norm(case, iterations, ascend):
    operator, rows, columns = case
    masked = ask(PowerIteration(iterations, ascend=ascend), operator, rows, columns)
    assert (masked >= 0).all()
    assert (masked <= norm_of(masked_matrix(operator, rows, columns)) * (1 + 1e-9)).all()


def test_without_masks_the_local_norm_is_the_whole_one(operator):
    norms = PowerIteration(3)
    whole = norms.whole(operator)
    assert norms.masked(operator, None, None, whole) == whole


def test_an_estimate_has_both_ends_the_same(operator):
    norms = PowerIteration(3)
    whole = norms.whole(operator)
    masked = norms.masked(operator, None, torch.rand(BATCH, *operator.input_shape) < 0.5, whole)
    assert torch.equal(whole.lower, whole.upper)
    assert torch.equal(masked.lower, masked.upper)


@both_ways
def test_gradient_of_the_whole_norm(operator, ascend):
    weight = operator.weight
    (expected,) = torch.autograd.grad(norm_of(matrix_of(operator)), weight)
    (actual,) = torch.autograd.grad(PowerIteration(1000, ascend=ascend).whole(operator).upper, weight)
    torch.testing.assert_close(actual, expected)


@both_ways
@pytest.mark.parametrize(("kept_columns", "kept_rows"), [(0.6, 0.6), (0.6, None), (None, 0.6)])
def test_gradient_of_the_masked_norm(operator, kept_columns, kept_rows, ascend):
    columns = None if kept_columns is None else torch.rand(BATCH, *operator.input_shape) < kept_columns
    rows = None if kept_rows is None else torch.rand(BATCH, *operator.output_shape) < kept_rows
    weight = operator.weight
    true = norm_of(masked_matrix(operator, rows, columns))
    estimate = ask(PowerIteration(3000, ascend=ascend), operator, rows, columns)
    for image in range(BATCH):
        (expected,) = torch.autograd.grad(true[image], weight, retain_graph=True)
        (actual,) = torch.autograd.grad(estimate[image], weight, retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@both_ways
def test_each_image_has_the_norm_that_it_has_alone(operator, ascend):
    columns = torch.rand(BATCH, *operator.input_shape) < 0.5
    together = ask(PowerIteration(1000, ascend=ascend), operator, None, columns)
    for image in range(BATCH):
        alone = ask(PowerIteration(1000, ascend=ascend), operator, None, columns[image : image + 1])
        torch.testing.assert_close(together[image], alone[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
def test_where_weights_move_the_ascent_lags_less_behind_than_power_iteration(operator, side, masked):
    columns = torch.rand(BATCH, *operator.input_shape) < 0.5 if masked else None
    starts = batch(getattr(operator, side))
    norms = [PowerIteration(2, {0: starts}, {0: starts[:1]}, ascend=ascend) for ascend in (False, True)]
    behind = torch.zeros(2, dtype=torch.float64)
    for step in range(60):
        operator = operator.with_weight(operator.weight.detach() + 0.003 * torch.randn_like(operator.weight))
        true = norm_of(masked_matrix(operator, None, columns) if masked else matrix_of(operator))
        for i, estimate in enumerate(norms):
            whole = estimate.whole(operator)
            found = masked_of(estimate, operator, None, columns, whole) if masked else whole.upper
            assert (found <= true * (1 + 1e-9)).all()
            behind[i] += (1 - found / true).mean() if step >= 10 else 0.0
    assert behind[1] < 0.7 * behind[0]


def test_an_ascent_in_single_precision_stays_below_where_it_has_converged(operator):
    true = norm_of(matrix_of(operator))
    single = operator.with_weight(operator.weight.detach().float())
    norms = PowerIteration(50, ascend=True)
    for _ in range(5):
        torch.testing.assert_close(norms.whole(single).upper.double(), true, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("columns", [1, 2, 5])
def test_an_ascent_stays_where_its_first_vector_is_the_best(columns, dtype):
    # What is left of the gradient beside the vector is rounding then.
    dense = Dense(torch.randn(1, columns, dtype=dtype), None, 0)
    for iterations in (2, 3, 100):
        found = PowerIteration(iterations, ascend=True).whole(dense).upper
        torch.testing.assert_close(found, dense.weight.norm())


@both_ways
@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
def test_start_vectors_that_are_given_stay_as_they_are(operator, side, ascend):
    starts = 3 * batch(getattr(operator, side))
    before = starts.clone()
    norms = PowerIteration(3, {0: starts}, {0: starts[:1]}, ascend=ascend)
    masked_of(norms, operator, None, None, norms.whole(operator))
    assert torch.equal(starts, before)


def test_of_nothing_but_zeros_the_norm_is_0_by_an_ascent_too(operator):
    operator = operator.with_weight(torch.zeros_like(operator.weight))
    assert ask(PowerIteration(3, ascend=True), operator, None, None).tolist() == [0] * BATCH


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
@pytest.mark.parametrize("given", ["columns", "rows", "both"])
def test_idle_masks_are_skipped_and_the_others_are_not(operator, side, given):
    columns, rows = (torch.rand(BATCH, *shape) < 0.5 for shape in (operator.input_shape, operator.output_shape))
    columns[1:3], rows[1:3] = True, True  # eliminate nothing
    columns, rows = columns if given != "rows" else None, rows if given != "columns" else None
    starts = batch(getattr(operator, side))
    skipping, all_of_them = (PowerIteration(3, {0: starts}, seed=1, skip_idle_masks=skip) for skip in (True, False))
    ours, theirs = (ask(norms, operator, rows, columns) for norms in (skipping, all_of_them))
    whole = skipping.whole(operator).upper
    idle, busy = [1, 2], [i for i in range(BATCH) if i not in (1, 2)]
    assert (ours[idle] <= whole).all()
    torch.testing.assert_close(ours[idle], PowerIteration(3, seed=1).whole(operator).upper.expand(2))
    torch.testing.assert_close(ours[busy], theirs[busy])
    torch.testing.assert_close(skipping.local_vectors[0][busy], all_of_them.local_vectors[0][busy])
    assert torch.equal(skipping.local_vectors[0][idle], starts[idle])
    gradients = (torch.autograd.grad(norm[busy].sum(), operator.weight)[0] for norm in (ours, theirs))
    torch.testing.assert_close(*gradients)


@both_ways
@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf])
def test_a_norm_that_cannot_be_computed_is_not_a_number(operator, side, spoiled, ascend):
    # 0 would certify everything.
    operator.weight.data[0, 0, 0, 0] = spoiled
    vectors = {0: batch(getattr(operator, side))}, {0: batch(getattr(operator, side))[:1]}
    norms = PowerIteration(2, *vectors, ascend=ascend)
    columns = torch.ones(BATCH, *operator.input_shape, dtype=torch.bool)
    assert norms.whole(operator).upper.isnan()
    assert masked_of(norms, operator, None, columns).isnan().all()


def test_where_all_masks_are_idle_the_norm_is_the_whole_one(operator):
    columns, starts = torch.ones(BATCH, *operator.input_shape, dtype=torch.bool), batch(operator.input_shape)
    norms = PowerIteration(2, {0: starts}, skip_idle_masks=True)
    whole = norms.whole(operator)
    for mask in (columns, None):
        masked = norms.masked(operator, None, mask, whole).upper.expand(BATCH)
        assert torch.equal(masked, whole.upper.expand(BATCH))
        assert torch.equal(norms.local_vectors[0], starts)


def test_the_seed_decides_the_start(operator):
    first, same, other = (PowerIteration(1, seed=seed).whole(operator).upper for seed in (1, 1, 2))
    assert first == same
    assert first != other


@pytest.mark.parametrize("iterations", [0, -1])
def test_less_than_one_iteration_is_refused(iterations):
    with pytest.raises(ValueError, match=str(iterations)):
        PowerIteration(iterations)


@pytest.mark.parametrize("iterations", ["a", 2.5, True, None])
def test_iterations_that_are_no_whole_number_are_refused(iterations):
    with pytest.raises(TypeError, match="the number of power iterations must be a whole number"):
        PowerIteration(iterations)


# --- start vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
def test_calls_go_on_where_the_last_one_stopped(operator, side):
    shape = getattr(operator, side)
    columns = torch.rand(BATCH, *operator.input_shape) < 0.5
    norms = PowerIteration(1, {0: batch(shape)}, {0: batch(shape)[:1]})
    with torch.no_grad():
        runs = [(norms.whole(operator).upper, *masked_of(norms, operator, None, columns)) for _ in range(500)]
    estimates = torch.tensor(runs)
    assert (estimates.diff(dim=0) >= -1e-12).all()
    true = torch.stack([norm_of(matrix_of(operator)), *norm_of(masked_matrix(operator, None, columns))])
    torch.testing.assert_close(estimates[-1], true.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
def test_vectors_stay_on_the_side_that_they_were_given_on(operator, side):
    shape = getattr(operator, side)
    norms = PowerIteration(2, {0: batch(shape)}, {0: batch(shape)[:1]})
    ask(norms, operator, None, torch.rand(BATCH, *operator.input_shape) < 0.5)
    assert norms.global_vectors[0].shape == (1, *shape)
    assert norms.local_vectors[0].shape == (BATCH, *shape)


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
def test_a_singular_vector_needs_one_iteration(operator, side):
    left, _, right = torch.linalg.svd(matrix_of(operator).detach())
    vector = right[0] if side == "input_shape" else left[:, 0]
    norms = PowerIteration(1, global_vectors={0: vector.view(1, *getattr(operator, side))})
    torch.testing.assert_close(norms.whole(operator).upper, norm_of(matrix_of(operator)))


def test_a_changed_number_of_images_takes_fresh_vectors(operator):
    norms = PowerIteration(2, {0: batch(operator.input_shape)})
    norms.whole(operator)
    columns = torch.ones(5, *operator.input_shape, dtype=torch.bool)
    assert masked_of(norms, operator, None, columns).shape == (5,)


def test_given_vectors_are_not_written_to(operator):
    local, whole = batch(operator.input_shape), batch(operator.input_shape)[:1]
    kept = local.clone(), whole.clone()
    ask(PowerIteration(2, {0: local}, {0: whole}), operator, None, torch.rand(BATCH, *operator.input_shape) < 0.5)
    assert torch.equal(local, kept[0])
    assert torch.equal(whole, kept[1])


@pytest.mark.parametrize("dead_side", ["input_shape", "output_shape"])
@pytest.mark.parametrize("start_side", ["input_shape", "output_shape"])
def test_a_norm_recovers_after_everything_was_masked_out(operator, dead_side, start_side):
    def masked(mask):
        return masked_of(norms, operator, *((mask, None) if dead_side == "output_shape" else (None, mask)))

    norms = PowerIteration(500, {0: batch(getattr(operator, start_side))})
    whole = norms.whole(operator).upper
    nothing = torch.zeros(BATCH, *getattr(operator, dead_side), dtype=torch.bool)
    assert (masked(nothing) == 0).all()
    assert norms.local_vectors[0].flatten(1).any(dim=1).all()
    torch.testing.assert_close(masked(~nothing), whole.expand(BATCH), rtol=1e-3, atol=0)


@pytest.mark.parametrize("start_side", ["input_shape", "output_shape"])
def test_a_norm_recovers_after_the_mask_has_moved_elsewhere(operator, start_side):
    norms = PowerIteration(500, {0: batch(getattr(operator, start_side))})
    left = torch.zeros(BATCH, *operator.input_shape, dtype=torch.bool)
    left[..., :3] = True
    for columns in (left, ~left):
        true = norm_of(masked_matrix(operator, None, columns))
        torch.testing.assert_close(masked_of(norms, operator, None, columns), true, rtol=1e-3, atol=0)


def test_a_zero_operator_has_norm_zero_and_recovers(operator):
    norms, zero = PowerIteration(500), operator.with_weight(torch.zeros_like(operator.weight, requires_grad=True))
    columns = torch.ones(BATCH, *operator.input_shape, dtype=torch.bool)
    estimates = [norms.whole(zero).upper, *masked_of(norms, zero, None, columns)]
    assert all(estimate == 0 for estimate in estimates)
    (gradient,) = torch.autograd.grad(sum(estimates), zero.weight)
    assert gradient.isfinite().all()
    true = norm_of(matrix_of(operator)).expand(BATCH)
    torch.testing.assert_close(norms.whole(operator).upper, true[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(masked_of(norms, operator, None, columns), true, rtol=1e-3, atol=0)


# --- arithmetic ------------------------------------------------------------------------------------------------------


def test_a_norm_of_rounded_factors_is_close_and_has_a_gradient(operator):
    expected = torch.autograd.grad(PowerIteration(100).whole(operator).upper, operator.weight)[0]
    rounded = operator.with_weight(operator.weight)
    rounded.factors = torch.bfloat16
    found = torch.autograd.grad(PowerIteration(100).whole(rounded).upper, operator.weight)[0]
    assert found.dtype == expected.dtype
    assert 0 < (found - expected).norm() < 0.02  # of a gradient of length about 1


def test_the_arithmetic_is_exact_but_for_factors_that_the_layers_round():
    assert PowerIteration(1).arithmetic == Arithmetic()
    assert not PowerIteration(1).arithmetic.allows_for_rounding
    assert PowerIteration(1, factors=torch.bfloat16).arithmetic == Arithmetic(factors=torch.bfloat16)


def test_an_estimate_has_no_absolute_norm_to_give(operator):
    with pytest.raises(TypeError, match="rounding"):
        PowerIteration(1).absolute(operator)


@pytest.mark.parametrize("size", [8e307, 1.7e308])
def test_a_norm_that_overflows_is_not_finite(operator, size):
    large = operator.with_weight(torch.full_like(operator.weight.detach(), size))
    norms = PowerIteration(2)
    columns = torch.ones(BATCH, *operator.input_shape, dtype=torch.bool)
    assert not norms.whole(large).upper.isfinite()
    assert not masked_of(norms, large, None, columns).isfinite().any()


@pytest.mark.parametrize("where", ["whole", "masked"])
@pytest.mark.parametrize("size", [1e-300, 1e-150, 1e150, 1e300])
def test_a_norm_is_not_lost_in_overflow_or_underflow(operator, size, where):
    scaled = operator.with_weight(operator.weight.detach() * size)
    columns = torch.rand(BATCH, *operator.input_shape) < 0.6
    ours, theirs = PowerIteration(500), PowerIteration(500)
    if where == "whole":
        found, expected = ours.whole(scaled).upper, theirs.whole(operator).upper
    else:
        found, expected = (masked_of(norms, o, None, columns) for norms, o in ((ours, scaled), (theirs, operator)))
    torch.testing.assert_close(found / size, expected.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-4, 1e-2, 1.0, 100.0])
@both_ways
def test_a_norm_in_low_precision_is_close_at_ordinary_scales(operator, dtype, size, ascend):
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1).to(dtype).requires_grad_(False)
    layer.weight.copy_(operator.weight.detach() * size)
    low = Conv.of(layer, 0, operator.input_shape)
    found = PowerIteration(100, ascend=ascend).whole(low).upper
    assert found.dtype == dtype
    expected = norm_of(matrix_of(low.with_weight(low.weight.double())))
    torch.testing.assert_close(found.double(), expected, rtol=0.03, atol=0)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float16, 5e4), (torch.float16, 6e-8), (torch.float32, 1e-45)])
def test_a_norm_that_its_precision_cannot_hold_is_not_a_number(dtype, size):
    low = Conv(torch.full((1, 1, 3, 3), size, dtype=dtype), None, 0, torch.Size([1, 6, 6]))
    found = PowerIteration(20).whole(low).upper
    assert found.isnan()


@pytest.mark.parametrize("positions", [(), (5,)])
def test_where_no_use_is_made_of_masks_the_local_norm_is_the_whole_one(operator, positions):
    norms = PowerIteration(3, local_positions=positions)
    whole = norms.whole(operator)
    nothing = torch.zeros(BATCH, *operator.input_shape, dtype=torch.bool)
    assert norms.masked(operator, None, nothing, whole) == whole
    assert not norms.local_vectors
