import importlib
import sys
from types import ModuleType

import pytest
import torch
from conftest import TINY, spawn
from torch import nn

from locallip import dependencies
from locallip.dependencies import l2_pgd_attack
from locallip.files import InputError

# Run where torchvision's own loading of its compiled operators fails, whatever this machine has.
WITHOUT_OPERATORS = """
import torch
def load_library(path):
    raise OSError("libcudart.so: cannot open shared object file")
torch.ops.load_library = load_library
from locallip import dependencies
print(dependencies.torchvision_datasets().MNIST.__name__)
try:
    torch.ops.torchvision.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)
except NotImplementedError:
    print("nms cannot be called")
"""


def test_data_sets_import_where_the_operators_of_torchvision_cannot_load():
    answer = spawn("-c", WITHOUT_OPERATORS)
    assert answer.code == 0, answer.err
    assert answer.out.splitlines() == ["MNIST", "nms cannot be called"]


@pytest.fixture
def torchvision(monkeypatch):
    """An empty stand-in for the package, and nothing declared yet."""
    module = ModuleType("torchvision")
    monkeypatch.setitem(sys.modules, "torchvision", module)
    monkeypatch.setattr(dependencies, "_declared", [])
    dependencies.torchvision_datasets.cache_clear()
    yield module
    dependencies.torchvision_datasets.cache_clear()


def test_nothing_is_declared_where_torchvision_imports_as_it_is(torchvision):
    torchvision.datasets = object()
    assert dependencies.torchvision_datasets() is torchvision.datasets
    assert dependencies._declared == []


def test_a_failing_import_of_another_kind_is_not_hidden(torchvision):
    def fail(name):
        raise RuntimeError("something else")

    torchvision.__getattr__ = fail
    with pytest.raises(InputError, match=r"cannot import torchvision \(something else\); install"):
        dependencies.torchvision_datasets()
    assert dependencies._declared == []


def test_an_evaluation_without_its_attack_ends_before_any_work(call, saved_net, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "advertorch.attacks", None)  # its import fails
    dependencies.l2_pgd_attack.cache_clear()
    answer = call("evaluate", *TINY, "--saved_model", saved_net, "--out", tmp_path / "report")
    assert answer.code == 2
    assert answer.out == ""
    assert answer.err.startswith("error: cannot import advertorch")
    assert answer.err.count("\n") == 1
    assert not (tmp_path / "report").exists()


@pytest.fixture
def zero_gradients():
    l2_pgd_attack()
    # Not `torch.autograd.gradcheck`, the attribute: that is the function of the same name.
    return importlib.import_module("torch.autograd.gradcheck").zero_gradients


def test_zero_gradients_sets_a_gradient_to_zero_in_place(zero_gradients):
    x = torch.ones(3, requires_grad=True)
    gradient = x.grad = 2 * torch.ones(3, requires_grad=True)
    zero_gradients(x)
    assert x.grad is gradient
    assert not gradient.requires_grad
    assert gradient.tolist() == [0, 0, 0]


def test_zero_gradients_leaves_a_tensor_without_gradient_alone(zero_gradients):
    x = torch.ones(3, requires_grad=True)
    zero_gradients(x)
    assert x.grad is None


@pytest.mark.parametrize("epsilon", [0.01, 0.5, 3.0])
def test_l2_pgd_raises_the_loss_within_ball_and_pixel_range(epsilon):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 3
    loss = nn.CrossEntropyLoss(reduction="sum")
    attacked = l2_pgd_attack()(model, loss, epsilon, 20, epsilon / 4, True, 0.0, 1.0).perturb(x, y)
    assert ((attacked - x).flatten(1).norm(dim=1) <= epsilon * (1 + 1e-5)).all()
    assert attacked.min() >= 0
    assert attacked.max() <= 1
    assert loss(model(attacked), y) > loss(model(x), y)
