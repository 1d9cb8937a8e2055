"""The function that is certified is the function that the user calls, or there is no certificate."""

import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracles import CLASSES, IMAGES, images, settled
from torch import nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrizations, prune

from local_bound import certified_radius, certify, local_lipschitz, propagate, prove, proven_norms
from locallip.bound.power_iteration import PowerIteration


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


class Net(nn.Module):
    """A network that has to be run to be read."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last = nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.last(self.act(self.first(x)))


def chain():
    return settled(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def of_the_users():
    return Net().double().eval()


@pytest.fixture(params=[chain, of_the_users])
def model(request):
    return request.param()


def _prove(model, x):
    return prove(model, x, torch.zeros(len(x), dtype=torch.long), 0.1, proven_norms(model, x, len(x)))


PUBLIC = {
    "local_lipschitz": lambda model, x: local_lipschitz(model, x, 0.1),
    "certify": lambda model, x: certify(model, x, torch.zeros(IMAGES, dtype=torch.long), 0.1),
    "certified_radius": certified_radius,
    "estimate": functools.partial(certified_radius, certificate="estimate"),
    "propagate": lambda model, x: propagate(model, x, 0.1, PowerIteration(1)),
    "prove": _prove,
}


@pytest.fixture(params=PUBLIC)
def ask(request):
    return PUBLIC[request.param]


def parts(model):
    return [module for module in model.modules() if not list(module.children())]


def twice(*values):
    return 2 * values[-1]


def refused(ask, model, words):
    with pytest.raises((TypeError, ValueError), match=words) as error:
        ask(model, images(6))
    assert "\n" not in str(error.value)


HOOKS = {
    "forward": lambda module: module.register_forward_hook(twice),
    "forward with arguments by name": lambda module: module.register_forward_hook(
        lambda module, args, kwargs, output: 2 * output, with_kwargs=True
    ),
    "before": lambda module: module.register_forward_pre_hook(lambda module, args: twice(*args)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("place", ["the network", "a layer", "the last layer"])
def test_hooks_are_refused(model, kind, place):
    module = {"the network": model, "a layer": parts(model)[1], "the last layer": parts(model)[-1]}[place]
    HOOKS[kind](module)
    refused(PUBLIC["certify"], model, f"(?i){'network' if place == 'the network' else type(module).__name__}.*hook")


def test_hooks_are_refused_by_every_function(ask, model):
    parts(model)[1].register_forward_hook(twice)
    refused(ask, model, r"ReLU at position (1|act).*hooks.*remove")


@pytest.mark.parametrize(
    "register", [hooks_of_all.register_module_forward_hook, hooks_of_all.register_module_forward_pre_hook]
)
def test_hooks_on_all_modules_are_refused(ask, model, register):
    handle = register(lambda module, *rest: None)
    try:
        refused(ask, model, "hooks on all modules")
    finally:
        handle.remove()
    ask(model, images(6))


def test_reading_leaves_no_hook_behind():
    with pytest.raises(TypeError):
        certify(settled(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 3)), images(6), torch.zeros(4).long(), 0.1)
    assert not hooks_of_all._global_forward_hooks
    assert not hooks_of_all._global_forward_pre_hooks


def test_backward_hooks_change_no_value_and_do_not_matter(model):
    parts(model)[0].register_full_backward_hook(lambda module, inputs, outputs: None)
    assert local_lipschitz(model, images(6), 0.1).lipschitz.isfinite().all()


def test_a_replaced_forward_is_refused(ask, model):
    layer = parts(model)[1]
    layer.forward = lambda x: 2 * F.relu(x)
    refused(ask, model, r"ReLU at position (1|act).*forward")


@pytest.mark.parametrize("method", ["_call_impl", "_wrapped_call_impl", "_conv_forward"])
def test_a_replaced_method_that_a_call_goes_through_is_refused(ask, model, method):
    setattr(parts(model)[1], method, lambda *inputs: -inputs[0])
    refused(ask, model, rf"ReLU at position (1|act) has a {method} of its own")


def test_a_patched_class_is_refused(ask, model, monkeypatch):
    monkeypatch.setattr(nn.ReLU, "forward", lambda self, x: 2 * F.relu(x))
    refused(ask, model, r"ReLU at position (1|act).*replaced")


@pytest.mark.parametrize("method", ["_conv_forward", "_call_impl"])
def test_a_class_whose_call_is_patched_is_refused(method, monkeypatch):
    monkeypatch.setattr(nn.Conv2d, method, lambda self, x, *weights: -x)
    model = settled(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(6, CLASSES))
    with pytest.raises(TypeError, match="Conv2d at position 0: the class's forward has been replaced"):
        certify(model, images(1, 2, 3), torch.zeros(IMAGES, dtype=torch.long), 0.1)


class Unlisted(nn.Module):
    """A network that keeps a layer where PyTorch does not find it."""

    def __init__(self, layer):
        super().__init__()
        self.layers, self.last = [layer.double()], nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.last(self.layers[0](x))


REPLACED = {
    "forward": (lambda layer: setattr(layer, "forward", lambda x: x.abs()), "forward of its own"),
    "forward hook": (lambda layer: layer.register_forward_hook(twice), "forward hooks"),
    "pre-hook": (lambda layer: layer.register_forward_pre_hook(lambda layer, x: (x[0].abs(),)), "forward pre-hook"),
}


@pytest.mark.parametrize("kind", REPLACED)
def test_what_is_replaced_of_a_layer_that_is_not_listed_is_refused_too(ask, kind):
    model = Unlisted(nn.Linear(6, 6)).double().eval()
    replace, words = REPLACED[kind]
    replace(model.layers[0])
    refused(ask, model, words)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(6), nn.Dropout()], ids=lambda layer: type(layer).__name__)
def test_a_layer_that_is_not_listed_and_trains_is_refused_and_learns_nothing(ask, layer):
    layer.train()
    model = Unlisted(layer).double().eval()
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    refused(ask, model, r"in training mode.*nn\.ModuleList")
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_a_patched_function_gives_other_logits_and_is_refused(monkeypatch, model):
    # Where layers look functions up there may be others than in PyTorch's modules, which are compared by themselves.
    patched = {**vars(F), "linear": staticmethod(lambda x, *weights: 1.01 * F.linear(x, *weights))}
    monkeypatch.setattr(torch.nn.modules.linear, "F", type("F", (), patched))
    with pytest.raises(TypeError, match="other logits"):
        certify(model, images(6), torch.zeros(IMAGES, dtype=torch.long), 0.1)


GENERATOR = torch.Generator().manual_seed(0)


def _apart():
    with torch.random.fork_rng():
        return 1e-30 * torch.randn(1).double()


DRIFTING = {
    "chance": lambda net, x: x * (1 + torch.rand(1).double()),
    "earlier calls": lambda net, x: x * (net.__dict__.setdefault("calls", []).append(1) or len(net.calls)),
    "a value of the images that leaves": lambda net, x: x * nn.Parameter(x).detach().mean(),
    "chance whose state is put back": lambda net, x: x + _apart(),
    "a generator of its own": lambda net, x: x - 5.0 * (torch.rand(1, generator=GENERATOR).double() < 1e-9),
    "chance of Python": lambda net, x: x - 5.0 * (random.random() < 1e-9),
    "chance of NumPy": lambda net, x: x - 5.0 * float(np.random.rand() < 1e-9),
    "whether there are gradients": lambda net, x: -x if torch.is_grad_enabled() else x,
}


@pytest.mark.parametrize("kind", DRIFTING)
def test_a_network_that_is_another_at_every_call_is_refused(kind):
    class Drifting(Net):
        def forward(self, x):
            return super().forward(DRIFTING[kind](self, x))

    for ask in ("certify", "estimate", "local_lipschitz"):
        with pytest.raises(TypeError, match=r"random numbers|other logits|no rule|takes a value|from an earlier run"):
            PUBLIC[ask](Drifting().double().eval(), images(6))


def test_training_mode_of_a_network_that_has_to_run_is_refused_before_it_runs(ask):
    class Learning(Net):
        def forward(self, x):
            assert not self.training, "it has run"
            return super().forward(x)

    refused(ask, Learning().double(), r"training mode.*eval\(\)")


def test_training_mode_of_a_part_is_refused(ask):
    model = settled(of_the_users(), nn.Dropout(), nn.Linear(CLASSES, 3))
    model[1].train()
    refused(ask, model, r"Dropout at position 1.*training mode")


WRAPPED = {
    "parametrization": (lambda net: parametrizations.weight_norm(parts(net)[0]), "remove_parametrizations"),
    "orthogonal": (lambda net: parametrizations.orthogonal(parts(net)[0]), "remove_parametrizations"),
    "pruning": (lambda net: prune.l1_unstructured(parts(net)[0], "weight", 0.5), r"prune\.remove"),
    "spectral_norm": (lambda net: nn.utils.spectral_norm(parts(net)[0]), "remove_spectral_norm"),
    "compiled in place": (lambda net: net.compile(), "compile"),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_what_changes_a_layer_from_outside_is_refused_with_its_way_out(ask, model, kind):
    wrap, way_out = WRAPPED[kind]
    wrap(model)
    refused(ask, model, way_out)


OUTSIDE = {
    "compiled": (lambda net: torch.compile(net), "_orig_mod"),
    "parallel": (lambda net: nn.DataParallel(net), r"\.module"),
    "TorchScript": (lambda net: torch.jit.trace(net, images(6)), "TorchScript"),
}


@pytest.mark.parametrize("kind", OUTSIDE)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_wrapped_network_is_refused_with_its_way_out(ask, model, kind):
    wrap, way_out = OUTSIDE[kind]
    refused(ask, wrap(model), way_out)


def test_a_lazy_layer_is_refused_until_it_has_run(ask):
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, CLASSES)).double().eval()
    refused(ask, model, "(no weights|no shape) yet.*(run|call) the network.*once")
    model(images(6))
    ask(model, images(6))


def test_a_chain_of_wrappers_is_gone_once_it_is_removed(model):
    layer = parts(model)[0]
    prune.l1_unstructured(layer, "weight", 0.5)
    prune.remove(layer, "weight")
    parametrizations.weight_norm(layer)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert local_lipschitz(model, images(6), 0.1).lipschitz.isfinite().all()


def test_an_in_place_layer_at_the_start_leaves_the_images_alone(ask):
    for model in (settled(nn.ReLU(inplace=True), nn.Linear(6, 3)), settled(nn.Hardtanh(inplace=True), Net())):
        x = images(6) - 0.5
        kept = x.clone()
        ask(model, x)
        assert torch.equal(x, kept)
