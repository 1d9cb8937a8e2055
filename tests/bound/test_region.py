"""Regions in all their forms say the same, and hold what layers make of the points in them."""

import pytest
import torch
from oracles import IMAGES, dense_matrix, images
from torch import nn

from local_bound import Conv, Dense
from locallip.bound.region import CenteredRegion, Point, Region, UncutRegion

SHAPE = torch.Size([2, 5, 4])
SAMPLES = 200


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def parts():
    """Centre, middle and half-width of boxes that hold the centre."""
    center, half = images(*SHAPE), images(*SHAPE)
    return center, center + half * (2 * images(*SHAPE) - 1), half


FORMS = {
    "ends": lambda center, middle, half: Region(center, middle - half, middle + half),
    "stack and half-width": lambda center, middle, half: CenteredRegion(torch.cat([center, middle]), half),
    # A ball that is too large to cut anything off.
    "uncut": lambda center, middle, half: UncutRegion(torch.cat([center, middle]), half, half.new_tensor(9.0)),
}


@pytest.fixture(params=FORMS)
def region(request, parts):
    return FORMS[request.param](*parts)


def test_every_form_has_the_same_ends_and_the_same_middle(region, parts):
    center, middle, half = parts
    for name, expected in {"center": center, "lower": middle - half, "upper": middle + half, "half": half}.items():
        torch.testing.assert_close(getattr(region, name), expected)
    torch.testing.assert_close(region.stack, torch.cat([center, middle]))


def test_a_box_around_its_own_center_needs_no_second_middle():
    center, half = images(*SHAPE), images(1, 1, 1)
    region = CenteredRegion(center, half)
    assert region.stack is center
    torch.testing.assert_close(region.lower, center - half)
    torch.testing.assert_close(region.upper, center + half)
    reshaped = region.reshape(nn.Flatten())
    torch.testing.assert_close(reshaped.lower, (center - half).flatten(1))


def test_the_balls_own_box_cuts_the_box(parts):
    center, middle, half = parts
    reach = 0.5 * images(SHAPE[0], 1, 1)
    cut = UncutRegion(torch.cat([center, middle]), half, reach)
    torch.testing.assert_close(cut.lower, torch.maximum(middle - half, center - reach))
    torch.testing.assert_close(cut.upper, torch.minimum(middle + half, center + reach))
    assert (cut.upper - cut.lower < 2 * half).any()


def test_renaming_entries_renames_those_of_center_and_ends(region):
    reshaped = region.reshape(nn.Flatten())
    for name in ("center", "lower", "upper"):
        assert torch.equal(getattr(reshaped, name), getattr(region, name).flatten(1))


def test_a_monotone_function_takes_center_and_ends_along(region):
    mapped = region.map(torch.tanh)
    for name in ("center", "lower", "upper"):
        assert torch.equal(getattr(mapped, name), getattr(region, name).tanh())


def test_a_widened_box_is_larger_by_so_much_on_every_side(region):
    wider = region.widened(0.25)
    torch.testing.assert_close(wider.lower, region.lower - 0.25)
    torch.testing.assert_close(wider.upper, region.upper + 0.25)
    assert torch.equal(wider.center, region.center)
    assert region.widened(0.0) is region


@pytest.fixture(params=["convolution", "dense"])
def operator(request):
    if request.param == "dense":
        return Dense(torch.randn(7, SHAPE.numel()).double(), torch.randn(7).double(), 0)
    return Conv(torch.randn(3, 2, 3, 3).double(), torch.randn(3).double(), 0, SHAPE, (2, 1), (1, 1))


def before(operator, region):
    return region if operator.input_shape == SHAPE else region.reshape(nn.Flatten())


def points_of(region, radius):
    """(S, N, ...) in box and ball: on segments from the centre, which lies in both."""
    share = torch.rand(SAMPLES, *region.center.shape, dtype=torch.float64)
    share[::2] = share[::2].round()
    step = region.lower + share * (region.upper - region.lower) - region.center
    length = step.flatten(2).norm(dim=2).view(SAMPLES, IMAGES, *[1] * (step.dim() - 2))
    return region.center + step * (radius.view(-1, *[1] * (step.dim() - 2)) / length).clamp(max=1)


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_the_region_behind_a_linear_layer_holds_what_becomes_of_ball_and_box(region, operator, size):
    region, radius = before(operator, region), size * images().expand(IMAGES)
    behind = region.behind(operator, radius, 0.0)
    outputs = operator.affine(points_of(region, radius).flatten(0, 1)).unflatten(0, (SAMPLES, IMAGES))
    assert (outputs >= behind.lower - 1e-9).all()
    assert (outputs <= behind.upper + 1e-9).all()
    torch.testing.assert_close(behind.center, operator.affine(region.center))


def test_the_box_behind_a_linear_layer_is_the_smallest_for_box_and_ball_each(region, operator):
    region = before(operator, region)
    matrix = dense_matrix(operator.apply, operator.input_shape)
    small, large = (region.behind(operator, torch.full((IMAGES,), radius).double(), 0.0) for radius in (1e-3, 1e3))
    half = region.half.flatten(1) @ matrix.abs().T
    torch.testing.assert_close((large.upper - large.lower).flatten(1) / 2, half)
    # At the border a row is shorter than the kernel, which is taken for it.
    ball = (small.upper - small.lower).flatten(1) / 2e-3
    assert (ball >= matrix.norm(dim=1) - 1e-9).all()
    inner = matrix.count_nonzero(dim=1) == matrix.count_nonzero(dim=1).max()
    torch.testing.assert_close(ball[:, inner], matrix.norm(dim=1)[inner].expand(IMAGES, -1))


def test_a_box_of_one_width_is_like_any_other(operator):
    center, half = images(*SHAPE), images(1, 1, 1)
    narrow, full = CenteredRegion(center, half), CenteredRegion(center, half.expand_as(center).contiguous())
    if operator.input_shape != SHAPE:
        operator = Conv(operator.weight.view(7, *SHAPE), operator.bias, 0, SHAPE)  # the same matrix
    radius = torch.full((IMAGES,), 1e3).double()
    for name in ("center", "lower", "upper"):
        ours, theirs = (getattr(region.behind(operator, radius, 0.0), name) for region in (narrow, full))
        torch.testing.assert_close(ours, theirs)


def test_rounding_widens_the_box_behind_a_linear_layer(region, operator):
    region, radius = before(operator, region), torch.ones(IMAGES).double()
    exact, rounded = (region.behind(operator, radius, rounding) for rounding in (0.0, 0.01))
    torch.testing.assert_close(rounded.lower, exact.lower - 0.01)
    torch.testing.assert_close(rounded.upper, exact.upper + 0.01)


# --- the ball alone --------------------------------------------------------------------------------------------------


@pytest.fixture
def point():
    return Point(images(*SHAPE), torch.arange(IMAGES).double())


def test_the_ends_of_a_ball_alone_lie_a_radius_away_and_no_nearer(point):
    radius = point.radius.view(-1, 1, 1, 1)
    assert (point.upper >= point.center + radius).all()
    assert (point.lower <= point.center - radius).all()
    torch.testing.assert_close(point.upper - point.lower, (2 * radius).expand(IMAGES, *SHAPE), rtol=1e-5, atol=0)


def test_a_ball_alone_keeps_its_radius_through_what_makes_no_ball_larger(point):
    for behind in (point.map(torch.tanh), point.reshape(nn.Flatten()), point.widened(0.1)):
        assert torch.equal(behind.radius, point.radius)
    assert torch.equal(point.map(torch.tanh).center, point.center.tanh())


def test_only_a_ball_alone_takes_another_radius(point, region):
    radius = torch.full((IMAGES,), 7.0).double()
    assert torch.equal(point.of_radius(radius).radius, radius)
    assert region.of_radius(radius) is region


def test_a_ball_alone_goes_through_a_linear_layer_with_its_center(point, operator):
    point, radius = before(operator, point), torch.full((IMAGES,), 2.0).double()
    behind = point.behind(operator, radius, 0.0)
    assert torch.equal(behind.center, operator.affine(point.center))
    assert torch.equal(behind.radius, radius)
