"""What has no rule: every function refuses it by name and place, before anything is computed or learnt."""

import functools
import inspect
import math

import pytest
import torch
from oracles import CLASSES, IMAGES, MAPS, dense_network, images, network_with, walk
from torch import nn
from torch.overrides import TorchFunctionMode

from local_bound import Clip, Graph, GroupSort, Normalize, certified_radius, certify, local_lipschitz
from locallip.bound import rules


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class MyReLU(nn.ReLU):
    def forward(self, x):
        return super().forward(x).sqrt()


@pytest.mark.parametrize(
    "layer", [nn.Softshrink(), MyReLU(), nn.LPPool2d(2, 1)], ids=lambda layer: type(layer).__name__
)
def test_an_unknown_layer_is_refused_with_its_type_and_position(layer):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.Flatten(), nn.Linear(32, 3)).double().eval()
    with pytest.raises(TypeError, match=rf"{type(layer).__name__}.*position 1"):
        walk(model, images(1, 6, 6), 0.1)


def test_padding_other_than_zeros_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), nn.Flatten(), nn.Linear(72, 3))
    with pytest.raises(TypeError, match=r"Conv2d.*position 0.*reflect.*put nn\.ReflectionPad2d before it"):
        walk(model.double(), images(1, 6, 6), 0.1)


def test_a_linear_layer_on_maps_is_refused():
    with pytest.raises(TypeError, match=r"Linear.*position 0.*Flatten"):
        walk(nn.Sequential(nn.Linear(6, 6), nn.Flatten(), nn.Linear(36, 3)).double(), images(1, 6, 6), 0.1)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.Dropout()], ids=lambda layer: type(layer).__name__)
def test_training_mode_is_refused_where_it_matters(layer):
    model = dense_network(layer, nn.ReLU())
    with pytest.raises(ValueError, match=r"position \d.*training mode"):
        walk(model, images(6), 0.1)
    walk(model.eval(), images(6), 0.1)


@pytest.mark.parametrize(("module", "name"), [(nn.functional, "relu"), (torch, "relu"), (nn.functional, "linear")])
def test_a_function_that_was_replaced_is_refused(module, name, monkeypatch):
    """What layers compute by may differ where no image is that both are compared on."""
    original = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given, **named: original(*given, **named))
    with pytest.raises(TypeError, match=rf"{module.__name__}.{name} is another function than when locallip was"):
        walk(dense_network(nn.ReLU()), images(6), 0.1)


class Doubling(TorchFunctionMode):
    def __torch_function__(self, function, types, given=(), named=None):
        return function(*given, **(named or {}))


def test_a_mode_that_may_change_functions_is_refused_and_one_of_a_device_is_not():
    with Doubling(), pytest.raises(TypeError, match="the mode Doubling is active"):
        walk(dense_network(nn.ReLU()), images(6), 0.1)
    with torch.device("cpu"):
        walk(dense_network(nn.ReLU()), images(6), 0.1)


PUBLIC = {
    "local_lipschitz": lambda model, x: local_lipschitz(model, x, 0.1),
    "certify": lambda model, x: certify(model, x, torch.zeros(IMAGES, dtype=torch.long), 0.1),
    "certified_radius": certified_radius,
    "certified_radius, estimated": functools.partial(certified_radius, certificate="estimate"),
}


@pytest.fixture(params=PUBLIC)
def ask(request):
    """Each of the public functions, as a question about a network and images."""
    return PUBLIC[request.param]


@pytest.mark.parametrize("layers", [[nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Linear(4, 3)], [nn.Linear(6, 3)]], ids=len)
def test_a_last_linear_layer_on_maps_is_refused(ask, layers):
    with pytest.raises(TypeError, match=r"Linear at position \d: needs a Flatten before it"):
        ask(nn.Sequential(*layers).double(), images(1, 6))


@pytest.mark.parametrize(
    "layer",
    [nn.BatchNorm1d(12), nn.Dropout(), nn.Dropout1d(), nn.Sequential(nn.ReLU(), nn.BatchNorm1d(12))],
    ids=["BatchNorm1d", "Dropout", "Dropout1d", "in a nest"],
)
def test_training_mode_is_refused_and_nothing_is_learnt_from_the_images(ask, layer):
    model = network_with(layer)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"position 2.*training mode"):
        ask(model, images(12))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_batch_norm_in_training_mode_behind_a_linear_layer_is_refused(ask):
    model = nn.Sequential(nn.Linear(12, 12), nn.BatchNorm1d(12), nn.Linear(12, CLASSES)).double()
    with pytest.raises(ValueError, match="BatchNorm1d at position 1 is in training mode"):
        ask(model, images(12))


# Containers of parameters cannot be called, as PyTorch itself says.
SUPPORTED = {nn.Sequential, nn.ParameterList, nn.ParameterDict, *rules._RULES}
OTHERS = [
    kind
    for _, kind in sorted(inspect.getmembers(nn, inspect.isclass))
    if issubclass(kind, nn.Module) and kind not in SUPPORTED
]


def blank(kind):
    """An instance without its constructor's arguments; only its type is looked at."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    return layer


@pytest.mark.parametrize("kind", OTHERS, ids=lambda kind: kind.__name__)
def test_every_other_layer_of_pytorch_is_refused_by_its_name(kind):
    model = nn.Sequential(nn.Linear(12, 12), nn.ReLU(), blank(kind), nn.Linear(12, CLASSES))
    with pytest.raises(TypeError, match=rf"\b{kind.__name__} at position 2"):
        walk(model, torch.rand(IMAGES, 12), 0.1)


@pytest.mark.parametrize("layer", [nn.Softshrink(), nn.LayerNorm(12), nn.Sequential(nn.Softmax(1))])
def test_an_unknown_layer_is_refused_by_every_function(ask, layer):
    with pytest.raises(TypeError, match="position 2"):
        ask(network_with(layer).eval(), images(12))


class Residual(nn.Module):
    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x):
        return x + self.layers(x)


def test_an_unknown_layer_in_a_residual_block_is_refused_by_its_place(ask):
    with pytest.raises(TypeError, match=r"Softshrink at position 2\.layers\.1"):
        ask(network_with(Residual(nn.Linear(12, 12), nn.Softshrink())).eval(), images(12))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.MaxPool2d(2, return_indices=True),
        nn.ConvTranspose2d(2, 2, 3, dilation=2, output_padding=1),
        nn.BatchNorm1d(2),
        nn.Softplus(threshold=3),
        nn.ELU(-1.0),
        nn.PReLU(3),
        GroupSort(3),
        nn.Conv2d(2, 2, 2, padding="same"),
        nn.Flatten(2),
    ],
    ids=[
        "batch statistics",
        "return_indices",
        "output_padding beyond the stride",
        "BatchNorm1d of maps",
        "Softplus that jumps",
        "ELU that falls",
        "PReLU of other channels",
        "GroupSort of other channels",
        "same for an even kernel",
        "Flatten",
    ],
)
def test_settings_without_a_rule_are_refused_by_the_name_of_the_layer(ask, layer):
    # Refused before it runs, and some of these could not.
    model = nn.Sequential(nn.ReLU(), layer, nn.Flatten(), nn.Linear(1, CLASSES)).double().eval()
    with pytest.raises(TypeError, match=f"{type(layer).__name__} at position 1"):
        ask(model, images(*MAPS))


def test_batch_statistics_behind_a_linear_layer_are_refused(ask):
    model = network_with(nn.Identity())
    model.insert(1, nn.BatchNorm1d(12, track_running_stats=False))
    with pytest.raises(TypeError, match=r"BatchNorm1d at position 1 keeps no running statistics.*track_running_stats"):
        ask(model.double().eval(), images(12))


def test_clip_needs_ends_that_can_be_compared():
    assert Clip(0.0, math.inf).high == math.inf
    for ends in ((0.0, None), ("0", 1.0), (torch.zeros(1), 1.0)):
        with pytest.raises(TypeError, match="Clip needs a number"):
            Clip(*ends)


@pytest.mark.parametrize("given", [([math.nan], [1.0]), ([0.5], [math.inf]), ([0.5], [0.0]), ([0.5] * 2, [1.0] * 3)])
def test_normalize_needs_means_and_deviations_that_fit(given):
    with pytest.raises(ValueError, match="standard deviations"):
        Normalize(*given)


def test_a_network_that_drops_the_dimension_of_a_single_image_is_told_why():
    class Squeezing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 4, 6), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.out(self.conv(x).squeeze())

    with pytest.raises(TypeError, match=r"for 1 images.*squeeze\(\); use flatten\(1\)"):
        Graph.of(Squeezing().eval(), torch.rand(1, 1, 6, 6))
