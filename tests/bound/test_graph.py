"""Networks as graphs: what is a network, where its layers stand, and what they are."""

import pytest
import torch
from oracles import CLASSES, IMAGES, MAPS, clipped_maxmin, dense_network, images, network, settled, walk
from torch import nn

from local_bound import (
    Activation,
    Arithmetic,
    Clip,
    Conv,
    Dense,
    Graph,
    LinearOperator,
    Normalize,
    Reshape,
    local_lipschitz,
    worst_logits,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- what is no network ----------------------------------------------------------------------------------------------


class MySequential(nn.Sequential):
    pass


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Flatten(), nn.Conv2d(1, 1, 1)], ids=lambda layer: type(layer).__name__)
def test_a_network_that_does_not_end_in_a_linear_layer_is_refused(last):
    with pytest.raises(TypeError, match=rf"Linear.*{type(last).__name__}.*position 1"):
        walk(nn.Sequential(nn.Conv2d(1, 1, 1), last).double(), images(1, 6, 6), 0.1)


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Linear(6, 3), MySequential(nn.Linear(6, 3))])
def test_only_a_filled_plain_sequential_is_a_network(model):
    with pytest.raises(TypeError, match="network"):
        walk(model.double(), images(6), 0.1)


def test_a_layer_with_a_hook_is_refused():
    model = dense_network(nn.ReLU())
    model[1].register_forward_hook(lambda layer, args, output: 2 * output)
    with pytest.raises(TypeError, match=r"ReLU.*position 1.*hook"):
        walk(model, images(6), 0.1)


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


# --- positions and meanings ------------------------------------------------------------------------------------------


def test_nesting_changes_nothing():
    flat, x, y = network("mixture"), images(1, 6, 6), torch.arange(IMAGES)
    nested = nn.Sequential(flat[:3], nn.Sequential(flat[3:5], flat[5:-1]), flat[-1])
    expected, actual = walk(flat, x, 0.4), walk(nested, x, 0.4)
    torch.testing.assert_close(worst_logits(actual, y), worst_logits(expected, y))
    assert list(actual.local_norms) == ["0.0", "0.2", "1.1.0"]


def test_positions_in_a_nest_are_strings():
    block = nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Sequential(nn.AvgPool2d(2)))
    model = settled(Normalize([0.5], [0.5]), block, nn.Flatten(), nn.Linear(8, CLASSES))
    bounds = local_lipschitz(model, images(*MAPS), 0.1)
    assert list(bounds.global_norms) == list(bounds.local_norms) == [0, "1.0", "1.3.0", 3]


@pytest.mark.parametrize(
    ("linear", "normalization", "shape"),
    [(nn.Linear(12, 9), nn.BatchNorm1d(9), (12,)), (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), MAPS)],
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
    one, two = (walk(model, images(*MAPS), 0.1).global_hidden_lipschitz for model in (flat, nested))
    torch.testing.assert_close(two, one)
