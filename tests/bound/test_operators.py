"""Linear layers as operators."""

import copy

import pytest
import torch
from contracts_of_operators import OperatorContract
from hypothesis import given
from hypothesis import strategies as st
from oracles import batch, convolutions, dense_layers, matrix_of, more_examples
from torch import nn

from local_bound import certify, verify
from locallip.bound import operators
from locallip.bound.operators import Conv, Dense
from locallip.bound.pooling import AveragePool, adaptive_windows, averages
from locallip.bound.transposed import TransposedConv


class TestConv(OperatorContract):
    def create(self, draw):
        return draw(convolutions())


class TestConvInOneDimension(OperatorContract):
    def create(self, draw):
        return draw(convolutions(dims=1))


class TestConvInThreeDimensions(OperatorContract):
    def create(self, draw):
        return draw(convolutions(dims=3))


class TestTransposedConv(OperatorContract):
    def create(self, draw):
        conv = draw(convolutions())
        bias = torch.randn(conv.input_shape[0], dtype=torch.float64) if draw(st.booleans()) else None
        return TransposedConv(Conv(conv.weight, None, 0, conv.input_shape, *conv.geometry()), bias)


@more_examples
@given(st.sampled_from([1, 2, 3]).flatmap(lambda dims: convolutions(dims=dims)), st.integers(1, 3))
def test_images_are_convolved_some_at_a_time_as_all_at_once(conv, at_a_time):
    bytes_of_one = 8 * conv.groups * conv.weight[0].numel() * conv.output_shape[1:].numel()
    x = torch.randn(5, *conv.input_shape, dtype=torch.float64)
    y = torch.randn(5, *conv.output_shape, dtype=torch.float64)
    whole = conv.apply(x), conv.affine(x), conv.absolute(x), conv.adjoint(y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "_PATCHES", at_a_time * bytes_of_one)
        parts = conv.apply(x), conv.affine(x), conv.absolute(x), conv.adjoint(y)
        patch.setattr(torch, "cat", None)
        with pytest.raises(TypeError):  # so it was in parts
            conv.apply(x)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-300)


class TestAveragePool(OperatorContract):
    def create(self, draw):
        axes = []
        for _ in range(draw(st.integers(1, 3))):
            size = draw(st.integers(1, 5))
            axes.append(averages(adaptive_windows(size, draw(st.integers(1, 6))), size, torch.zeros(1).double()))
        return AveragePool(axes, draw(st.integers(1, 3)), 0)


class TestDense(OperatorContract):
    def create(self, draw):
        return draw(dense_layers())


@pytest.fixture
def operator():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    return Conv.of(layer, 0, torch.Size([2, 6, 6]))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (4, 3), "stride": (2, 3), "padding": (0, 2)},
        {"kernel_size": 3, "dilation": (2, 1), "groups": 2},
        {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
        {"kernel_size": 2, "padding": "valid"},
    ],
)
def test_a_convolution_does_what_its_layer_does(settings, bias):
    layer = nn.Conv2d(2, 4, **settings, bias=bias).double()
    x = batch((2, 7, 8))
    torch.testing.assert_close(Conv.of(layer, 0, x.shape[1:]).affine(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_operator_does_what_its_layer_does(bias):
    layer = nn.Linear(5, 3, bias=bias).double()
    x = batch((5,))
    torch.testing.assert_close(Dense.of(layer, 0).affine(x), layer(x))


@pytest.mark.parametrize("layer", [nn.Linear(5, 3), nn.Conv2d(2, 4, 3, groups=2)], ids=lambda x: type(x).__name__)
def test_gradients_flow_to_the_weight_and_the_bias_of_the_layer(layer):
    layer = layer.double()
    shape = torch.Size([5] if isinstance(layer, nn.Linear) else [2, 6, 6])
    operator = Dense.of(layer, 0) if isinstance(layer, nn.Linear) else Conv.of(layer, 0, shape)
    x = batch(shape)
    expected = torch.autograd.grad(layer(x).square().sum(), list(layer.parameters()))
    found = torch.autograd.grad(operator.affine(x).square().sum(), list(layer.parameters()))
    torch.testing.assert_close(found, expected)


def test_row_norms_are_exact_where_no_padding_cuts_the_row(operator):
    true = matrix_of(operator).norm(dim=1).view(operator.output_shape)[:, 1:, 1:]
    torch.testing.assert_close(operator.row_norms().expand_as(true), true)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_row_norms_are_not_lost_in_overflow_or_underflow(operator, scale):
    small_or_large = operator.with_weight(operator.weight.detach() * scale)
    torch.testing.assert_close(small_or_large.row_norms() / scale, operator.row_norms().detach())


@pytest.mark.parametrize("product", ["apply", "adjoint", "affine", "absolute"])
def test_a_convolution_can_round_its_factors_and_keeps_the_precision_of_sums(operator, product):
    x = batch(operator.output_shape if product == "adjoint" else operator.input_shape)
    exact = getattr(operator, product)(x)
    operator.factors = torch.bfloat16
    rounded = getattr(operator, product)(x)
    assert rounded.dtype == exact.dtype
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.01


def test_dense_layers_round_nothing():
    dense = Dense.of(nn.Linear(5, 4).double(), 0)
    x = batch(dense.input_shape)
    exact = dense.affine(x)
    dense.factors = torch.bfloat16
    assert torch.equal(dense.affine(x), exact)


def test_uneven_padding_is_refused():
    with pytest.raises(TypeError, match=r"position 3.*same"):
        Conv.of(nn.Conv2d(1, 1, 4, padding="same"), 3, torch.Size([1, 5, 5]))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_other_than_zeros_is_refused(mode):
    with pytest.raises(TypeError, match=f"position 3.*{mode}"):
        Conv.of(nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode), 3, torch.Size([1, 5, 5]))


@pytest.mark.parametrize("effort", ["product", "dual"])
def test_a_bias_that_all_outputs_share_is_that_of_each(effort):
    """PyTorch broadcasts it, in Linear and in F.linear alike."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).double().eval()
    shared = copy.deepcopy(net)
    for linear, alike in ((net[0], shared[0]), (net[2], shared[2])):
        linear.bias, alike.bias = (nn.Parameter(torch.full((size,), 0.3).double()) for size in (len(linear.bias), 1))
    x, y = torch.rand(4, 6).double(), torch.tensor([0, 1, 2, 0])
    assert certify(net, x, y, 0.1, effort=effort).equal(certify(shared, x, y, 0.1, effort=effort))
    margins = (verify(model, x, y, 0.1, effort=effort, seed=1).worst_margin for model in (net, shared))
    torch.testing.assert_close(*margins)
