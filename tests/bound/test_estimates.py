"""Estimates in low precision: close to the norms at any scale, and where a number is lost they certify nothing."""

import copy
import math

import pytest
import torch
from oracles import clipped_maxmin, clipped_relu, relu, stack_of
from torch import nn

from locallip.bound.bound import Bound
from locallip.bound.certificates import certified_radius, certify, local_lipschitz
from locallip.bound.operators import Dense
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.walk import propagate
from locallip.bound.worst_case import worst_logits, worst_margin


@pytest.fixture(autouse=True)
def _seed_and_fewer_iterations(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("locallip.bound.inquiry.ESTIMATE_ITERATIONS", 100)


def scaled_layers(scales, width=8):
    """Dense layers with ReLU between, of random weights times these scales, and images in float32."""
    layers = []
    for scale in scales:
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
        nn.init.orthogonal_(layers[-2].weight)
        layers[-2].weight.data *= scale
    model = nn.Sequential(*layers[:-1]).requires_grad_(False)
    return model, torch.rand(5, width)


@pytest.mark.parametrize(
    "scales",
    [
        (1e-12, 1e4, 1e4, 1e4),
        (1e4, 1e4, 1e4, 1e-12),
        (1e-12, 1e-12, 1e12, 1e12),
        (1e-18, 1e18),
        (1e18, 1e-18),
        (1e-30, 1e30),
    ],
)
def test_layers_of_very_different_scales_are_estimated_as_they_are_proven(scales):
    model, x = scaled_layers(scales)
    proven, estimate = (local_lipschitz(model, x, 0.01, kind) for kind in ("proven", "estimate"))
    torch.testing.assert_close(estimate.global_lipschitz.double(), proven.global_lipschitz, rtol=1e-3, atol=0)
    assert (estimate.lipschitz.double() <= proven.lipschitz * 1.001).all()
    assert (estimate.lipschitz.double() >= proven.lipschitz * 0.9).all()


def test_the_radius_of_an_estimate_is_not_its_limit_where_the_proof_gives_a_thousandth():
    scales = (1e-12, 1e4, 1e4, 1e4)
    model, x = scaled_layers(scales)
    proven, estimate = (
        certified_radius(model, x, certificate=kind, limit=10, effort="product") for kind in ("proven", "estimate")
    )
    assert (proven > 0).any()
    assert (estimate < 10).all()
    torch.testing.assert_close(estimate.double(), proven, rtol=0.05, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_estimates_in_half_precision_are_close_at_ordinary_scales(dtype, scale):
    model, x = scaled_layers([scale, 1 / scale, 1.0, 1.0])
    proven = local_lipschitz(model, x, 0.01)
    estimate = local_lipschitz(model.to(dtype), x.to(dtype), 0.01, "estimate")
    torch.testing.assert_close(estimate.global_lipschitz.double(), proven.global_lipschitz, rtol=0.05, atol=0)
    assert estimate.lipschitz.isfinite().all()
    assert (estimate.lipschitz > 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", [clipped_relu, relu, clipped_maxmin])
def test_radii_in_half_precision_are_close_to_those_in_float32(activation, dtype, monkeypatch):
    monkeypatch.setattr("locallip.bound.inquiry.ESTIMATE_ITERATIONS", 60)  # as many as these norms need
    layers = [
        *(nn.Conv2d(1, 8, 4, 2, 1), activation(8, 14, 14)),
        *(nn.Conv2d(8, 8, 4, 2, 1), activation(8, 7, 7)),
        *(nn.Flatten(), nn.Linear(392, 32), activation(32), nn.Linear(32, 10)),
    ]
    model, x = nn.Sequential(*layers), torch.rand(4, 1, 28, 28)
    y = model(x).argmax(dim=1)
    single, half = (
        certified_radius(copy.deepcopy(model).to(kind), x.to(kind), y, certificate="estimate", limit=2.0).float()
        for kind in (torch.float32, dtype)
    )
    # Margins of about 0.05 are rounded by 0.001 in bfloat16.
    torch.testing.assert_close(half, single, rtol=0.2, atol=1e-3)
    assert (single > 0.005).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_network_in_low_precision_is_certified_by_estimate_where_its_margin_is_large(dtype):
    model, x = scaled_layers([1.0, 1.0])
    model[-1].bias = nn.Parameter(torch.tensor([50.0] + [0.0] * 7))
    model, x = model.to(dtype), x.to(dtype)
    y = torch.zeros(5, dtype=torch.int64)
    assert certify(model, x, y, 0.1, "estimate").all()
    assert not certify(model, x, y + 1, 0.1, "estimate").any()
    assert not certify(model, x, y, 1000.0, "estimate").any()


EXTREME = {
    "products underflow": (1e-30, 1e-30, 1e30, 1e30),
    "products overflow": (1e30, 1e30, 1e-30, 1e-30),
    "weights underflow": (1e-44, 1.0),
    "the last product underflows": (1e-15, 1e-15, 1e-15, 1e15),
    "everything underflows": (1e-20, 1e-20, 1e-20),
    "everything overflows": (1e20, 1e20, 1e20),
}


@pytest.mark.parametrize("scales", EXTREME.values(), ids=EXTREME)
@pytest.mark.parametrize("epsilon", [1e-3, 1.0, 1e6])
def test_where_a_product_is_lost_an_estimate_certifies_nothing(scales, epsilon):
    # A bias settles the answer at x, so that a norm of 0 would certify it.
    model, x = scaled_layers(scales)
    model[-1].bias = nn.Parameter(torch.tensor([1e-3] + [0.0] * 7))
    y = torch.zeros(5, dtype=torch.int64)
    assert not certify(model, x, y, epsilon, "estimate").any()


@pytest.mark.parametrize("scales", EXTREME.values(), ids=EXTREME)
def test_where_a_product_is_lost_the_constants_are_not_zero(scales):
    model, x = scaled_layers(scales)
    found = local_lipschitz(model, x, 0.01, "estimate")
    assert not (found.lipschitz == 0).any()
    assert found.global_lipschitz != 0


def test_a_layer_of_zeros_is_no_lost_product():
    model, x = scaled_layers([1.0, 1.0, 1.0])
    model[2].weight.data.zero_()
    model[-1].bias = nn.Parameter(torch.tensor([1.0] + [0.0] * 7))
    assert local_lipschitz(model, x, 0.01, "estimate").global_lipschitz == 0
    assert certify(model, x, torch.zeros(5, dtype=torch.int64), 10.0, "estimate").all()


def test_in_half_precision_a_product_that_underflows_certifies_nothing():
    net = stack_of(*[([[1e-4]], [0.0])] * 3, *[([[1e4]], [0.0])] * 3, ([[0.0], [1.0]], [0.5, 0.0]))
    x, y = torch.tensor([[0.4]], dtype=torch.float16), torch.tensor([0])
    assert net.half()(x).argmax() == 0  # at 0.7 it is 1
    assert not certify(net, x, y, 0.3, "estimate").any()


# --- the worst case --------------------------------------------------------------------------------------------------


def bound_at_the_last_layer(weight, radius, dtype=torch.float32, rounding=None):
    """A bound without a box on a last layer (K, H), around one image whose logits are 1, 0, ..."""
    weight = torch.tensor(weight, dtype=dtype)
    logits = torch.zeros(1, len(weight), dtype=dtype)
    logits[0, 0] = 1
    center = torch.zeros(1, weight.shape[1], dtype=dtype)
    one = torch.ones(1, dtype=dtype)
    return Bound(
        logits=logits,
        center=center,
        lower=center - math.inf,
        upper=center + math.inf,
        radius=torch.tensor([radius], dtype=dtype),
        hidden_lipschitz=one,
        lowest_hidden_lipschitz=one,
        global_hidden_lipschitz=one[0],
        local_norms={},
        global_norms={},
        varying={},
        masks={},
        last=Dense(weight, None, 0),
        last_columns=None,
        logit_rounding=rounding,
    )


LABEL = torch.tensor([0])


@pytest.mark.parametrize(
    ("weight", "radius"),
    [
        ([[0.0, 0.0], [1e30, 1e30]], 1e-30),  # the radius squared underflows
        ([[0.0, 0.0], [1e-30, 1e-30]], 1e30),  # the direction squared does
        ([[0.0, 0.0], [1e-25, 0.0]], 1e-25),
        ([[0.0, 0.0], [1e30, 1e30]], 1.0),  # or overflows
        ([[0.0, 0.0], [1.0, 1.0]], 1e30),
        ([[0.0, 0.0], [1.0, 1.0]], math.inf),
        ([[0.0, 0.0], [1.0, 1.0]], math.nan),
        ([[0.0, 0.0], [1.0, math.nan]], 1.0),
    ],
)
@pytest.mark.parametrize("rounds", [1, 3])
def test_a_worst_case_whose_squares_are_lost_certifies_nothing(weight, radius, rounds):
    bound = bound_at_the_last_layer(weight, radius)
    assert not worst_margin(worst_logits(bound, LABEL, rounds), LABEL) > 0


def test_a_worst_case_of_nothing_lost_is_what_it_was():
    worst = worst_logits(bound_at_the_last_layer([[0.0, 0.0], [3.0, 4.0]], 0.1), LABEL)
    torch.testing.assert_close(worst, torch.tensor([[1.0, 0.5]]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("scale", "radius"), [(1.0, 1e-3), (1e-3, 1.0), (1e4, 1e-5), (1e-3, 1e-3)])
@pytest.mark.parametrize("rounds", [1, 3])
def test_squares_of_half_precision_are_not_lost(scale, radius, dtype, rounds):
    bound = bound_at_the_last_layer([[0.0, 0.0], [3 * scale, 4 * scale]], radius, dtype)
    worst = worst_logits(bound, LABEL, rounds)
    assert worst.dtype == torch.float32
    torch.testing.assert_close(worst, torch.tensor([[1.0, 5 * scale * radius]]), rtol=0.02, atol=0)


@pytest.mark.parametrize(("weight", "radius"), [([[1.0, 2.0], [1.0, 2.0]], 1.0), ([[0.0, 0.0], [3.0, 4.0]], 0.0)])
def test_a_worst_case_without_a_direction_or_a_radius_is_no_lost_square(weight, radius):
    worst = worst_logits(bound_at_the_last_layer(weight, radius), LABEL)
    assert torch.equal(worst, torch.tensor([[1.0, 0.0]]))


def test_a_walk_does_not_turn_a_lost_product_into_a_small_box():
    model, x = scaled_layers((1e-30, 1e-30, 1e30, 1e30))
    bound = propagate(model, x, 0.1, PowerIteration(20))
    assert not (bound.hidden_lipschitz == 0).any()
    assert not (bound.radius == 0).any()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("activation", [nn.ReLU(), clipped_relu(4, 3, 3)], ids=["ReLU", "clipped ReLU"])
def test_nothing_is_read_off_a_box_that_underflow_made_a_point(activation, fused):
    layers = [nn.Conv2d(1, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 4, 3, bias=False), activation]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(36, 3)).float()
    for position in (0, 2):
        model[position].weight.data *= 1e-30
    bound = propagate(model, torch.rand(3, 1, 7, 7), 0.1, PowerIteration(20), fused=fused)
    assert bound.hidden_lipschitz.isnan().all()
    assert bound.radius.isnan().all()


def test_without_a_look_at_underflow_the_bound_is_the_same_but_for_what_it_would_have_lost():
    model, x = scaled_layers((1.0, 1.0, 1.0))
    looks, does_not = (propagate(model, x, 0.1, PowerIteration(20, looks_for_underflow=look)) for look in (True, False))
    for name in ("logits", "lower", "upper", "radius", "hidden_lipschitz"):
        assert torch.equal(getattr(looks, name), getattr(does_not, name))
    model, x = scaled_layers((1e-30, 1e-30, 1.0))
    assert propagate(model, x, 0.1, PowerIteration(20)).radius.isnan().all()
    assert (propagate(model, x, 0.1, PowerIteration(20, looks_for_underflow=False)).radius == 0).all()


def test_a_box_is_lost_for_the_images_alone_whose_radius_makes_it_so():
    model, x = scaled_layers((1e-20, 1.0, 1.0))
    epsilon = torch.tensor([1.0, 1e-25, 1.0, 0.0, 1.0])
    images = [0, 2, 4]
    radius = propagate(model, x, epsilon, PowerIteration(20)).radius
    alone = propagate(model, x[images], epsilon[images], PowerIteration(20)).radius
    assert radius.isnan().tolist() == [False, True, False, False, False]
    torch.testing.assert_close(radius[images], alone)
    assert radius[3] == 0
