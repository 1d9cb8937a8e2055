"""Activations: what a walk asks of them, by sampling and by finite differences."""

import math

import pytest
import torch
from contracts_of_layers import ActivationContract, ClippingContract

from local_bound import Clip, ClippedMaxMin, Elementwise
from locallip.bound.region import Region


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def threshold(*shape, low=0.0, high=0.5):
    return (low + (high - low) * torch.rand(1, *shape, dtype=torch.float64)).requires_grad_()


class TestReLU(ClippingContract):
    def create(self):
        return Clip(0.0, math.inf)


class TestHardtanh(ClippingContract):
    def create(self):
        return Clip(-0.2, 0.3)


class TestClippedReLU(ClippingContract):
    def create(self):
        return Clip(0.0, threshold(*self.shape))


class TestClippedReLUOfEntries(TestClippedReLU):
    shape = (12,)


class TestClippedMaxMin(ClippingContract):
    def create(self):
        channels, *rest = self.shape
        low, high = threshold(channels // 2, *rest, low=-0.4, high=0), threshold(channels // 2, *rest, high=0.4)
        return ClippedMaxMin(low, high)


class TestClippedMaxMinOfEntries(TestClippedMaxMin):
    shape = (12,)


class TestTanh(ActivationContract):
    def create(self):
        return Elementwise(torch.tanh, lambda lower, upper: lower != upper, rounding=1e-15)


class TestOneThatWorksInPlace(ActivationContract):
    def create(self):
        return Elementwise(lambda x: x.clamp_(-0.2, 0.3), lambda lower, upper: ~((upper <= -0.2) | (lower >= 0.3)))


def box(lower, upper):
    lower, upper = (torch.tensor(end, dtype=torch.float64) for end in (lower, upper))
    return Region((lower + upper) / 2, lower, upper)


def test_the_slack_is_how_far_a_box_reaches_over_the_thresholds():
    region = box([[-2.0, -1.0, 1.0]], [[-1.0, 3.0, 2.0]])
    assert Clip(0.0, math.inf).slack(region, 0.5) == pytest.approx((3 + 2) / 3)
    high = torch.tensor([[0.5, 0.5, 1.5]], dtype=torch.float64)
    # Below the upper threshold reach: 2.5, 1.5 and 0.5.
    assert Clip(0.0, high).slack(region, 0.5) == pytest.approx((3 + 2) / 3 + 0.5 * 4.5 / 3)


def test_the_slack_of_pairs_is_that_of_the_larger_and_of_the_smaller():
    region = box([[-1.0, 0.0]], [[1.0, 2.0]])  # the larger is at least 0, the smaller at most 1
    one = torch.ones(1, 1, dtype=torch.float64)
    assert ClippedMaxMin(-one / 2, one / 4).slack(region, 7.0) == pytest.approx(0.25 + 1.5)


def test_an_activation_of_ones_own_has_no_slack_and_no_dual():
    mine = Elementwise(torch.tanh, torch.ne)
    assert mine.slack(box([[-1.0]], [[1.0]]), 1.0) == 0
    assert mine.in_dual() is None


def test_nobody_knows_how_much_an_activation_of_ones_own_rounds_unless_it_says_so():
    assert Elementwise(torch.tanh, torch.ne).rounding is None
    assert Elementwise(torch.tanh, torch.ne, rounding=1e-15).rounding == 1e-15


def test_pairs_mix_entries_and_clips_do_not():
    one = torch.ones(1, 2)
    assert not ClippedMaxMin(-one, one).elementwise
    assert Clip(0.0, one).elementwise
    assert Elementwise(torch.tanh, torch.ne).elementwise
