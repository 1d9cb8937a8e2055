"""The paper's attack: inside its ball, as strong on a network times a number, as weak on one that nothing moves."""

import copy

import pytest
import torch
from torch import nn

from locallip.evaluation.attacks import right
from locallip.evaluation.pgd import pgd

RADIUS = 0.2


@pytest.fixture(scope="module")
def learned():
    """A network, images and labels that it gets right."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 5))
    x = torch.rand(120, 3, 4, 4)
    y = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))(x).argmax(dim=1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    model = model.eval().requires_grad_(False)
    clean = right(model(x), y)
    assert clean.sum() > 100
    return model, x[clean], y[clean]


def times(model, factor):
    """The network with all logits times a factor."""
    result = copy.deepcopy(model)
    result[-1].weight.mul_(factor)
    result[-1].bias.mul_(factor)
    return result


def left(model, x, y):
    torch.manual_seed(1)
    return right(model(pgd(model, x, y, RADIUS)), y)


@pytest.mark.parametrize("factor", [1e2, 1e4, 1e8])
def test_a_network_times_a_number_is_as_easy_to_break(learned, factor):
    model, x, y = learned
    expected, found = left(model, x, y), left(times(model, factor), x, y)
    assert 20 < expected.sum() < len(y) - 20
    assert abs(int(found.sum()) - int(expected.sum())) <= 3


@pytest.mark.parametrize("factor", [1e-6, 1e-12])
def test_a_network_of_tiny_logits_is_attacked_at_all(learned, factor):
    model, x, y = learned
    assert left(times(model, factor), x, y).sum() < len(y) - 20


@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_the_point_lies_in_the_ball_and_is_valid(learned, factor):
    model, x, y = learned
    points = pgd(times(model, factor), x, y, RADIUS)
    assert ((points - x).double().flatten(1).norm(dim=1) <= RADIUS).all()
    assert points.min() >= 0
    assert points.max() <= 1
    assert torch.equal(pgd(model, x, y, 0.0), x)


def test_what_nothing_moves_stays(learned):
    model, x, y = learned
    still = times(model, 0)
    still[-1].bias[0] = 1.0
    assert left(still, x, torch.zeros_like(y)).all()
