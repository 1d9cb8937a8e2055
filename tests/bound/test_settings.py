"""Settings of layers in all forms that PyTorch takes: one number for all axes is one number, however it is written."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from local_bound import certified_radius, certify, check_rule, local_lipschitz
from locallip.bound.graph import Graph
from locallip.bound.operators import Conv
from locallip.bound.settings import per_axis

ONE = {"a tuple": (1,), "a list": [1], "two": (1, 1), "numpy's": np.int64(1)}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """Something, then the sum of all entries against a constant: the slope of a pool is attained at its centre."""

    def __init__(self, part, features):
        super().__init__()
        self.part, self.out = part, nn.Linear(features, 2)
        with torch.no_grad():
            self.out.weight.copy_(torch.stack([torch.zeros(features), torch.ones(features)]))
            self.out.bias.copy_(torch.tensor([5.0, 0.0]))

    def forward(self, x):
        return self.out(self.part(x).flatten(1))


MAXIMA = {
    "stride": lambda one: nn.MaxPool2d(3, stride=one),
    "kernel": lambda one: nn.MaxPool2d(type(one)([3]) if isinstance(one, list) else (3,), stride=1),
    "function": lambda one: lambda x: F.max_pool2d(x, 3, one),
    "function of torch": lambda one: lambda x: torch.max_pool2d(x, 3, one),
    "dilation": lambda one: nn.MaxPool2d(3, stride=1, dilation=one),
}


@pytest.mark.parametrize("name", MAXIMA)
@pytest.mark.parametrize("form", ["a tuple", "a list"])
def test_maxima_of_overlapping_windows_are_as_steep_however_their_settings_are_written(name, form):
    net, x = Net(MAXIMA[name](ONE[form]), 9).eval(), torch.zeros(1, 1, 5, 5)
    point = x.clone()
    point[0, 0, 2, 2] = 0.6
    assert net(point).argmax() == 1
    y = torch.tensor([0])
    assert local_lipschitz(net, x, 0.6).lipschitz.item() == pytest.approx(9)  # sqrt(9) of the maxima, 3 of the sum
    assert not certify(net, x, y, 0.6).any()
    assert certified_radius(net, x, y).item() == pytest.approx(5 / 9, abs=1e-3)


def convolution(**settings):
    torch.manual_seed(1)
    return nn.Conv2d(2, 3, 3, **settings)


def transposed(**settings):
    torch.manual_seed(1)
    return nn.ConvTranspose2d(2, 3, 3, **settings)


LAYERS = {
    "convolution, stride": lambda one: convolution(stride=one),
    "convolution, padding": lambda one: convolution(padding=one),
    "convolution, dilation": lambda one: convolution(dilation=one),
    "convolution, kept as a number": lambda one: with_setting(convolution(), "padding", 1),
    "transposed, stride": lambda one: transposed(stride=one),
    "transposed, padding": lambda one: transposed(padding=one),
    "average": lambda one: nn.AvgPool2d(3, stride=one),
    "average, padding": lambda one: nn.AvgPool2d(3, stride=2, padding=one),
    "average, ceil_mode": lambda one: nn.AvgPool2d(3, stride=one, ceil_mode=True),
    "maximum, padding": lambda one: nn.MaxPool2d(3, stride=2, padding=one),
}


def with_setting(layer, name, value):
    setattr(layer, name, value)
    return layer


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("form", ONE)
def test_a_layer_has_the_same_norms_however_its_settings_are_written(name, form):
    layer, plain = LAYERS[name](ONE[form]), LAYERS[name](1)
    x = torch.rand(2, 2, 6, 6)
    try:
        features = layer(x)[0].numel()
    except TypeError:
        pytest.skip("PyTorch does not take it")
    found, expected = (
        local_lipschitz(nn.Sequential(kind, nn.Flatten(), Net(nn.Identity(), features).out), x, 0.1)
        for kind in (layer, plain)
    )
    assert found.lipschitz.tolist() == pytest.approx(expected.lipschitz.tolist(), rel=1e-9)


@pytest.mark.parametrize("pool", [F.avg_pool2d, F.max_pool2d])
def test_without_a_stride_windows_lie_side_by_side(pool):
    x, parts = torch.rand(1, 1, 4, 4), (lambda x: pool(x, 2, []), lambda x: pool(x, 2), lambda x: pool(x, 2, 2))
    found = [local_lipschitz(Net(part, 4).eval(), x, 0.1).lipschitz.item() for part in parts]
    assert found == pytest.approx(found[:1] * 3, rel=1e-9)


@pytest.mark.parametrize("setting", [(1, 2, 3), (), None, 1.0, (1, 1.5), "11", (True, None)])
def test_what_is_no_setting_is_refused(setting):
    with pytest.raises(TypeError, match="needs one whole number, or one for each of 2 axes"):
        per_axis(setting, 2)


def test_an_operator_made_by_hand_takes_them_too():
    weight = torch.rand(1, 1, 2, 2)
    convs = [Conv(weight, None, 0, torch.Size([1, 5, 5]), stride=stride) for stride in (2, (2,), [2, 2])]
    assert len({(conv.output_shape, conv.geometry()) for conv in convs}) == 1


@pytest.mark.parametrize("divisor", [-1, -4, 4])
@pytest.mark.parametrize("ceil_mode", [False, True])
def test_averages_may_be_divided_by_what_is_below_0(divisor, ceil_mode):
    layer = nn.AvgPool2d(2, divisor_override=divisor, ceil_mode=ceil_mode).eval()
    check_rule(layer, (2, 5, 5))
    net = nn.Sequential(layer, nn.Flatten(), nn.ReLU(), nn.Linear(1, 2)).eval()
    with torch.no_grad():
        net[3].weight.copy_(torch.tensor([[0.0], [1.0]]))
        net[3].bias.copy_(torch.tensor([0.1, 0.0]))
    x = torch.full((1, 1, 2, 2), -math.copysign(0.05, divisor))
    # The sum of four entries has to go from 0.2 on one side of 0 to a tenth of the divisor on the other.
    exact = (0.2 + 0.1 * abs(divisor)) / 2
    assert 0.9 * exact < certified_radius(net, x, torch.tensor([0])).item() <= exact


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.MaxPool2d(9), (1, 6, 6)), (nn.AvgPool2d(9), (1, 6, 6)), (nn.AdaptiveMaxPool2d((-1, 2)), (1, 6, 6))],
)
def test_a_pool_that_does_not_fit_is_named(layer, shape):
    net = nn.Sequential(layer, nn.Flatten(), nn.Linear(4, 2)).eval()
    with pytest.raises((TypeError, ValueError), match=rf"{type(layer).__name__} at position 0"):
        certify(net, torch.rand(1, *shape), torch.tensor([0]), 0.1)


def test_a_rule_that_makes_another_shape_than_the_network_is_refused(monkeypatch):
    """As where one axis of a pool's windows was lost."""
    monkeypatch.setattr("locallip.bound.pooling.MaxPool.shape_behind", lambda pool, shape: torch.Size([shape[0], 3]))
    with pytest.raises(TypeError, match=r"makes \(1, 3\) of an image, but the network makes \(1, 3, 3\) there"):
        Graph.of(Net(nn.MaxPool2d(3, 1), 9).eval(), torch.zeros(1, 1, 5, 5))
