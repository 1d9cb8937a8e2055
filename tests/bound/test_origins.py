"""What the images pass through unseen ends the reading of a network, and constants of any origin do not."""

import numpy as np
import pytest
import torch
from oracles import CLASSES
from torch import nn

from local_bound import Graph, certify, local_lipschitz
from locallip.bound.nodes import Refusal

FEATURES = 6


class Net(nn.Module):
    """Two layers, and `middle` between them, a function of the module and of its activations."""

    def __init__(self, middle):
        super().__init__()
        self.first, self.last = nn.Linear(FEATURES, 5), nn.Linear(5, CLASSES)
        self.register_buffer("kept", torch.rand(5))
        self.bare, self._middle = torch.rand(5), middle
        self.double().eval()
        self.bare = self.bare.double()

    def forward(self, x):
        return self.last(self._middle(self, self.first(x)).relu())


@torch.jit.script
def scripted_step(x):
    return 100 * (x > 0).double().amax(0)


@torch.jit.script
def scripted_number(x) -> float:
    return float(x.sum())


@torch.jit.script
def scripted_choice(x) -> bool:
    return bool((x.sum() > 0).item())


UNSEEN = {
    "a tensor of TorchScript": lambda net, x: x + scripted_step(x),
    "a number of TorchScript": lambda net, x: x * scripted_number(x),
    "a choice of TorchScript": lambda net, x: x if scripted_choice(x) else 100 * x,
    "a choice of vmap": lambda net, x: x if torch.vmap(lambda row: row.sum() > 0)(x).any() else 100 * x,
    "what vmap made": lambda net, x: x + torch.vmap(lambda row: 100 * (row > 0).double())(x).amax(0),
    "TorchScript behind a leaf": lambda net, x: x + net.first(torch.zeros(FEATURES).double() + scripted_number(x)),
}


@pytest.mark.parametrize("images", [1, 3, 4])
@pytest.mark.parametrize("name", UNSEEN)
def test_a_function_that_cannot_be_seen_is_refused_however_many_images_there_are(name, images):
    torch.manual_seed(0)
    x = torch.rand(1, FEATURES).double().expand(images, FEATURES)
    with pytest.raises(Refusal, match=r"cannot be seen") as refusal:
        certify(Net(UNSEEN[name]), x, torch.zeros(images, dtype=torch.long), 0.01)
    assert "test_origins.py:" in str(refusal.value)


GLOBAL = torch.rand(5).double()
CONSTANTS = {
    "a buffer": lambda net, x: x * net.kept,
    "an attribute": lambda net, x: x * net.bare,
    "a global": lambda net, x: x * GLOBAL,
    "made in the forward": lambda net, x: x * torch.tensor([1.0, 2, 3, 4, 5]).double(),
    "computed from others": lambda net, x: x * (net.kept + torch.arange(5)) + GLOBAL.exp(),
    "made once and kept": lambda net, x: x * vars(net).setdefault("scale", torch.linspace(0.1, 1, 5).double()),
}


@pytest.mark.parametrize("name", CONSTANTS)
def test_constants_may_come_from_anywhere(name):
    torch.manual_seed(0)
    net, x = Net(CONSTANTS[name]), torch.rand(2, FEATURES).double()
    bound = local_lipschitz(net, x, 0.1)
    step = 0.1 * nn.functional.normalize(torch.randn(64, 2, FEATURES).double(), dim=2)
    with torch.no_grad():
        slopes = (net((x + step).flatten(0, 1)) - net(x).repeat(64, 1)).norm(dim=1).view(64, 2) / 0.1
    assert (slopes <= bound.lipschitz * (1 + 1e-9)).all()


def test_a_constant_that_comes_from_numpy_anew_in_every_run_is_refused_with_the_way_out():
    def middle(net, x):
        return x + torch.from_numpy(np.ones(5))

    with pytest.raises(Refusal, match="keep a constant in a buffer"):
        Graph.of(Net(middle), torch.rand(2, FEATURES).double())


def test_a_network_that_does_not_run_in_float64_is_refused_in_one_line():
    net = Net(lambda net, x: nn.functional.linear(x, torch.eye(5)))
    with pytest.raises(ValueError, match=r"the network does not run on images \(N, 6\) of torch.float64: ") as refusal:
        certify(net.float(), torch.rand(2, FEATURES), torch.zeros(2, dtype=torch.long), 0.1)
    assert "\n" not in str(refusal.value)
