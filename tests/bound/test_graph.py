"""Networks as graphs: what is a network, where its layers stand, and what they are."""

import pytest
import torch
from oracles import CLASSES, IMAGES, MAPS, clipped_maxmin, dense_network, images, network, settled, walk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from local_bound import (
    Activation,
    Arithmetic,
    Conv,
    Dense,
    Graph,
    Normalize,
    Reshape,
    local_lipschitz,
    worst_logits,
)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# --- what is no network ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [nn.ReLU(), nn.Conv2d(1, 1, 1)], ids=lambda layer: type(layer).__name__)
def test_a_network_that_gives_no_logits_is_refused(last):
    with pytest.raises(TypeError, match=r"logits \(N, K\).*\(N, 1, 6, 6\)"):
        walk(nn.Sequential(nn.Conv2d(1, 1, 1), last).double(), images(1, 6, 6), 0.1)


@pytest.mark.parametrize("model", [nn.Sequential(), nn.Sequential(nn.Sequential()), "a name", nn.Linear])
def test_what_is_empty_or_no_module_is_no_network(model):
    with pytest.raises(TypeError, match="network"):
        walk(model, images(6), 0.1)


class MySequential(nn.Sequential):
    pass


def test_a_single_layer_and_a_sequential_of_the_users_are_networks():
    layer, x = nn.Linear(6, 3).double(), images(6)
    for model in (layer, MySequential(layer).eval(), nn.Sequential(nn.Sequential(layer))):
        torch.testing.assert_close(walk(model.eval(), x, 0.1).logits, layer(x))


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


def deep():
    """Every kind of meaning, nested, with one folded pair."""
    block = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), clipped_maxmin(4, 4, 4), nn.Sequential(nn.AvgPool2d(2))
    )
    return settled(Normalize([0.5], [0.5]), block, nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def test_the_graph_is_a_chain_of_layers_at_their_positions_with_one_for_a_folded_pair():
    graph = Graph.of(deep())
    assert [node.position for node in graph.hidden] == [0, "1.0", "1.2", "1.3.0", 2, 3, 4]
    assert [type(node.layer).__name__ for node in graph.hidden] == [
        *("Normalize", "BatchNormed", "ClampGroupSort", "AvgPool2d", "Flatten", "Linear", "ReLU"),
    ]
    assert graph.last.position == 5


def test_every_layer_means_what_it_is():
    kinds = (Conv, Conv, Activation, Conv, Reshape, Dense, Activation)
    meanings = Graph.of(deep()).meanings(images(*MAPS), Arithmetic())
    assert [position for position, _ in meanings] == [0, "1.0", "1.2", "1.3.0", 2, 3, 4]
    assert all(isinstance(meaning, kind) for (_, meaning), kind in zip(meanings, kinds))


def test_operators_and_activations_come_in_order_and_fit_to_one_another():
    graph, x = Graph.of(deep()), images(*MAPS)
    operators, activations = graph.operators(x), graph.activations(x)
    assert [operator.position for operator in operators] == [0, "1.0", "1.3.0", 3]
    assert [tuple(o.input_shape) for o in operators] == [MAPS, MAPS, (4, 4, 4), (16,)]
    assert [tuple(o.output_shape) for o in operators] == [MAPS, (4, 4, 4), (4, 2, 2), (8,)]
    assert [activation.elementwise for activation in activations] == [False, True]


class Nothing(TorchDispatchMode):
    """Refuses what computes."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        computes = "convolution", "addmm", "mm", "native_batch_norm", "relu", "maximum", "minimum"
        assert function.overloadpacket.__name__ not in computes
        return function(*args, **(kwargs or {}))


def test_nothing_is_computed_to_know_the_meanings():
    with Nothing(), pytest.raises(AssertionError):
        deep()(images(*MAPS))
    with Nothing():
        assert len(Graph.of(deep()).meanings(images(*MAPS), Arithmetic())) == 7


def test_the_operators_multiply_to_the_network_where_activations_leave_everything():
    model = settled(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 8), nn.Linear(8, CLASSES))
    graph, x = Graph.of(model), images(*MAPS)
    first, second = graph.operators(x)
    torch.testing.assert_close(graph.last_operator().affine(second.affine(first.affine(x).flatten(1))), model(x))
    assert graph.last_operator().position == 4


def test_the_graph_of_a_network_stands_for_it():
    model, x = network("mixture"), images(1, 6, 6)
    ours, theirs = walk(Graph.of(model), x, 0.2), walk(model, x, 0.2)
    for name in ("logits", "lower", "upper", "radius"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
