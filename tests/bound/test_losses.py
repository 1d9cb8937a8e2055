"""The losses, and gradients through the whole bound."""

import pytest
import torch
from oracles import IMAGES, KINDS, images, network, walk
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from local_bound import PowerIteration, bcp_loss, gloro_loss, propagate, worst_logits


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=KINDS)
def model(request, _seed):
    return network(request.param)


def bcp(bound, y, rounds):
    return bcp_loss(bound.logits, worst_logits(bound, y, rounds), y, kappa=0.3)


def gloro(bound, y, rounds):
    return gloro_loss(bound.logits, worst_logits(bound, y, rounds), y)


def assert_finite_gradients(loss, model):
    assert loss.isfinite()
    gradients = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True, retain_graph=True)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_kappa_blends_the_clean_and_the_robust_loss():
    logits, worst, y = torch.randn(IMAGES, 3), torch.randn(IMAGES, 3), torch.tensor([0, 1, 2, 0])
    clean, robust = (nn.functional.cross_entropy(values, y) for values in (logits, worst))
    torch.testing.assert_close(bcp_loss(logits, worst, y, kappa=1), clean)
    torch.testing.assert_close(bcp_loss(logits, worst, y, kappa=0), robust)
    torch.testing.assert_close(bcp_loss(logits, worst, y, kappa=0.25), 0.25 * clean + 0.75 * robust)


@pytest.mark.parametrize("rounds", [1, 1000])
@pytest.mark.parametrize("loss", [bcp, gloro])
def test_gradients_are_those_of_finite_differences(model, loss, rounds):
    x, y = images(1, 6, 6), torch.arange(IMAGES)
    norms = PowerIteration(1000)
    parameters = list(model.parameters())

    def value():
        return loss(propagate(model, x, 0.3, norms), y, rounds)

    def move(direction, length):
        with torch.no_grad():
            for parameter, d in zip(parameters, direction):
                parameter.add_(length * d)

    gradients = torch.autograd.grad(value(), parameters)
    norms.iterations = 200  # from here on the vectors are warm
    for _ in range(3):
        direction = [torch.randn_like(parameter) for parameter in parameters]
        slope = sum((g * d).sum() for g, d in zip(gradients, direction))
        step = 1e-6
        move(direction, step)
        above = value().detach()
        move(direction, -2 * step)
        below = value().detach()
        move(direction, step)
        torch.testing.assert_close(slope, (above - below) / (2 * step), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", [bcp, gloro])
def test_a_dead_layer_has_norm_zero_and_finite_gradients(loss):
    model, x, y = network("relu"), images(1, 6, 6), torch.arange(IMAGES)
    nn.init.constant_(model[2].bias, -100)
    bound = walk(model, x, 0.3)
    assert (bound.local_norms[2] == 0).all()
    assert (bound.hidden_lipschitz == 0).all()
    torch.testing.assert_close(worst_logits(bound, y), bound.logits)
    assert_finite_gradients(loss(bound, y, 1), model)


@pytest.mark.parametrize("loss", [bcp, gloro])
def test_a_ball_of_radius_zero_is_the_image(model, loss):
    y = torch.arange(IMAGES)
    bound = walk(model, images(1, 6, 6), 0)
    torch.testing.assert_close(worst_logits(bound, y, 1000), bound.logits)
    torch.testing.assert_close(bound.lower, bound.upper)
    assert_finite_gradients(loss(bound, y, 1000), model)


@pytest.mark.parametrize("loss", [bcp, gloro])
def test_zero_weights_have_finite_gradients(model, loss):
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    y = torch.arange(IMAGES)
    bound = walk(model, images(1, 6, 6), 0.3)
    assert (bound.global_hidden_lipschitz == 0).all()
    assert (worst_logits(bound, y) == 0).all()
    assert_finite_gradients(loss(bound, y, 10), model)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of entries of any tensor that an operation made."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = (leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in tensors_in(result))
        self.entries = max(self.entries, *sizes, 0)
        return result


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def test_memory_grows_with_the_classes_not_with_their_pairs():
    n, classes, hidden = 8, 200, 64
    model = nn.Sequential(nn.Linear(4, hidden), nn.ReLU(), nn.Linear(hidden, classes))
    y = torch.arange(n)
    with LargestTensor() as largest:
        bound = propagate(model, torch.rand(n, 4), 0.1, PowerIteration(2))
        (bcp(bound, y, 10) + gloro(bound, y, 10)).backward()
    assert largest.entries == n * classes * hidden
