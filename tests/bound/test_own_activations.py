"""An activation of one's own has to say by how much it rounds, or no proof takes it."""

import pytest
import torch
from oracles import IMAGES, assert_ball_and_box_hold, dense_network, images, outputs_of, points_in_the_ball, walk
from torch import nn

from local_bound import (
    Elementwise,
    ProvenNorms,
    certified_radius,
    certify,
    propagate,
    rule,
    worst_logits,
    worst_margin,
)
from locallip.bound import rules


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Squash(nn.Module):
    """Its activation says that it rounds by so much; None: it says nothing."""

    def __init__(self, rounding):
        super().__init__()
        self.rounding = rounding

    def forward(self, x):
        return torch.tanh(x)


@pytest.fixture
def squashing(monkeypatch):
    """Networks of `Squash`, by its rounding."""
    monkeypatch.setattr(rules, "_RULES", dict(rules._RULES))

    @rule(Squash)
    def squash(layer, place):
        return Elementwise(layer, lambda lower, upper: lower != upper, layer.rounding)

    return lambda rounding: dense_network(Squash(rounding))


def test_a_proof_refuses_an_activation_that_does_not_say_by_how_much_it_rounds(squashing):
    model, x = squashing(None), images(6)
    with pytest.raises(ValueError, match=r"position 1 does not say by how much it rounds"):
        propagate(model, x, 0.1, ProvenNorms(1e-6, 100))
    for ask in (certify, certified_radius):
        with pytest.raises(ValueError, match=r"position 1 does not say by how much it rounds"):
            ask(model, x, torch.arange(IMAGES) % 3, *([0.1] if ask is certify else []))


def test_an_estimate_takes_it_as_it_is(squashing):
    model, x = squashing(None), images(6)
    y = model(x).argmax(dim=1)
    assert certify(model, x, y, 1e-6, certificate="estimate").all()
    points = points_in_the_ball(model, x, 0.3)
    assert_ball_and_box_hold(walk(model, x, 0.3), outputs_of(model, points, -1))


def test_a_declared_rounding_error_widens_the_box_and_costs_margin(squashing):
    model, x, bounds = squashing(0.0), images(6), []
    for model[1].rounding in (0.0, 1e-3):
        bounds.append(propagate(model, x, 0.1, ProvenNorms(1e-6, 100)))
    none, some = bounds
    torch.testing.assert_close(some.upper, none.upper + 1e-3, rtol=0, atol=1e-12)
    torch.testing.assert_close(some.lower, none.lower - 1e-3, rtol=0, atol=1e-12)
    # Every one of 8 entries is off by so much, in the direction of the ball's worst point.
    assert (some.radius >= none.radius + 1e-3 * 8**0.5).all()
    y = none.logits.argmax(dim=1)
    margins = [worst_margin(worst_logits(bound, y, 1000), y) for bound in bounds]
    assert (margins[1] < margins[0] - 1e-5).all()


def test_what_holds_in_float32_is_refused_where_an_activation_rounds(squashing):
    with pytest.raises(ValueError, match=r"position 1 rounds, and its rounding in float32 is not bounded"):
        propagate(squashing(1e-15), images(6), 0.1, ProvenNorms(1e-6, 100, deployed="float32"))
