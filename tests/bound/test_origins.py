"""What the images pass through unseen ends the reading of a network, and constants of any origin do not."""

import threading

import numpy as np
import pytest
import torch
from oracles import CLASSES
from torch import nn

from local_bound import Graph, certify, local_lipschitz, verify
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


def swapped(net, x):
    larger = x + 1000 * (x - 50).relu()
    torch.utils.swap_tensors(larger, x)
    return x


def test_activations_that_took_the_place_of_others_are_refused():
    with pytest.raises(Refusal, match="changed in place"):
        local_lipschitz(Net(swapped), torch.rand(2, FEATURES).double(), 5.0)


@pytest.mark.parametrize("ask", [certify, verify])
def test_a_network_that_does_otherwise_with_many_images_is_refused(ask):
    """It is read, and compared, on a few."""
    net = Net(lambda net, x: x * net.kept if len(x) > 16 else x)
    few, many = torch.rand(10, FEATURES).double(), torch.rand(40, FEATURES).double()
    ask(net, few, torch.zeros(10, dtype=torch.long), 0.01)
    with pytest.raises(TypeError, match="on how many images there are"):
        ask(net, many, torch.zeros(40, dtype=torch.long), 0.01)


class Selfish(nn.Linear):
    def __deepcopy__(self, memo):
        return self


class Locked(Net):
    def __init__(self):
        super().__init__(lambda net, x: x)
        self.lock = threading.Lock()


def selfish():
    """A network whose copy would share its first layer with it."""
    return nn.Sequential(Selfish(FEATURES, 4), nn.ReLU(), nn.Linear(4, CLASSES)).eval()


@pytest.mark.parametrize(("make", "why"), [(selfish, "__deepcopy__ in it"), (lambda: Locked().float(), "_thread.lock")])
@pytest.mark.parametrize("ask", [certify, verify])
def test_a_network_that_cannot_be_copied_is_refused_and_stays_as_it_is(make, why, ask):
    net = make()
    with pytest.raises(TypeError, match=f"the network cannot be copied: .*{why}"):
        ask(net, torch.rand(2, FEATURES), torch.zeros(2, dtype=torch.long), 0.1)
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
