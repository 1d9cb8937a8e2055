"""How far a forward pass in floating point is from the exact one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import convolutions, matrix_of, more_examples, norm_of
from torch import nn

from locallip.bound.operators import Dense
from locallip.bound.rounding import FLOAT32, FLOAT64, ExactArithmetic, Rounding


@more_examples
@given(
    st.lists(st.sampled_from([1, 3, 40, 700, 5000]), min_size=3, max_size=4),
    st.lists(st.integers(-6, 6), min_size=3, max_size=3),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_a_float32_pass_stays_as_close_to_the_exact_one_as_promised(sizes, exponents, seed, all_positive):
    torch.manual_seed(seed)
    shapes = [(min(after, 40), before) for before, after in zip(sizes, [min(s, 40) for s in sizes[1:]])]
    shapes = [(rows, columns if i == 0 else shapes[i - 1][0]) for i, (rows, columns) in enumerate(shapes)]
    z = torch.rand(3, sizes[0]) + 0.1
    exact, rounding = z.double(), Rounding(FLOAT32, torch.zeros(3, dtype=torch.float64))
    for (rows, columns), exponent in zip(shapes, exponents):
        layer = nn.Linear(columns, rows).requires_grad_(False)
        # Rows of different sizes; without signs nothing cancels and errors are largest.
        layer.weight.mul_(10.0**exponent * torch.logspace(0, 3, rows)[:, None])
        if all_positive:
            layer.weight.abs_()
        double = nn.Linear(columns, rows).double().requires_grad_(False)
        double.load_state_dict(layer.state_dict())
        operator, length = Dense.of(double, 0), exact.norm(dim=1)
        off_logits, off_sums = rounding.of_logits(operator, length), rounding.of_sums(operator, length)
        # What a sum is off by beside what its inputs were.
        same_input = (layer(z) - double(z.double())).abs()
        assert (same_input <= off_sums).all()
        rounding = rounding.behind_layer(operator, norm_of(double.weight), norm_of(double.weight.abs()), length)
        z, exact = layer(z), double(exact)
        assert ((z - exact).abs() <= off_logits).all()
        assert ((z - exact).norm(dim=1) <= rounding.distance).all()
        z, exact = z.relu(), exact.relu()


@more_examples
@given(convolutions())
def test_a_float32_convolution_stays_as_close_to_the_exact_one_as_promised(conv):
    bias = None if conv.bias is None else conv.bias.float()
    low = conv.with_weight(conv.weight.float(), bias)
    exact = conv.with_weight(low.weight.double(), None if bias is None else bias.double())
    x = torch.rand(3, *conv.input_shape)
    rounding = Rounding(FLOAT32, torch.zeros(3, dtype=torch.float64))
    absolute, length = norm_of(matrix_of(exact.absolute_operator())), x.double().flatten(1).norm(dim=1)
    off = low.affine(x) - exact.affine(x.double())
    assert (off.abs() <= rounding.of_sums(exact, length)).all()
    behind = rounding.behind_layer(exact, norm_of(matrix_of(exact)), absolute, length)
    assert (off.flatten(1).norm(dim=1) <= behind.distance).all()
    assert (behind.distance < 1e-3).all()


def one_layer(weight=1.0):
    return Dense(torch.full((2, 3), weight, dtype=torch.float64), None, 0)


@pytest.mark.parametrize(("roundoff", "too_large"), [(FLOAT32, 1e38), (FLOAT64, 1e100)])
def test_what_may_overflow_counts_as_arbitrarily_far_off(roundoff, too_large):
    rounding, one = Rounding(roundoff, torch.zeros(1, dtype=torch.float64)), torch.ones((), dtype=torch.float64)
    for length, finite in ((0.1 * too_large, True), (10 * too_large, False), (torch.nan, False)):
        behind = rounding.behind_layer(one_layer(), one, one, torch.tensor([length], dtype=torch.float64))
        assert behind.distance.isfinite().item() is finite
        off = rounding.of_logits(one_layer(0.1), torch.tensor([length], dtype=torch.float64))
        assert off.isfinite().all().item() is finite


@pytest.mark.parametrize(("roundoff", "smallest"), [(FLOAT32, 2.0**-126), (FLOAT64, 2.0**-1022)])
def test_what_may_be_flushed_to_zero_counts_as_lost(roundoff, smallest):
    rounding, zero = Rounding(roundoff, torch.zeros(1, dtype=torch.float64)), torch.zeros((), dtype=torch.float64)
    tiny = one_layer(0.0)
    assert (rounding.of_sums(tiny, zero.view(1)) >= 3 * smallest).all()
    assert (rounding.behind_layer(tiny, zero, zero, zero.view(1)).distance >= 3 * smallest).all()


def test_an_activation_that_rounds_adds_its_error_of_every_entry():
    rounding = Rounding(FLOAT64, torch.tensor([0.5], dtype=torch.float64))
    assert rounding.behind_activation(0.0, 100) is rounding
    assert rounding.behind_activation(0.01, 100).distance == pytest.approx(0.5 + 0.01 * 10, rel=1e-5)
    assert rounding.behind_activation(0.01, 100).distance >= 0.5 + 0.01 * 10


def test_a_product_of_norms_is_never_lost_in_underflow():
    small = torch.tensor([1e-200, 1e-200, 0.0, 2.0], dtype=torch.float64)
    with_rounding = Rounding(FLOAT64, small).product(small, small)
    assert with_rounding.tolist() == [1e-150, 1e-150, 1e-150, 4.0]
    exact = ExactArithmetic().product(small, small)
    assert exact[:2].isnan().all()
    assert exact[2:].tolist() == [0.0, 4.0]


def test_exact_arithmetic_is_off_by_nothing():
    exact, length = ExactArithmetic(), torch.ones(1)
    assert exact.widening(length, length) == exact.of_sums(one_layer(), length) == 0
    assert exact.of_logits(one_layer(), length) == exact.distance == 0
    assert exact.behind_layer(one_layer(), length, None, None) is exact
    assert exact.behind_activation(0.1, 3) is exact
