"""Somebody's own network: layers beyond the paper's against their dense matrices, and what the public functions say."""

import functools
import inspect
import math
import re
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from test_local_bound import BATCH_NORMS, clipped_relu, dense_matrix, outputs_of, points_in_the_ball
from torch import nn

import local_bound
from local_bound import Bound, certified_radius, certify, local_lipschitz, propagate, rule
from locallip.bound.layers import Normalize
from locallip.bound.power_iteration import PowerIteration

IMAGES, CLASSES = 4, 5
MAPS, ENTRIES = (2, 6, 6), (12,)
TOLERANCE = 1e-3


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def images(*shape):
    return torch.rand(IMAGES, *shape, dtype=torch.float64)


def settled(*layers):
    """A network in eval mode whose batch normalisations have seen something."""
    model = nn.Sequential(*layers).double().eval()
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, -2, 2)
                nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model


def walk(model, x, epsilon):
    """The bound with norms that have converged."""
    with torch.no_grad():
        return propagate(model, x, epsilon, PowerIteration(1000))


def norm_of(matrix):
    return torch.linalg.matrix_norm(matrix, ord=2)


class ExactNorms(PowerIteration):
    """Norms from singular values, so that certificates are true and the same question has the same answer."""

    def whole(self, operator):
        return norm_of(dense_matrix(operator.apply, operator.input_shape))

    def masked(self, operator, in_mask, out_mask):
        matrix = dense_matrix(operator.apply, operator.input_shape)
        if in_mask is not None:
            matrix = matrix * in_mask.flatten(1)[:, None, :]
        return norm_of(matrix if out_mask is None else matrix * out_mask.flatten(1)[:, :, None])


EXACT = ExactNorms(1)


# --- every layer is the matrix that it is ----------------------------------------------------------------------------

# Name: shape before it, and what makes up one linear map.
LAYERS = {
    "pooling": (MAPS, lambda: [nn.AvgPool2d(2)]),
    "pooling with stride": (MAPS, lambda: [nn.AvgPool2d(3, stride=2)]),
    "pooling with padding": (MAPS, lambda: [nn.AvgPool2d(3, stride=2, padding=1)]),
    "rectangular pooling": (MAPS, lambda: [nn.AvgPool2d((2, 4), stride=(1, 3), padding=(0, 2))]),
    "pooling that counts no padding where there is none": (MAPS, lambda: [nn.AvgPool2d(2, count_include_pad=False)]),
    "convolution in groups": (MAPS, lambda: [nn.Conv2d(2, 4, 3, groups=2)]),
    "convolution with dilation": (MAPS, lambda: [nn.Conv2d(2, 3, 2, stride=2, dilation=(2, 3))]),
    "convolution to the same size": (MAPS, lambda: [nn.Conv2d(2, 2, (3, 5), padding="same", dilation=(2, 1))]),
    "batch norm 1d": (ENTRIES, lambda: [nn.BatchNorm1d(12)]),
    "batch norm 1d without weights": (ENTRIES, lambda: [nn.BatchNorm1d(12, affine=False)]),
    "batch norm 2d": (MAPS, lambda: [nn.BatchNorm2d(2)]),
    "batch norm 2d without weights": (MAPS, lambda: [nn.BatchNorm2d(2, affine=False)]),
    "dense with batch norm": (ENTRIES, lambda: [nn.Linear(12, 9), nn.BatchNorm1d(9)]),
    "dense with batch norm, no bias": (ENTRIES, lambda: [nn.Linear(12, 9, bias=False), nn.BatchNorm1d(9)]),
    "convolution with batch norm": (MAPS, lambda: [nn.Conv2d(2, 4, 3, groups=2), nn.BatchNorm2d(4)]),
    "convolution with batch norm without weights": (
        MAPS,
        lambda: [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4, affine=False)],
    ),
    "normalize": (MAPS, lambda: [Normalize([0.3, 0.6], [0.5, 0.2])]),
    "normalize with one number for all": (MAPS, lambda: [Normalize([0.3], [0.5])]),
}


class Case(NamedTuple):
    """A network in which one linear map stands at `position`; the bound around images, and points in their balls."""

    model: nn.Sequential
    x: torch.Tensor
    bound: Bound
    points: torch.Tensor
    position: int
    matrix: torch.Tensor


@functools.cache
def make_case(name, behind_an_activation):
    torch.manual_seed(0)
    shape, layers = LAYERS[name]
    before = [nn.Conv2d(2, 2, 3, padding=1) if shape == MAPS else nn.Linear(12, 12), nn.ReLU()]
    before, layers = before if behind_an_activation else [], layers()
    features = nn.Sequential(*layers).eval().float()(torch.zeros(1, *shape)).numel()
    model = settled(*before, *layers, nn.ReLU(), nn.Flatten(), nn.Linear(features, CLASSES))
    position, x = len(before), images(*shape)
    with torch.no_grad():
        matrix = dense_matrix(model[position : position + len(layers)], torch.Size(shape))
    return Case(model, x, walk(model, x, 0.2), points_in_the_ball(model, x, 0.2), position, matrix)


@pytest.fixture(params=[False, True], ids=["first", "behind a ReLU"])
def behind_an_activation(request):
    return request.param


@pytest.fixture(params=LAYERS)
def case(request, behind_an_activation):
    return make_case(request.param, behind_an_activation)


def test_the_center_is_what_the_network_computes(case):
    torch.testing.assert_close(case.bound.center, case.model[:-1](case.x))
    torch.testing.assert_close(case.bound.logits, case.model(case.x))


def test_no_point_of_the_ball_leaves_the_box_or_the_ball_behind_the_layer(case):
    hidden = outputs_of(case.model, case.points, -1)
    assert (hidden <= case.bound.upper + 1e-9).all()
    assert (hidden >= case.bound.lower - 1e-9).all()
    assert ((hidden - case.bound.center).norm(dim=2) <= case.bound.radius * (1 + 1e-6) + 1e-9).all()


def test_the_global_norm_is_that_of_the_dense_matrix(case):
    torch.testing.assert_close(case.bound.global_norms[case.position], norm_of(case.matrix), rtol=1e-3, atol=0)


def test_the_local_norms_are_those_of_the_masked_dense_matrix(case, behind_an_activation):
    columns, rows = case.bound.masks[case.position]
    assert (columns is not None) == behind_an_activation
    left = case.matrix * rows.flatten(1)[:, :, None]
    left = left if columns is None else left * columns.flatten(1)[:, None, :]
    torch.testing.assert_close(case.bound.local_norms[case.position], norm_of(left), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("linear", "normalization", "shape"),
    [(nn.Linear(12, 9), nn.BatchNorm1d(9), ENTRIES), (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), MAPS)],
    ids=["dense", "convolution"],
)
def test_batch_norm_is_folded_into_the_linear_layer_before_it(linear, normalization, shape):
    # Folded, the norm is below the product of two: what one amplifies most, the other need not.
    folded = settled(linear, normalization, nn.Flatten(), nn.LazyLinear(CLASSES))
    folded(images(*shape))
    apart = nn.Sequential(linear, nn.ReLU(), normalization, *folded[2:])
    one, two = (walk(model, images(*shape), 0.1).global_norms for model in (folded, apart))
    assert list(one) == [0]
    assert list(two) == [0, 2]
    assert one[0] < 0.95 * two[0] * two[2]


def test_batch_norm_at_the_start_of_a_nest_is_folded_too():
    flat = settled(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, CLASSES))
    nested = nn.Sequential(flat[0], flat[1:3], *flat[3:])
    one, two = (walk(model, images(*MAPS), 0.1).global_lipschitz for model in (flat, nested))
    torch.testing.assert_close(two, one)


@pytest.mark.parametrize("layer", [nn.Identity(), nn.Dropout(0.9), nn.Dropout1d(0.9), nn.Dropout2d(0.9)])
def test_layers_that_do_nothing_change_nothing(layer, behind_an_activation):
    before = [nn.Linear(12, 8), nn.ReLU()] if behind_an_activation else []
    behind, x = nn.Linear(8 if before else 12, CLASSES), images(12)
    with_it, without = (walk(settled(*before, *middle, behind), x, 0.2) for middle in ([layer], []))
    for name in ("logits", "lower", "upper", "radius"):
        torch.testing.assert_close(getattr(with_it, name), getattr(without, name))
    assert list(with_it.local_norms) == list(without.local_norms)


def test_positions_in_a_nest_are_strings():
    block = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.AvgPool2d(2)))
    model = settled(Normalize([0.5], [0.5]), block, nn.Flatten(), nn.Linear(8, CLASSES))
    bounds = local_lipschitz(model, images(*MAPS), 0.1)
    assert list(bounds.global_norms) == list(bounds.local_norms) == [0, "1.0", "1.3.0", 3]


# --- what the public functions say -----------------------------------------------------------------------------------


def own_network():
    """Every kind of layer in one network."""
    model = settled(
        Normalize([0.3, 0.6], [0.5, 0.25]),
        nn.Sequential(nn.Conv2d(2, 4, 3, padding="same", groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Dropout(), nn.Conv2d(4, 6, 2, dilation=2), nn.ReLU(), nn.BatchNorm2d(6), nn.Identity()),
        *(nn.Flatten(), nn.Linear(6, 8), clipped_relu(8), nn.BatchNorm1d(8, affine=False)),
        nn.Linear(8, CLASSES),
    )
    nn.init.normal_(model[-1].weight)  # so much that what the clipping leaves can change every answer
    return model


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
    assert (rise <= local_lipschitz(model, x, epsilon).local * run * (1 + 1e-6) + 1e-9).all()


def test_local_bounds_grow_with_the_ball_and_stay_below_the_global_one(model, x):
    small, large = (local_lipschitz(model, x, epsilon) for epsilon in (0.01, 0.5))
    assert (small.local < large.local).all()
    assert (large.local <= large.everywhere * (1 + 1e-6)).all()
    torch.testing.assert_close(small.everywhere, large.everywhere)


def test_bounds_are_the_products_of_the_norms(model, x, epsilon):
    bounds = local_lipschitz(model, x, epsilon)
    assert bounds.lipschitz.shape == (IMAGES,)
    torch.testing.assert_close(torch.stack(list(bounds.local_norms.values())).prod(dim=0), bounds.lipschitz)
    torch.testing.assert_close(torch.stack(list(bounds.global_norms.values())).prod(), bounds.global_hidden_lipschitz)


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
    torch.testing.assert_close(bounds.global_hidden_lipschitz, true)
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
    with pytest.raises(ValueError, match="one label per image"):
        ask(nn.Sequential(nn.Linear(6, 3)), torch.rand(2, 6), y, certificate=certificate)


# --- what is refused -------------------------------------------------------------------------------------------------

PUBLIC = {
    "hidden_lipschitz": lambda model, x: local_lipschitz(model, x, 0.1),
    "certify": lambda model, x: certify(model, x, torch.zeros(IMAGES, dtype=torch.long), 0.1),
    "certified_radius": certified_radius,
    "certified_radius, estimated": functools.partial(certified_radius, certificate="estimate"),
}


@pytest.fixture(params=PUBLIC)
def ask(request):
    """Each of the public functions, as a question about a network and images."""
    return PUBLIC[request.param]


def network_with(layer):
    """A layer between 12 entries and 12 entries."""
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), layer, nn.Linear(12, CLASSES)).double()


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(12), nn.Dropout(), nn.Dropout1d(), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(12))],
    ids=["BatchNorm1d", "Dropout", "Dropout1d", "in a nest"],
)
def test_training_mode_is_refused_and_nothing_is_learnt_from_the_images(ask, layer):
    model = network_with(layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"position 2.*training mode"):
        ask(model, images(12))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batch_norm_in_training_mode_behind_a_linear_layer_is_refused(ask):
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)).double()
    with pytest.raises(ValueError, match="training mode"):
        ask(model, images(12))


SUPPORTED = {nn.Conv2d, nn.Linear, nn.ReLU, nn.AvgPool2d, nn.BatchNorm1d, nn.BatchNorm2d, nn.Flatten, nn.Identity}
SUPPORTED |= {nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Sequential}
OTHERS = [
    kind
    for _, kind in sorted(inspect.getmembers(nn, inspect.isclass))
    if issubclass(kind, nn.Module) and kind not in SUPPORTED
]


def blank(kind):
    """An instance without its constructor's arguments; only its type is looked at."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_every_other_layer_of_pytorch_is_refused_by_its_name(kind):
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), blank(kind), nn.Linear(12, CLASSES))
    with pytest.raises(TypeError, match=rf"\b{kind.__name__} at position 2"):
        walk(model, torch.rand(IMAGES, 12), 0.1)


@pytest.mark.parametrize("layer", [nn.Sigmoid(), nn.LayerNorm(12), nn.Sequential(nn.Tanh())])
def test_an_unknown_layer_is_refused_by_every_function(ask, layer):
    with pytest.raises(TypeError, match="position 2"):
        ask(network_with(layer).eval(), images(12))


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def test_a_residual_block_is_refused_by_its_name(ask):
    with pytest.raises(TypeError, match="Residual at position 2"):
        ask(network_with(Residual(nn.Linear(12, 12), nn.ReLU())), images(12))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.AvgPool2d(3, ceil_mode=True),
        nn.AvgPool2d(2, padding=1, count_include_pad=False),
        nn.AvgPool2d(2, divisor_override=3),
        nn.Conv2d(2, 2, 2, padding="same"),
        nn.Flatten(2),
    ],
    ids=[
        "batch statistics",
        "ceil_mode",
        "count_include_pad",
        "divisor_override",
        "same for an even kernel",
        "Flatten",
    ],
)
def test_settings_without_a_rule_are_refused_by_the_name_of_the_layer(ask, layer):
    model = nn.Sequential(nn.ReLU(), layer, nn.Flatten(), nn.LazyLinear(CLASSES)).double().eval()
    model(images(*MAPS))
    with pytest.raises(TypeError, match=f"{type(layer).__name__} at position 1"):
        ask(model, images(*MAPS))


def test_batch_statistics_behind_a_linear_layer_are_refused(ask):
    model = network_with(nn.Identity())
    model.insert(1, nn.BatchNorm1d(12, track_running_stats=False))
    with pytest.raises(TypeError, match="running statistics"):
        ask(model.double().eval(), images(12))


HOOKED = {
    "the network": lambda model: model,
    "linear before batch norm": lambda model: model[0],
    "batch norm behind linear": lambda model: model[1],
    "nest": lambda model: model[2],
    "last": lambda model: model[3],
}


@pytest.mark.parametrize("place", HOOKED)
def test_a_hook_is_refused_wherever_it_hangs(place):
    model = settled(nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Sequential(nn.ReLU()), nn.Linear(8, CLASSES))
    HOOKED[place](model).register_forward_hook(lambda layer, arguments, output: 2 * output)
    with pytest.raises(TypeError, match="hook"):
        walk(model, images(12), 0.1)


# --- rules of one's own ----------------------------------------------------------------------------------------------


@pytest.fixture
def scratch_rules(monkeypatch):
    """Rules registered in a test are gone behind it."""
    monkeypatch.setattr(local_bound, "_RULES", dict(local_bound._RULES))


def code_of_the_readme():
    section = re.search(r"^## A network of your own$(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```$", section[1], re.M | re.S)


def test_the_code_of_the_readme_runs_as_it_stands(scratch_rules):
    namespace = {}
    blocks = code_of_the_readme()
    assert len(blocks) == 2
    for block in blocks:
        exec(block, namespace)
    assert namespace["bounds"].local.shape == (4,)
    assert nn.Hardtanh in local_bound._RULES


def test_the_rule_of_the_readme_is_sound(scratch_rules):
    exec(code_of_the_readme()[1], {"nn": nn})
    model = settled(nn.Linear(12, 8), nn.Hardtanh(-0.2, 0.3), nn.Linear(8, 8), nn.Hardtanh(), nn.Linear(8, CLASSES))
    x = images(12)
    bound, points = walk(model, x, 0.2), points_in_the_ball(model, x, 0.2)
    hidden, clipped = outputs_of(model, points, -1), outputs_of(model, points, 2)
    assert (hidden <= bound.upper + 1e-9).all()
    assert (hidden >= bound.lower - 1e-9).all()
    assert not bound.varying[1].all()
    assert (clipped == clipped[0])[:, ~bound.varying[1]].all()


def test_a_rule_counts_for_its_very_type_only(scratch_rules):
    class Mine(nn.ReLU):
        """May do anything."""

    rule(Mine)(local_bound._RULES[nn.Identity])
    walk(network_with(Mine()), images(12), 0.1)
    with pytest.raises(TypeError, match="Yours at position 2"):
        walk(network_with(type("Yours", (Mine,), {})()), images(12), 0.1)


def test_a_rule_for_a_layer_that_works_in_place_leaves_the_box_whole(scratch_rules):
    @rule(nn.LeakyReLU)
    def leaky(walk, position, layer):
        walk.elementwise(position, layer, torch.ones_like(walk.center, dtype=torch.bool))

    torch.manual_seed(0)
    x = torch.rand(3, 6)
    boxes = []
    for inplace in (False, True):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(6, 5), nn.LeakyReLU(0.1, inplace), nn.Linear(5, 4), nn.LeakyReLU(0.1, inplace))
        bound = propagate(nn.Sequential(*net, nn.Linear(4, 3)), x, 0.3, PowerIteration(50))
        boxes.append(torch.stack([bound.lower, bound.center, bound.upper]))
    assert torch.equal(*boxes)
