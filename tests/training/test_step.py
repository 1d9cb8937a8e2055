"""A step: what it counts, what its images weigh, and what becomes of losses that are not finite."""

import math

import pytest
import torch
from torch import nn

from locallip.bound.power_iteration import PowerIteration
from locallip.training.step import RobustLoss, Tally

RIGHT, WRONG, TIE, NAN = [3.0, 1.0, 0.0], [1.0, 3.0, 0.0], [2.0, 2.0, 0.0], [2.0, math.nan, 0.0]


def tally_of(*batches):
    tally = Tally(torch.device("cpu"))
    for loss, logits, worst in batches:
        label = torch.zeros(len(logits), dtype=torch.long)
        tally.add(torch.tensor(loss), torch.tensor(logits), torch.tensor(worst), label)
    return tally


def test_tally_weighs_every_image_alike_whatever_its_batch():
    tally = tally_of((1.0, [RIGHT, RIGHT, RIGHT], [RIGHT, RIGHT, WRONG]), (5.0, [WRONG], [WRONG]))
    assert tally.means() == pytest.approx((2.0, 0.25, 0.5))


@pytest.mark.parametrize("worst", [WRONG, TIE, NAN])
def test_tally_certifies_by_a_strict_and_finite_margin_only(worst):
    assert tally_of((0.0, [RIGHT, RIGHT], [RIGHT, worst])).means() == (0, 0, 0.5)


def test_an_empty_tally_has_means():
    assert tally_of().means() == (0, 0, 0)


@pytest.mark.parametrize("epsilon", [0.1, torch.tensor(0.1)])
@pytest.mark.parametrize("end", [[], [nn.Identity()], [nn.Flatten()]])
def test_the_loss_is_that_of_the_network_whatever_it_ends_in(end, epsilon):
    torch.manual_seed(0)
    layers = [nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3)]
    x, y = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    loss, logits, worst = RobustLoss(nn.Sequential(*layers, *end).eval(), PowerIteration(50))(x, y, epsilon, 0.5)
    assert torch.equal(logits, nn.Sequential(*layers)(x))
    assert (worst.scatter(1, y[:, None], torch.inf) > logits).all()
    assert loss.isfinite()
