"""Curves and bent lines against high precision, finite differences and sampling."""

import math

import mpmath
import pytest
import torch
from contracts_of_layers import ActivationContract
from torch import nn

from local_bound import Graph, propagate, proven_norms
from locallip.bound import curves
from locallip.bound.curves import Bent
from locallip.bound.norms import Arithmetic
from locallip.bound.region import Region


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def elu(alpha, scale=1, width=1):
    return lambda x: scale * (x if x > 0 else alpha * mpmath.expm1(x / width))


def gelu_by_tanh(x):
    return x / 2 * (1 + mpmath.tanh(mpmath.sqrt(2 / mpmath.pi) * (x + mpmath.mpf(0.044715) * x**3)))


def gelu(x):
    return x * mpmath.ncdf(x) if abs(x) < 1e6 else max(x, 0)


def softplus(x):
    return mpmath.log1p(mpmath.exp(x))


def clipped(x):
    return min(max(x + 3, 0), 6) / 6


SCALE, ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
# The layer, its curve, and the function itself, exact for numbers of any precision.
CURVES = {
    "sigmoid": (nn.Sigmoid(), curves.sigmoid(), lambda x: 1 / (1 + mpmath.exp(-x))),
    "tanh": (nn.Tanh(), curves.tanh(), mpmath.tanh),
    "softsign": (nn.Softsign(), curves.softsign(), lambda x: x / (1 + abs(x))),
    "tanhshrink": (nn.Tanhshrink(), curves.tanhshrink(), lambda x: x - mpmath.tanh(x)),
    "softplus": (nn.Softplus(), curves.softplus(1.0, 20.0), softplus),
    "steep softplus": (nn.Softplus(4, 30), curves.softplus(4.0, 30.0), lambda x: softplus(4 * x) / 4),
    "logsigmoid": (nn.LogSigmoid(), curves.logsigmoid(), lambda x: -softplus(-x)),
    "elu": (nn.ELU(), curves.elu(1.0), elu(1)),
    "flat elu": (nn.ELU(0.5), curves.elu(0.5), elu(0.5)),
    "steep elu": (nn.ELU(3.0), curves.elu(3.0), elu(3)),
    "celu": (nn.CELU(0.5), curves.elu(0.5, width=0.5), elu(0.5, width=0.5)),
    "selu": (nn.SELU(), curves.elu(ALPHA, SCALE), elu(mpmath.mpf(ALPHA), mpmath.mpf(SCALE))),
    "silu": (nn.SiLU(), curves.silu(), lambda x: x / (1 + mpmath.exp(-x))),
    "gelu": (nn.GELU(), curves.gelu(), gelu),
    "gelu by tanh": (nn.GELU(approximate="tanh"), curves.gelu("tanh"), gelu_by_tanh),
    "mish": (nn.Mish(), curves.mish(), lambda x: x * mpmath.tanh(softplus(x))),
    "hardsigmoid": (nn.Hardsigmoid(), curves.hardsigmoid(), clipped),
    "hardswish": (nn.Hardswish(), curves.hardswish(), lambda x: x * clipped(x)),
}
RESTING = {"hardsigmoid", "hardswish"}
FALLING = {"silu", "gelu", "gelu by tanh", "mish", "hardswish"}


class CurveContract(ActivationContract):
    """The contract of every activation, of a curve."""

    rests = False

    @pytest.fixture(params=sorted(set(CURVES) - RESTING - FALLING))
    def activation(self, request):
        return CURVES[request.param][1]


class TestRisingCurve(CurveContract):
    pass


class TestCurveThatFallsSomewhere(CurveContract):
    monotone = False
    below = 1.0  # they fall between -3 and their turn

    @pytest.fixture(params=sorted(FALLING - RESTING))
    def activation(self, request):
        return CURVES[request.param][1]


class TestLeakyReLU(ActivationContract):
    rests = False

    def create(self):
        return Bent(0.1)


class TestPReLU(ActivationContract):
    rests = False
    monotone = False

    def create(self):
        left = torch.tensor([0.2, -0.5, 1.5, 1.0], dtype=torch.float64).view(1, 4, 1, 1)
        return Bent(left.requires_grad_())


def numbers():
    """Where rounding, saturation and turns could matter."""
    dense = torch.linspace(-45, 45, 901, dtype=torch.float64)
    near = torch.linspace(-4, 4, 801, dtype=torch.float64) + 1e-3 * torch.rand(801, dtype=torch.float64)
    far = torch.tensor([1e-300, 1e-12, 1e3, 1e9, 1e99], dtype=torch.float64)  # beyond 1e100 nothing is certified
    return torch.cat([dense, near, far, -far])


@pytest.mark.parametrize("name", CURVES)
def test_the_curve_is_the_layer_and_is_off_by_no_more_than_it_says(name):
    layer, curve, exact = CURVES[name]
    x = numbers()
    computed = curve(x)
    torch.testing.assert_close(computed, layer(x), rtol=1e-14, atol=1e-14)
    with mpmath.workdps(60):
        for computed_by in (computed, layer(x)):
            for at, value in zip(x.tolist(), computed_by.tolist()):
                true = exact(mpmath.mpf(at))
                assert abs(true - value) <= curve.rounding + curve.relative_rounding * abs(value), at


@pytest.mark.parametrize("name", CURVES)
def test_a_tenth_of_what_it_says_would_be_too_little_for_some_or_it_is_small(name):
    """Errors that are declared are no more than cost nothing."""
    curve = CURVES[name][1]
    assert 0 < curve.rounding < 1e-8
    assert curve.relative_rounding < 1e-15


@pytest.mark.parametrize("name", CURVES)
def test_the_derivative_is_that_of_autograd(name):
    curve = CURVES[name][1]
    x = (6 * torch.randn(1000, dtype=torch.float64)).requires_grad_()
    (expected,) = torch.autograd.grad(curve(x).sum(), x)
    # Of hardsigmoid PyTorch has a gradient of 1/6 in float32; what is exact there the next test tells.
    rtol = 1e-7 if name == "hardsigmoid" else 1e-9
    torch.testing.assert_close(curve.derivative(x.detach()), expected, rtol=rtol, atol=1e-12)


@pytest.mark.parametrize("name", CURVES)
def test_neither_value_nor_slope_depends_on_the_default_dtype(name):
    curve, x = CURVES[name][1], torch.cat([numbers(), torch.zeros(1).double()])
    expected = curve(x), curve.derivative(x)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = curve(x), curve.derivative(x)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", CURVES)
def test_the_constant_is_the_largest_slope_and_no_more(name):
    curve = CURVES[name][1]
    x = torch.cat([torch.linspace(-8, 8, 160001, dtype=torch.float64), torch.tensor([1e3, -1e3]).double()])
    steepest = curve.derivative(x).abs().max()
    assert steepest <= curve.lipschitz * (1 + 1e-12) + 1e-12
    assert steepest >= curve.lipschitz * (1 - 1e-6)


@pytest.mark.parametrize("name", [name for name in CURVES if CURVES[name][1].curvature is not None])
def test_the_curvature_is_not_below_differences_of_the_slope(name):
    curve = CURVES[name][1]
    x = torch.linspace(-8, 8, 160001, dtype=torch.float64)
    slope = curve.derivative(x)
    found = ((slope[1:] - slope[:-1]) / (x[1] - x[0])).abs().max()
    assert found <= curve.curvature * (1 + 1e-6)
    assert found >= curve.curvature * 0.9


@pytest.mark.parametrize("name", CURVES)
def test_ranges_and_slopes_over_intervals_hold_and_are_tight(name):
    """Intervals of all lengths, at turns and kinks too; compared with a fine grid."""
    curve = CURVES[name][1]
    center = torch.cat([3 * torch.randn(300).double(), torch.tensor([*curve.turns, *curve.steepest, 0.0, 3.0, -3.0])])
    half = 10 ** (3 * torch.rand(len(center), dtype=torch.float64) - 2.5)
    lower, upper = (center - half)[:, None], (center + half)[:, None]
    region = Region(center[:, None], lower, upper)
    behind, _ = curve.behind(region, fuse=False)
    grid = lower + (upper - lower) * torch.linspace(0, 1, 4001, dtype=torch.float64)
    grid = grid.minimum(upper)  # which rounding may pass
    values = curve(grid)
    for end, seen in ((behind.lower, values.amin(dim=1)), (behind.upper, values.amax(dim=1))):
        torch.testing.assert_close(end.squeeze(1), seen, rtol=1e-4, atol=1e-5)
    assert (behind.lower <= values + 1e-15).all()
    assert (values <= behind.upper + 1e-15).all()
    seen = ((values[:, 1:] - values[:, :-1]) / (grid[:, 1:] - grid[:, :-1])).abs().amax(dim=1)
    steepness = curve.steepness(region)
    assert (seen <= steepness * (1 + 1e-9) + 1e-9).all()
    torch.testing.assert_close(seen, steepness, rtol=0.02, atol=1e-3)


def test_far_from_0_a_sigmoid_is_flatter_than_a_quarter():
    model = nn.Sequential(nn.Linear(3, 3), nn.Sigmoid(), nn.Linear(3, 2)).double()
    model[0].bias.data.fill_(8.0)
    model[0].weight.data.clamp_(-0.5, 0.5)
    bound = propagate(model, torch.rand(2, 3).double(), 0.1, proven_norms(model, torch.rand(2, 3).double(), 2))
    assert (bound.hidden_lipschitz < 0.01 * bound.global_hidden_lipschitz).all()


@pytest.mark.parametrize("left", [0.1, 0.0, -0.5, 2.0, -3.0])
def test_a_bent_line_knows_its_slopes_on_both_sides(left):
    bent = Bent(left)
    assert bent.lipschitz == max(1.0, abs(left))
    ends = torch.tensor([[-2.0, -1.0], [-1.0, 1.0], [0.5, 2.0]], dtype=torch.float64)
    region = Region(ends.mean(dim=1, keepdim=True), ends[:, :1], ends[:, 1:])
    assert bent.steepness(region).tolist() == [abs(left), max(1.0, abs(left)), 1.0]
    assert bent.varying(ends[:, :1], ends[:, 1:]).squeeze(1).tolist() == [left != 0, True, True]


def test_where_nothing_is_known_of_a_box_a_bent_line_is_as_steep_as_anywhere():
    nan = torch.full((1, 2), torch.nan, dtype=torch.float64)
    assert Bent(2.0).steepness(Region(nan, nan, nan)).tolist() == [2.0]


def test_gradients_flow_to_the_slopes_of_a_prelu_through_the_bound():
    model = nn.Sequential(nn.Linear(3, 4), nn.PReLU(4, init=1.5), nn.Linear(4, 2)).double()
    x = torch.rand(2, 3).double()
    (activation,) = Graph.of(model).activations(x)
    region = Region(x.new_zeros(2, 4), x.new_full((2, 4), -1.0), x.new_ones(2, 4))
    activation.steepness(region).sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    assert Arithmetic().own == 0


def test_a_proof_allows_for_the_rounding_of_a_bent_line_as_a_share_of_its_output():
    bent = Bent(0.3)
    ends = torch.tensor([[-1e6, -1.0]], dtype=torch.float64), torch.tensor([[1.0, 1e3]], dtype=torch.float64)
    error = bent.error(Region(ends[0], *ends))
    assert error.tolist() == [[1e6 * 2.0**-52, 1e3 * 2.0**-52]]
    x = 1e6 * torch.randn(1000, dtype=torch.float64)
    exact = [mpmath.mpf(v) * (mpmath.mpf(0.3) if v < 0 else 1) for v in x.tolist()]
    assert all(abs(e - v) <= 2.0**-52 * abs(v) for e, v in zip(exact, bent(x).tolist()))


@pytest.mark.parametrize("layer", [nn.Tanh(), nn.LeakyReLU(0.1), nn.SELU(), nn.Hardswish()])
def test_what_holds_in_float32_is_refused_of_activations_that_round(layer):
    model, x = nn.Sequential(nn.Linear(3, 3), layer, nn.Linear(3, 2)).double(), torch.rand(2, 3).double()
    with pytest.raises(ValueError, match=r"position 1 rounds, and its rounding in float32 is not bounded"):
        propagate(model, x, 0.1, proven_norms(model, x, 2, deployed="float32"))


def test_steep_curves_are_not_for_the_dual_and_others_are():
    known = {name for name, (_, curve, _) in CURVES.items() if curve.in_dual() is not None}
    assert known == {
        *("sigmoid", "tanh", "softsign", "tanhshrink", "softplus", "steep softplus"),
        *("logsigmoid", "elu", "celu"),
    }
    assert Bent(0.1).in_dual() is not None
    assert Bent(1.5).in_dual() is None
    assert math.isclose(curves.silu().lipschitz, 1.0998, rel_tol=1e-4)
