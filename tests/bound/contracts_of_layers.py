"""What holds of every activation and every rule: a new one subclasses, says what it is in `create`, and is tested."""

import copy
import functools
from typing import NamedTuple

import pytest
import torch
from oracles import (
    CLASSES,
    IMAGES,
    MAPS,
    assert_ball_and_box_hold,
    dense_matrix,
    images,
    masked,
    norm_of,
    outputs_of,
    points_in_the_ball,
    settled,
    walk,
)
from torch import nn

from local_bound import Activation, Arithmetic, Bound, Graph, LinearOperator, check_rule
from locallip.bound.region import CenteredRegion, Point, Region, UncutRegion

SAMPLES = 64


class ActivationContract:
    """A subclass sets `shape`, of one image, if it needs another, and has a `create` that makes the activation.

    Attributes:
        rests: whether some of its outputs cannot vary in a narrow box.
        monotone: whether no output falls where an input rises.
        below: how far below 0 the middle of the boxes lies.
    """

    shape = (4, 3, 5)
    rests = True
    monotone = True
    below = 0.0

    def create(self):
        raise NotImplementedError

    @pytest.fixture
    def activation(self, _seed):
        return self.create()

    @pytest.fixture(params=["ends", "stack and half-width", "uncut", "uncut, fused"])
    def region(self, request, _seed):
        """A box that is narrow enough for many outputs to be constant, in each of its forms; and whether to fuse."""
        center, half = 2 * images(*self.shape) - 1 - self.below, 0.4 * images(*self.shape)
        half[:, 0] = 0
        stack = torch.cat([center, center + half * (2 * images(*self.shape) - 1)])
        reach = 0.3 * images(self.shape[0], *[1] * (len(self.shape) - 1))
        return {
            "ends": (Region(center, center - half, center + half), False),
            "stack and half-width": (CenteredRegion(stack, half), True),
            "uncut": (UncutRegion(stack, half, reach), False),
            "uncut, fused": (UncutRegion(stack, half, reach), True),
        }[request.param]

    @staticmethod
    def samples_of(region):
        """(S, N, ...) in the box: anywhere, and at corners."""
        share = torch.rand(SAMPLES, *region.lower.shape, dtype=torch.float64)
        share[::2] = share[::2].round()
        return region.lower + share * (region.upper - region.lower)

    def outputs_of(self, activation, samples):
        return activation(samples.flatten(0, 1)).unflatten(0, samples.shape[:2])

    def test_what_cannot_vary_is_constant_in_the_box(self, activation, region):
        region, fuse = region
        _, varying = activation.behind(region, fuse)
        assert varying.double().mean() > 0
        assert varying.all() != self.rests
        assert torch.equal(varying, activation.varying(region.lower, region.upper))
        outputs = self.outputs_of(activation, self.samples_of(region))
        assert (outputs == outputs[0])[:, ~varying].all()

    def test_what_is_seen_to_change_can_vary(self, activation, region):
        outputs = self.outputs_of(activation, self.samples_of(region[0]))
        changes = (outputs != outputs[0]).any(dim=0)
        assert changes.any()
        assert activation.varying(region[0].lower, region[0].upper)[changes].all()

    def test_where_nothing_is_known_everything_can_vary(self, activation):
        nan = torch.full((2, *self.shape), torch.nan)
        assert activation.varying(nan, nan).all()

    def test_the_box_behind_holds_what_the_box_before_becomes(self, activation, region):
        region, fuse = region
        behind, _ = activation.behind(region, fuse)
        outputs = self.outputs_of(activation, self.samples_of(region))
        assert (outputs >= behind.lower - 1e-12).all()
        assert (outputs <= behind.upper + 1e-12).all()
        torch.testing.assert_close(behind.center, activation(region.center))

    def test_a_ball_without_a_box_keeps_its_radius_and_says_nothing_of_what_varies(self, activation):
        point = Point(images(*self.shape), torch.arange(IMAGES))
        behind, varying = activation.behind(point, True)
        assert varying is None
        assert torch.equal(behind.radius, point.radius)
        assert torch.equal(behind.center, activation(point.center))

    def test_it_is_monotone_or_known_not_to_be(self, activation, region):
        samples = self.samples_of(region[0])
        more = samples + torch.rand_like(samples)
        assert (self.outputs_of(activation, samples) <= self.outputs_of(activation, more)).all() == self.monotone

    def test_between_points_of_a_box_it_is_no_steeper_than_it_says(self, activation, region):
        region, _ = region
        points = self.samples_of(region)
        steepness = torch.as_tensor(activation.steepness(region), dtype=torch.float64).detach()
        assert (steepness <= activation.lipschitz * (1 + 1e-12)).all()
        for there in (points.roll(1, 0), region.lower + 0.999 * (points - region.lower)):
            rise = (self.outputs_of(activation, there) - self.outputs_of(activation, points)).flatten(2).norm(dim=2)
            assert (rise <= steepness * (there - points).flatten(2).norm(dim=2) * (1 + 1e-9) + 1e-12).all()

    def test_in_a_ball_without_a_box_its_constant_is_that_everywhere(self, activation):
        point = Point(images(*self.shape), torch.arange(IMAGES))
        assert activation.steepness(point) == activation.lipschitz

    @pytest.mark.parametrize("length", [1e-6, 0.1, 10.0])
    def test_no_ball_grows_by_more_than_its_constant(self, activation, length):
        x = torch.randn(SAMPLES, *self.shape, dtype=torch.float64)
        step = length * torch.randn_like(x)
        rise = (activation(x + step) - activation(x)).flatten(1).norm(dim=1)
        assert (rise <= activation.lipschitz * step.flatten(1).norm(dim=1) * (1 + 1e-9)).all()

    def test_its_gradient_is_that_of_finite_differences(self, activation):
        x = torch.randn(2, *self.shape, dtype=torch.float64, requires_grad=True)
        learnt = [t for t in vars(activation).values() if isinstance(t, torch.Tensor)]
        assert all(t.requires_grad for t in learnt)
        assert torch.autograd.gradcheck(lambda x, *learnt: activation(x), (x, *learnt))

    def test_it_says_the_shape_behind_it_and_leaves_its_input_as_it_is(self, activation):
        x = torch.randn(3, *self.shape, dtype=torch.float64)
        before = x.clone()
        assert activation(x).shape[1:] == activation.shape_behind(torch.Size(self.shape))
        assert torch.equal(x, before)


class ClippingContract(ActivationContract):
    """Of those that only compare and choose, and that the dual knows."""

    def test_it_rounds_nothing_as_all_it_gives_was_there_before(self, activation):
        x = torch.randn(3, *self.shape, dtype=torch.float64)
        low, high = (torch.as_tensor(end, dtype=torch.float64) for end in (activation.low, activation.high))
        assert activation.rounding == 0
        assert torch.isin(activation(x), torch.cat([end.flatten() for end in (x, low, high)])).all()

    def test_the_dual_works_with_the_same_function(self, activation, region):
        region, _ = region
        dual = activation.in_dual()
        assert torch.equal(dual(region.center), activation(region.center))
        assert torch.equal(dual.constant(region.lower, region.upper), ~activation.varying(region.lower, region.upper))


# --- rules -----------------------------------------------------------------------------------------------------------


class Case(NamedTuple):
    """A network with the layers of a rule at `position`; the bound around images, and points in their balls."""

    model: nn.Sequential
    layers: nn.Sequential
    x: torch.Tensor
    bound: Bound
    points: torch.Tensor
    position: int

    @property
    def meaning(self):
        return dict(Graph.of(self.model).meanings(self.x, Arithmetic()))[self.position]


# What makes activations of the same shape of them, by the number of its dimensions.
_BEFORE = {
    1: lambda inputs: nn.Linear(inputs, inputs),
    2: lambda inputs: nn.Conv1d(inputs, inputs, 3, padding=1),
    3: lambda inputs: nn.Conv2d(inputs, inputs, 3, padding=1),
    4: lambda inputs: nn.Conv3d(inputs, inputs, 3, padding=1),
}


def make_case(contract, behind_an_activation):
    torch.manual_seed(0)
    shape, layers = contract.shape, settled(*contract.create())
    before = [_BEFORE[len(shape)](shape[0]), nn.ReLU()] if behind_an_activation else []
    features = layers(torch.zeros(1, *shape, dtype=torch.float64)).numel()
    model = settled(*before, *layers, nn.ReLU(), nn.Flatten(), nn.Linear(features, CLASSES))
    x = 2 * images(*shape) - 1  # so that activations right in front have something to cut off
    with torch.no_grad():
        bound = walk(model, x, 0.2)
    return Case(model, layers, x, bound, points_in_the_ball(model, x, 0.2), len(before))


_known_case = functools.cache(lambda kind, behind_an_activation: make_case(kind(), behind_an_activation))


class RuleContract:
    """A subclass has a `create` that makes the layers of one rule, in a list: more than one where they are folded.

    Attributes:
        shape: of one image's activations before them.
        training_matters: whether they compute otherwise in training mode.
    """

    shape = MAPS
    training_matters = False

    def create(self):
        raise NotImplementedError

    @pytest.fixture(params=[False, True], ids=["first", "behind a ReLU"])
    def behind_an_activation(self, request):
        return request.param

    @pytest.fixture
    def case(self, behind_an_activation):
        return _known_case(type(self), behind_an_activation)

    def test_layer_and_meaning_compute_the_same(self, case):
        meaning, x = case.meaning, torch.randn(IMAGES, *self.shape, dtype=torch.float64)
        if isinstance(meaning, LinearOperator):
            computed = meaning.affine(x)
        else:
            computed = meaning(x) if isinstance(meaning, Activation) else meaning.function(x)
        torch.testing.assert_close(computed, case.layers(x))

    def test_the_center_is_what_the_network_computes(self, case):
        torch.testing.assert_close(case.bound.center, case.model[:-1](case.x))
        torch.testing.assert_close(case.bound.logits, case.model(case.x))

    def test_no_point_of_the_ball_leaves_the_box_or_the_ball_behind_the_layer(self, case):
        assert_ball_and_box_hold(case.bound, outputs_of(case.model, case.points, -1))

    def test_checks_find_nothing_wrong(self):
        layers = settled(*self.create())
        if len(layers) > 1:
            pytest.skip("checks are of single layers")
        check_rule(layers[0], self.shape)

    def test_training_mode_is_refused_where_it_matters(self, case):
        case = copy.deepcopy(case)
        case.layers.train()
        if self.training_matters:
            with pytest.raises(ValueError, match=r"at position \d.*training mode"):
                walk(case.model, case.x, 0.2)
        else:
            assert torch.equal(walk(case.model, case.x, 0.2).upper, case.bound.upper)


class ActivationRuleContract(RuleContract):
    """Of rules that give an activation.

    Attributes:
        rests: whether some of its outputs cannot vary in a narrow box.
    """

    rests = True

    def test_what_cannot_vary_stays_as_it_is(self, case):
        varying = case.bound.varying[case.position]
        assert varying.any()
        assert not (self.rests and varying.all())
        outputs = outputs_of(case.model, case.points, case.position + 1)
        assert (outputs == outputs[0])[:, ~varying].all()


class LinearRuleContract(RuleContract):
    """Of rules that give a linear operator."""

    @pytest.fixture
    def matrix(self, case):
        with torch.no_grad():
            return dense_matrix(case.layers, torch.Size(self.shape))

    def test_the_operator_knows_its_shapes_and_its_transpose(self, case, matrix):
        operator = case.meaning
        assert operator.input_shape == self.shape
        assert operator.output_shape == case.layers(case.x).shape[1:]
        y = torch.randn(IMAGES, *operator.output_shape, dtype=torch.float64)
        torch.testing.assert_close(operator.adjoint(y).flatten(1), y.flatten(1) @ matrix)

    def test_the_global_norm_is_that_of_the_dense_matrix(self, case, matrix):
        torch.testing.assert_close(case.bound.global_norms[case.position], norm_of(matrix), rtol=1e-3, atol=0)

    def test_the_local_norms_are_those_of_the_masked_dense_matrix(self, case, matrix, behind_an_activation):
        rows, columns = case.bound.masks[case.position]
        assert (columns is not None) == behind_an_activation
        true = norm_of(masked(matrix, rows, columns))
        torch.testing.assert_close(case.bound.local_norms[case.position], true, rtol=1e-3, atol=0)
