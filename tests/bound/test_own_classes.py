"""Classes of a user's own: what they inherit must be true of them, and what their rules return must be something."""

import math

import pytest
import torch
from oracles import settled
from torch import nn

from local_bound import (
    Clip,
    Dense,
    Elementwise,
    LinearOperator,
    Reshape,
    certified_radius,
    certify,
    check_operator,
    check_rule,
    rule,
)
from locallip.bound import rules
from locallip.bound.activations import Activation, ClippedMaxMin
from locallip.bound.curves import Bent, Curve
from locallip.bound.pooling import MaxPool
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.sorting import SortedGroups

GAIN = 10.0


@pytest.fixture(autouse=True)
def scratch_rules(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))
    monkeypatch.setattr(rules, "_METHODS", dict(rules._METHODS))


class Gained(nn.Module):
    """A matrix times a gain that is no part of the weight."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x):
        return GAIN * (x @ self.weight.T)


class GainedDense(Dense):
    def apply(self, x):
        return GAIN * super().apply(x)

    def adjoint(self, y):
        return GAIN * super().adjoint(y)

    def affine(self, x):
        return self.apply(x)

    def absolute(self, x):
        return GAIN * super().absolute(x)

    def weight_gradient(self, x, y):
        return GAIN * super().weight_gradient(x, y)

    def row_norms(self):
        return GAIN * super().row_norms()

    def norm_bound(self):
        return GAIN * super().norm_bound()


def use_gained():
    rule(Gained)(lambda layer, place: GainedDense(layer.weight, None, place.position))


def test_a_matrix_that_is_applied_otherwise_has_the_masked_norms_of_what_it_applies():
    operator = GainedDense(torch.randn(8, 6).double(), None, 0)
    columns = torch.rand(5, 6) < 0.6
    norms = ProvenNorms(1e-6, planned=5, seed=0)
    found = norms.masked(operator, None, columns, norms.whole(operator)).upper
    true = torch.stack([torch.linalg.matrix_norm(GAIN * operator.weight * mask, ord=2) for mask in columns])
    assert (found >= true).all()
    assert found.tolist() == pytest.approx(true.tolist(), rel=1e-2)


def test_a_network_of_it_is_certified_as_far_as_with_the_gain_in_the_weight():
    use_gained()
    check_rule(Gained(6, 8), (6,))
    net = settled(Gained(6, 12), nn.ReLU(), Gained(12, 12), nn.ReLU(), nn.Linear(12, 3))
    plain = [nn.Linear(6, 12, bias=False), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.ReLU(), net[-1]]
    plain = settled(*plain)
    with torch.no_grad():
        for at in (0, 2):
            plain[at].weight.copy_(GAIN * net[at].weight)
    x = torch.rand(4, 6).double()
    radii = [certified_radius(model, x, tolerance=1e-4) for model in (net, plain)]
    assert radii[0].tolist() == pytest.approx(radii[1].tolist(), rel=0.1, abs=2e-4)


def test_the_check_of_an_operator_asks_for_masked_norms(monkeypatch):
    half = ProvenNorms.masked

    def too_small(norms, *args):
        found = half(norms, *args)
        return type(found)(found.lower / 2, found.upper / 2)

    monkeypatch.setattr(ProvenNorms, "masked", too_small)
    with pytest.raises(AssertionError, match="a masked norm is"):
        check_operator(Dense(torch.rand(4, 6).double(), None, 0))


@pytest.mark.parametrize("base", [Clip, ClippedMaxMin, SortedGroups, Bent, Curve, MaxPool, Elementwise])
def test_an_activation_that_computes_otherwise_than_the_class_it_inherits_from_is_refused(base):
    with pytest.raises(TypeError, match=rf"Half computes otherwise than {base.__name__}, .* derive it from Activation"):

        class Half(base):
            def __call__(self, x):
                return super().__call__(x) / 2


def test_a_function_that_is_mixed_in_is_another_one_too():
    class Halving:
        def __call__(self, x):
            return x.clamp(0, 2) / 2

    with pytest.raises(TypeError, match="Half computes otherwise than Halving and Clip"):

        class Half(Halving, Clip):
            pass


def test_an_activation_that_only_says_more_may_inherit():
    class Named(Clip):
        name = "clip"

    assert Named(0.0, 1.0)(torch.tensor([[2.0]])) == 1
    assert Named(0.0, 1.0).in_dual() is not None


def test_an_activation_derived_from_the_abstract_class_may_compute_what_it_says():
    class Shrunk(Activation):
        rounding = 1e-15

        def __call__(self, x):
            return x.clamp(0, 2) / 2

        def varying(self, lower, upper):
            return ~((upper <= 0) | (lower >= 2))

    assert Shrunk().in_dual() is None


class Odd(nn.Module):
    def forward(self, x):
        return x.relu()


@pytest.mark.parametrize("returned", [None, nn.ReLU(), torch.relu, 3])
@pytest.mark.parametrize("ask", [certify, check_rule])
def test_a_rule_that_returns_something_else_is_refused(returned, ask):
    rule(Odd)(lambda layer, place: returned)
    net = nn.Sequential(nn.Linear(3, 3), Odd(), nn.Linear(3, 2)).eval()
    arguments = {check_rule: (Odd(), (3,)), certify: (net, torch.rand(1, 3), torch.tensor([0]), 0.1)}
    with pytest.raises(TypeError, match=r"rule for Odd at position \d must return what the layer is"):
        ask(*arguments[ask])


def certify_with_odd():
    net = nn.Sequential(nn.Linear(3, 3), Odd(), nn.Linear(3, 2)).eval()
    return certify(net, torch.rand(1, 3), torch.tensor([0]), 0.1)


@pytest.mark.parametrize(
    ("told", "got"),
    [
        (lambda lower, upper: True, "bool"),
        (lambda lower, upper: (upper > 0).long(), r"torch.int64 \(1, 3\)"),
        (lambda lower, upper: (upper > 0).to(torch.uint8), r"torch.uint8 \(1, 3\)"),
        (lambda lower, upper: (upper > 0).double(), r"torch.float64 \(1, 3\)"),
        (lambda lower, upper: upper[:, :1] > 0, r"torch.bool \(1, 1\)"),
    ],
)
def test_what_can_vary_must_be_told_of_every_entry_by_a_bool(told, got):
    """Other numbers would be read as places of rows."""
    rule(Odd)(lambda layer, place: Elementwise(layer, told, rounding=0.0))
    with pytest.raises(TypeError, match=rf"must tell what can vary by a bool tensor \(1, 3\), got {got}"):
        certify_with_odd()
    with pytest.raises(TypeError, match="must tell what can vary by a bool tensor"):
        check_rule(Odd(), (3,))


@pytest.mark.parametrize("rounding", [-5.0, math.nan, math.inf, "much"])
def test_rounding_that_makes_boxes_smaller_is_refused(rounding):
    rule(Odd)(lambda layer, place: Elementwise(layer, lambda lower, upper: upper > 0, rounding=rounding))
    for ask in (certify_with_odd, lambda: check_rule(Odd(), (3,))):
        with pytest.raises(TypeError, match="must give a finite rounding of 0 or more"):
            ask()


@pytest.mark.parametrize(
    "constant", [-1.0, math.nan, torch.tensor(-1.0), torch.tensor(math.nan), torch.ones(2)], ids=str
)
def test_a_constant_that_makes_balls_smaller_is_refused(constant):
    class Steep(Activation):
        lipschitz, rounding = constant, 0.0

        def __call__(self, x):
            return x.relu()

        def varying(self, lower, upper):
            return upper > 0

    rule(Odd)(lambda layer, place: Steep())
    for ask in (certify_with_odd, lambda: check_rule(Odd(), (3,))):
        with pytest.raises(TypeError, match="must give a finite lipschitz of 0 or more"):
            ask()


@pytest.mark.parametrize(
    "reorders", [lambda x: x.flip(1), lambda x: 2 * x, lambda x: x[:, :1].expand_as(x), lambda x: x[:, :2]]
)
def test_a_reshape_that_does_more_than_rename_is_refused(reorders):
    """Masks are renamed along with it, and would stand at other entries."""

    class Reordered(nn.Module):
        def forward(self, x):
            return reorders(x)

    rule(Reordered)(lambda layer, place: Reshape(reorders))
    net = nn.Sequential(nn.Linear(3, 3), Reordered(), nn.ReLU(), nn.LazyLinear(2))
    net(torch.rand(1, 3))
    with pytest.raises(TypeError, match="Reordered at position 1: its rule calls it a Reshape"):
        certify(net.eval(), torch.rand(1, 3), torch.tensor([0]), 0.1)


def test_a_reshape_and_an_operator_are_something():
    rule(Odd)(lambda layer, place: Reshape(lambda x: x))
    with pytest.raises(AssertionError, match="something else than the layer"):
        check_rule(Odd(), (3,))


class Diagonal(LinearOperator):
    """A vector of factors, which says nothing of its sums."""

    def __init__(self, weight):
        self.weight, self.bias, self.position = weight, None, 0
        self.input_shape = self.output_shape = weight.shape

    def apply(self, x):
        return x * self.weight

    adjoint = affine = apply

    def absolute(self, x):
        return x * self.weight.abs()

    def weight_gradient(self, x, y):
        return (x * y).sum(dim=0)

    def row_norms(self):
        return self.weight.abs()


def test_an_operator_whose_weight_does_not_tell_its_sums_is_asked_for_them():
    with pytest.raises(TypeError, match=r"Diagonal has a weight \(4,\): give it `terms` of its own"):
        check_operator(Diagonal(torch.rand(4).double()))

    class Told(Diagonal):
        terms = (1, 1)

    check_operator(Told(torch.rand(4).double()))


def test_a_slope_that_is_no_number_is_refused():
    net = nn.Sequential(nn.Linear(3, 3), nn.LeakyReLU(math.nan), nn.Linear(3, 2)).eval()
    with pytest.raises(TypeError, match="LeakyReLU at position 1: its negative_slope is NaN"):
        certify(net, torch.rand(1, 3), torch.tensor([0]), 0.1)
