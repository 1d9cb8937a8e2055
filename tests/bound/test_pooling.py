"""Pooling: windows counted one by one, and the constants of maxima attained."""

import math

import pytest
import torch
from contracts_of_layers import ActivationContract
from torch import nn

from local_bound import Arithmetic, Place, certify, local_lipschitz
from locallip.bound.pooling import adaptive_windows, most_shared, sliding_windows
from locallip.bound.rules import meaning_of


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def meaning(layer, *shape):
    return meaning_of(layer, Place(0, torch.Size(shape), torch.zeros((), dtype=torch.float64), Arithmetic()))


class TestMaxPool(ActivationContract):
    shape = (2, 5, 6)

    def create(self):
        return meaning(nn.MaxPool2d(3, stride=2, padding=1), *self.shape)


POOLS = {
    "apart": (nn.MaxPool2d(2), (6, 6), 1),
    "3x3, stride 2": (nn.MaxPool2d(3, stride=2, padding=1), (8, 8), 4),
    "3x3, stride 1": (nn.MaxPool2d(3, stride=1), (6, 6), 9),
    "3x3, stride 1, small image": (nn.MaxPool2d(3, stride=1), (4, 3), 2),
    "one axis overlaps": (nn.MaxPool2d((3, 2), stride=(1, 2)), (7, 6), 3),
    "dilation": (nn.MaxPool2d(2, stride=2, dilation=2), (9, 9), 4),
    "windows stand out": (nn.MaxPool2d(3, stride=2, ceil_mode=True), (6, 6), 4),
    "places between windows": (nn.MaxPool2d(1, stride=2), (6, 6), 1),
    "adaptive": (nn.AdaptiveMaxPool2d((4, 2)), (6, 6), 2),
    "adaptive, to more than there is": (nn.AdaptiveMaxPool2d(5), (3, 3), 4),
}


@pytest.mark.parametrize("name", POOLS)
def test_the_constant_is_the_root_of_the_windows_that_share_a_place_and_is_attained(name):
    layer, sides, shared = POOLS[name]
    spikes = torch.eye(math.prod(sides), dtype=torch.float64).view(-1, 1, *sides)
    seen = (layer(spikes) > 0).flatten(1).sum(dim=1)  # by how many windows each place is seen
    if "adaptive" not in name:
        assert seen.max() == shared
    pool = meaning(layer, 1, *sides)
    assert pool.lipschitz == pytest.approx(math.sqrt(seen.max()))
    gains = (pool(spikes) - pool(torch.zeros_like(spikes))).flatten(1).norm(dim=1)
    assert gains.max() == pytest.approx(pool.lipschitz)


def test_windows_are_those_of_pytorch():
    x = torch.arange(7.0).view(1, 1, 7)
    for size, stride, padding, dilation in ((3, 2, 1, 1), (2, 1, 0, 3), (4, 3, 2, 1)):
        pool = nn.MaxPool1d(size, stride, padding, dilation)
        windows = sliding_windows(7, pool(x).shape[2], size, stride, padding, dilation)
        assert [max(window) for window in windows] == pool(x).flatten().tolist()
    for count in range(1, 10):
        pooled = nn.AdaptiveAvgPool1d(count)(x).flatten().tolist()
        assert [sum(window) / len(window) for window in adaptive_windows(7, count)] == pytest.approx(pooled)


def test_no_windows_share_nothing():
    assert most_shared([[0, 1], [2, 3]]) == 1
    assert most_shared([[0, 1], [1, 2], [1]]) == 3
    assert most_shared([]) == 0


def test_rows_follow_through_a_relu_before_the_pool_and_columns_behind_it():
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 6), nn.Linear(6, 3)
    )
    model = model.double()
    # The first channel is off, before and behind the pool, and all of the second is on.
    model[0].bias.data = torch.tensor([-100.0, 100.0]).double()
    bound = local_lipschitz(model, torch.rand(2, 1, 6, 6).double(), 0.1)
    assert (bound.local_norms[0] < bound.global_norms[0]).all()
    columns = torch.arange(8) >= 4
    true = torch.linalg.matrix_norm(model[4].weight * columns, ord=2)
    torch.testing.assert_close(bound.local_norms[4], true.expand(2).detach(), rtol=1e-4, atol=0)


def test_the_constant_of_an_overlapping_pool_is_a_factor_of_the_bound():
    model = nn.Sequential(nn.MaxPool2d(3, stride=1), nn.Flatten(), nn.Linear(16, 3)).double()
    bound = local_lipschitz(model, torch.rand(2, 1, 6, 6).double(), 0.1)
    weight = torch.linalg.matrix_norm(model[2].weight, ord=2)
    torch.testing.assert_close(bound.global_lipschitz, 3 * weight.detach(), rtol=1e-4, atol=0)


def test_a_network_with_a_pool_is_certified_in_float32_too_as_it_rounds_nothing():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(2, 3)).eval()
    x = torch.rand(4, 1, 6, 6)
    y = model(x).argmax(dim=1)
    assert certify(model, x, y, 1e-4).all()
