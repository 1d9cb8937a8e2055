"""Somebody's own network, and what the public functions say about it."""

import functools
import inspect
import math

import pytest
import torch
from oracles import (
    CLASSES,
    IMAGES,
    MAPS,
    ExactNorms,
    clipped_relu,
    images,
    norm_of,
    outputs_of,
    own_network,
    points_in_the_ball,
    settled,
    walk,
)
from torch import nn

from local_bound import Normalize, PowerIteration, certified_radius, certify, local_lipschitz

TOLERANCE = 1e-3
EXACT = ExactNorms()


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return own_network()


@pytest.fixture
def x():
    return images(*MAPS)


@pytest.fixture
def y(model, x):
    """The network's own answers."""
    return model(x).argmax(dim=1)


@pytest.fixture(params=[0.02, 0.2, 2.0])
def epsilon(request):
    return request.param


def test_no_two_points_of_the_ball_have_a_steeper_slope_than_the_local_bound(model, x, epsilon):
    points = points_in_the_ball(model, x, epsilon)
    rise = outputs_of(model, points, len(model)).diff(dim=0).norm(dim=2)
    run = points.diff(dim=0).flatten(2).norm(dim=2)
    assert (rise <= local_lipschitz(model, x, epsilon).lipschitz * run * (1 + 1e-6) + 1e-9).all()


def test_local_bounds_grow_with_the_ball_and_stay_below_the_global_one(model, x):
    small, large = (local_lipschitz(model, x, epsilon) for epsilon in (0.01, 0.5))
    assert (small.lipschitz < large.lipschitz).all()
    assert (large.lipschitz <= large.global_lipschitz * (1 + 1e-6)).all()
    torch.testing.assert_close(small.global_lipschitz, large.global_lipschitz)


def test_bounds_are_the_products_of_the_norms(model, x, epsilon):
    bounds = local_lipschitz(model, x, epsilon)
    assert bounds.lipschitz.shape == (IMAGES,)
    torch.testing.assert_close(torch.stack(list(bounds.local_norms.values())).prod(dim=0), bounds.lipschitz)
    torch.testing.assert_close(torch.stack(list(bounds.global_norms.values())).prod(), bounds.global_lipschitz)


def test_the_last_layer_counts_with_the_columns_that_can_vary():
    model, x = settled(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, CLASSES)), images(12)
    columns = walk(model, x, 0.05).last_columns
    assert not columns.all()
    true = norm_of(model[2].weight * columns[:, None, :])
    torch.testing.assert_close(local_lipschitz(model, x, 0.05).local_norms[2], true.detach(), rtol=1e-4, atol=0)


def test_a_linear_network_has_its_matrix_norm_everywhere():
    model = settled(nn.Linear(12, CLASSES))
    bounds = local_lipschitz(model, images(12), 0.3)
    true = norm_of(model[0].weight.detach())
    torch.testing.assert_close(bounds.global_lipschitz, true)
    torch.testing.assert_close(bounds.lipschitz, true.expand(IMAGES))


def test_a_certified_label_does_not_change_in_the_ball(model, x, y):
    radius = certified_radius(model, x, certificate=EXACT)
    assert (radius > 0).all()
    for image in range(IMAGES):
        own = slice(image, image + 1)
        points = points_in_the_ball(model, x[own], radius[image].item())
        assert (outputs_of(model, points, len(model)).argmax(dim=2) == y[image]).all()


@pytest.mark.parametrize("epsilon", [0, 0.1])
def test_a_tie_is_not_certified(epsilon):
    model, x = settled(nn.Linear(12, CLASSES)), images(12)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    assert not certify(model, x, torch.arange(IMAGES), epsilon).any()
    assert (certified_radius(model, x) == 0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_an_image_that_is_not_finite_is_not_certified_and_leaves_the_others_alone(model, x, y, value):
    before = certified_radius(model, x, y, certificate=EXACT)
    x[1, 0, 2, 3] = value
    assert certify(model, x, y, 0, EXACT).tolist() == [True, False, True, True]
    radius = certified_radius(model, x, y, certificate=EXACT)
    assert radius[1] == 0
    torch.testing.assert_close(radius[[0, 2, 3]], before[[0, 2, 3]], rtol=0, atol=TOLERANCE)


def test_a_pixel_that_the_network_does_not_see_must_be_finite_too():
    model, x = settled(nn.Linear(12, 8), clipped_relu(8), nn.Linear(8, CLASSES)), images(12)
    y = model(x).argmax(dim=1)
    x[0] = torch.inf  # behind the clipped ReLU it is as good as large
    nn.init.uniform_(model[0].weight, 0.1, 1)
    assert model(x)[0].isfinite().all()
    assert not certify(model, x, y, 0)[0]


def test_every_image_can_have_its_own_epsilon(model, x, y):
    radius = certified_radius(model, x, y, certificate=EXACT)
    factors = torch.tensor([0.5, 1.5, 0.9, 1.1], dtype=torch.float64)
    assert certify(model, x, y, factors * radius, EXACT).tolist() == [True, False, True, False]


@pytest.mark.parametrize("tolerance", [1e-1, TOLERANCE, 1e-6])
def test_the_radius_is_certified_and_the_next_larger_one_is_not(model, x, y, tolerance):
    radius = certified_radius(model, x, y, tolerance, EXACT)
    assert certify(model, x, y, radius, EXACT).all()
    assert not certify(model, x, y, radius + 2 * tolerance, EXACT).any()


def test_the_radius_of_a_misclassified_image_is_zero(model, x, y):
    wrong = y.clone()
    wrong[::2] = (y[::2] + 1) % CLASSES
    assert (certified_radius(model, x, wrong, certificate=EXACT) > 0).tolist() == [False, True, False, True]


def test_without_labels_the_answer_of_the_network_counts(model, x, y):
    own, given = (certified_radius(model, x, label, certificate=EXACT) for label in (None, y))
    assert torch.equal(own, given)


def distance_to_the_plane(model, x):
    """How far x is from where a two-class network that is linear in x changes its answer."""
    x = x.clone().requires_grad_()
    logits = model(x)
    difference = logits[:, 0] - logits[:, 1]
    (slope,) = torch.autograd.grad(difference.sum(), x)
    return (difference.abs() / slope.flatten(1).norm(dim=1)).detach()


@pytest.mark.parametrize("std", [1.0, 0.2, 5.0])
def test_radii_are_distances_between_pixels_before_they_are_normalized(x, std):
    model = settled(Normalize([0.3, 0.6], [std, std]), nn.Flatten(), nn.Linear(72, 2))
    distance, radius = distance_to_the_plane(model, x), certified_radius(model, x, certificate=EXACT)
    assert (radius > 0).all()
    assert (radius <= distance * (1 + 1e-9)).all()
    assert (radius >= distance - TOLERANCE).all()


def test_unequal_deviations_of_the_channels_keep_the_radius_below_the_distance(x):
    model = settled(Normalize([0.3, 0.6], [0.2, 0.9]), nn.Flatten(), nn.Linear(72, 2))
    distance, radius = distance_to_the_plane(model, x), certified_radius(model, x, certificate=EXACT)
    assert (radius > 0).all()
    assert (radius < distance).all()


def test_the_radius_of_a_linear_network_is_the_distance_to_the_nearest_plane():
    model, x = settled(nn.Linear(12, CLASSES)), images(12)
    logits, weight = model(x).detach(), model[0].weight.detach()
    y = logits.argmax(dim=1)
    slopes = (weight[y][:, None] - weight).norm(dim=2)
    distances = ((logits.gather(1, y[:, None]) - logits) / slopes).scatter(1, y[:, None], torch.inf)
    radius = certified_radius(model, x, tolerance=1e-6)
    torch.testing.assert_close(radius, distances.amin(dim=1), rtol=0, atol=2e-6)


class Impatient(PowerIteration):
    """Gives up where an endless loop would go on asking."""

    questions = 0

    def whole(self, operator):
        self.questions += 1
        assert self.questions < 1000, "the search for the radius does not end"
        return super().whole(operator)


@pytest.mark.parametrize("weight", [0.0, 1e-6], ids=["constant", "almost constant"])
def test_the_search_ends_where_the_radius_is_beyond_all_bounds(weight):
    # A radius of 1e6 has no neighbour within the tolerance in single precision.
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    for layer in (model[0], model[2]):
        nn.init.constant_(layer.weight, weight)
    nn.init.constant_(model[0].bias, 1)
    model[2].bias.data = torch.tensor([1.0, 0.0, 0.0])
    model[2].weight.data[0] = 2 * weight
    radius = certified_radius(model, torch.rand(2, 6), certificate=Impatient(2), limit=1e9)
    assert (radius > 1e5).all()


@pytest.mark.parametrize("certificate", ["proven", Impatient(2)], ids=["proven", "estimate"])
@pytest.mark.parametrize("limit", [{}, {"limit": 7.5}, {"limit": TOLERANCE / 3}], ids=str)
def test_where_clipping_keeps_the_answer_whatever_the_image_the_radius_is_the_limit(certificate, limit):
    model = nn.Sequential(nn.Linear(6, 4), clipped_relu(4), nn.Linear(4, 3))
    model[2].bias.data = torch.tensor([10.0, 0.0, 0.0])
    radius = certified_radius(model, torch.rand(2, 6), certificate=certificate, **limit)
    assert radius.tolist() == pytest.approx([limit.get("limit", 1e3)] * 2)


@pytest.mark.parametrize("bad", [{"tolerance": 0.0}, {"tolerance": -1.0}, {"limit": 0.0}, {"limit": math.inf}], ids=str)
def test_a_tolerance_or_limit_without_sense_is_refused(bad):
    with pytest.raises(ValueError, match="above 0"):
        certified_radius(nn.Sequential(nn.Linear(6, 3)), torch.rand(2, 6), **bad)


@pytest.mark.parametrize("ask", [certify, certified_radius, local_lipschitz])
def test_a_certificate_of_another_name_is_refused(ask):
    arguments = {"epsilon": 0.1, "y": torch.zeros(2, dtype=torch.long), "certificate": "guessed"}
    known = {name: value for name, value in arguments.items() if name in inspect.signature(ask).parameters}
    with pytest.raises(ValueError, match="guessed"):
        ask(nn.Sequential(nn.Linear(6, 3)), torch.rand(2, 6), **known)


@pytest.mark.parametrize("certificate", ["proven", "estimate"])
@pytest.mark.parametrize("y", [torch.zeros(3, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(2)])
@pytest.mark.parametrize(
    "ask", [functools.partial(certify, epsilon=0.1), certified_radius], ids=["certify", "certified_radius"]
)
def test_there_must_be_one_label_for_every_image(ask, y, certificate):
    with pytest.raises((TypeError, ValueError), match="one label per image"):
        ask(nn.Sequential(nn.Linear(6, 3)), torch.rand(2, 6), y, certificate=certificate)
