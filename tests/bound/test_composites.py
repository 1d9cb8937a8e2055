"""Sums of branches as one operator, against dense matrices."""

import pytest
import torch
from oracles import batch, dense_matrix, inner, masked, matrix_of, norm_of
from torch import nn

from local_bound import Conv, Dense, PowerIteration, ProvenNorms, check_operator
from locallip.bound.composites import Branch, Scaling, Sum

MAPS = torch.Size([3, 4, 4])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def conv(padding=1, size=3, inputs=3, outputs=3, scale=1.0, bias=True):
    weight = scale * torch.randn(outputs, inputs, size, size, dtype=torch.float64)
    shape = torch.Size([inputs, *MAPS[1:]])
    return Conv(weight, torch.randn(outputs).double() if bias else None, "conv", shape, (1, 1), (padding, padding))


def identity(factor=1.0):
    return Scaling(torch.full((1, 1, 1), factor, dtype=torch.float64), None, "one", MAPS)


def dense(inputs, outputs):
    return Dense(torch.randn(outputs, inputs).double(), torch.randn(outputs).double(), "dense")


def of(*branches, output=MAPS):
    return Sum([Branch(operators) for operators in branches], "sum", MAPS, torch.Size(output))


SUMS = {
    "x + W x": lambda: of((identity(),), (conv(),)),
    "x + W V x": lambda: of((identity(),), (conv(outputs=5), conv(inputs=5))),
    "of two paths": lambda: of((conv(padding=0, size=1),), (conv(outputs=2), conv(inputs=2))),
    "nearly nothing": lambda: of((identity(),), (identity(-1.0), identity(1 - 1e-9)), (conv(scale=1e-12),)),
    "of maps and matrices": lambda: of((dense(48, 7),), (conv(), dense(48, 7)), output=(7,)),
    "tiny": lambda: of((conv(scale=1e-90), conv(scale=1e-90)), (conv(scale=1e-181),)),
    "nested": lambda: of((identity(),), (of((identity(),), (conv(),)), conv())),
}


@pytest.fixture(params=SUMS)
def operator(request):
    return SUMS[request.param]()


def test_a_sum_is_linear_with_its_adjoint(operator):
    x, y = batch(operator.input_shape), batch(operator.output_shape)
    torch.testing.assert_close(inner(operator.apply(x), y), inner(x, operator.adjoint(y)))
    expected = sum(_dense(branch) for branch in operator.branches)
    torch.testing.assert_close(matrix_of(operator), expected)
    torch.testing.assert_close(operator.affine(x) - operator.apply(x), operator.affine(0 * x))


def _dense(branch):
    result = torch.eye(MAPS.numel(), dtype=torch.float64)
    for part in branch.operators:
        result = dense_matrix(part.apply, part.input_shape) @ result
    return result


def test_what_bounds_a_sum_from_above_does(operator):
    matrix, slack = matrix_of(operator), 1e-9
    x = batch(operator.input_shape).abs()
    assert (operator.absolute(x).flatten(1) >= (x.flatten(1) @ matrix.abs().T) * (1 - slack)).all()
    rows = operator.row_norms().expand(1, *operator.output_shape).flatten()
    assert (rows >= matrix.norm(dim=1) * (1 - slack)).all()
    assert operator.norm_bound() >= norm_of(matrix) * (1 - slack)
    assert operator.size_of_parts >= norm_of(matrix.abs()) * (1 - slack)
    bias = operator.affine(torch.zeros(1, *operator.input_shape).double())[0]
    assert (operator.bias_magnitude() >= bias.abs() * (1 - slack)).all()
    largest = operator.output_shape.numel()
    assert operator.terms[0] >= (matrix != 0).sum(dim=1).max() / largest


def test_scales_and_weights_are_taken_out_as_of_any_operator(operator):
    matrix = matrix_of(operator)
    torch.testing.assert_close(matrix_of(operator.scaled) * operator.scale, matrix)
    size = 2.0**-3
    single = operator.divided(size, torch.float32)
    assert single.apply(batch(operator.input_shape).float()).dtype == torch.float32
    torch.testing.assert_close(matrix_of(operator.divided(size, torch.float64)) * size, matrix)
    torch.testing.assert_close(matrix_of(operator.with_weight(operator.weight)), matrix)
    absolute = matrix_of(operator.absolute_operator())
    assert (absolute >= matrix.abs() * (1 - 1e-9)).all()


def test_gradients_of_a_sum_are_those_of_its_parts():
    weights = [torch.randn(3, 3, 3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    parts = [Conv(weight, None, "conv", MAPS, (1, 1), (1, 1)) for weight in weights]
    operator = of((identity(),), tuple(parts))
    x, y = batch(MAPS), batch(MAPS)
    (inner(operator.apply(x), y).sum()).backward()
    expected = [weight.grad.clone() for weight in weights]
    found = operator.weight_gradient(x, y)
    (operator.weight * found.detach()).sum()  # the flat vector is made of the weights
    grads = torch.autograd.grad(operator.weight, weights, found)
    for ours, theirs in zip(grads, expected):
        torch.testing.assert_close(ours, theirs)


def test_the_gradient_of_a_norm_reaches_every_part():
    layers = nn.ModuleList(nn.Conv2d(3, 3, 3, padding=1, bias=False) for _ in range(2)).double()

    def operator():
        return of((identity(),), tuple(Conv.of(layer, "conv", MAPS) for layer in layers))

    PowerIteration(2000).whole(operator()).upper.backward()
    step = torch.randn_like(layers[0].weight)
    slope = (layers[0].weight.grad * step).sum()
    norms = []
    for sign in (1, -1):
        with torch.no_grad():
            layers[0].weight += sign * 1e-6 * step
            norms.append(norm_of(matrix_of(operator())))
            layers[0].weight -= sign * 1e-6 * step
    torch.testing.assert_close((norms[0] - norms[1]) / 2e-6, slope, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("steps", [0, 40])
def test_proven_brackets_hold_the_norms_of_a_sum(operator, steps):
    norms, matrix = ProvenNorms(1e-6, 100, steps, seed=0), matrix_of(operator)
    whole, true = norms.whole(operator), norm_of(matrix)
    assert whole.lower <= true * (1 + 1e-12)
    assert true <= whole.upper
    assert norms.absolute(operator) >= norm_of(matrix.abs())
    rows, columns = torch.rand(3, *operator.output_shape) < 0.6, torch.rand(3, *operator.input_shape) < 0.6
    bracket = norms.masked(operator, rows, columns, whole)
    true = norm_of(masked(matrix, rows, columns))
    assert (bracket.lower <= true * (1 + 1e-12)).all()
    assert (true <= bracket.upper).all()


def test_the_norm_of_a_sum_is_below_the_sum_of_the_norms():
    operator = of((identity(),), (conv(scale=0.1),))
    upper = ProvenNorms(1e-6, 100, seed=0).whole(operator).upper
    assert upper < 0.99 * (1 + norm_of(matrix_of(operator.branches[1].operators[0])))


def test_changed_weights_of_a_part_are_noticed():
    layer, norms = nn.Conv2d(3, 3, 3, padding=1).double().requires_grad_(False), ProvenNorms(1e-6, 100, seed=0)

    def upper():
        return norms.whole(of((identity(),), (Conv.of(layer, "conv", MAPS),))).upper

    before = upper()
    layer.weight *= 3
    assert upper() > 1.5 * before


def test_the_contract_of_operators_holds_for_a_scaling():
    check_operator(Scaling(torch.randn(3, 1, 1).double(), torch.randn(3, 1, 1).double(), "scale", MAPS))
