"""Whole networks as people bring them: a right bound for each, and certificates where training has asked for them."""

import pytest
import torch
import torch.nn.functional as F
from oracles import IMAGES, attack, settled
from torch import nn

from local_bound import (
    Graph,
    MaxMin,
    PowerIteration,
    certified_radius,
    certify,
    gloro_logits,
    local_lipschitz,
    propagate,
)
from locallip.dependencies import torchvision_datasets


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def steepest_slope(model, x, epsilon, rounds=3):
    """The largest of the slopes (N,) of the logits that random steps and some along gradients show."""
    slopes = torch.zeros(len(x), dtype=x.dtype)
    step = torch.randn_like(x)
    for _ in range(rounds):
        step = (epsilon * step / step.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).requires_grad_()
        change = (model(x + step) - model(x)).norm(dim=1)
        slopes = torch.maximum(slopes, change.detach() / epsilon)
        (step,) = torch.autograd.grad(change.sum(), step)
    return slopes


# --- networks of torchvision, as they come ---------------------------------------------------------------------------

LAYERS = {"resnet18": 21, "vgg11_bn": 11, "mobilenet_v2": 53, "densenet121": 121}


@pytest.mark.parametrize("name", LAYERS)
def test_a_network_of_torchvision_has_a_finite_bound_that_is_right(name):
    torchvision_datasets()  # lets torchvision import beside any torch
    from torchvision import models

    model, x = getattr(models, name)(num_classes=10).eval(), torch.rand(1, 3, 64, 64)
    # Few iterations are enough, so far from what is attained is a product of so many norms.
    found = local_lipschitz(model, x, 0.05, certificate=PowerIteration(2, local_positions=[]))
    assert found.lipschitz.isfinite().all()
    assert (steepest_slope(model, x, 0.05) <= found.lipschitz).all()
    assert len(found.global_norms) >= LAYERS[name] - 2
    assert not model.training


# --- a residual block, a network in functional style -----------------------------------------------------------------


class WideBlock(nn.Module):
    """Batch normalisation, ReLU and convolution, twice, and a convolution of size 1 beside them (wide ResNet)."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = None if inputs == outputs else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        out = F.relu(self.norm1(x), inplace=True)
        beside = x if self.shortcut is None else self.shortcut(out)
        out = self.conv2(F.dropout(F.relu(self.norm2(self.conv1(out))), 0.3, training=self.training))
        return torch.add(out, beside)


class WideResNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, 1, 1, bias=False)
        self.blocks = nn.Sequential(WideBlock(4, 8, 2), WideBlock(8, 8, 1))
        self.norm, self.fc = nn.BatchNorm2d(8), nn.Linear(8, 10)
        settled(self)

    def forward(self, x):
        x = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.fc(F.avg_pool2d(x, x.shape[-1]).view(-1, 8))


class Functional(nn.Module):
    """As the examples of auto_LiRPA are written."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 4, stride=2, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 4, stride=2, padding=1)
        self.fc1, self.fc2 = nn.Linear(8 * 16, 32), nn.Linear(32, 10)
        settled(self)

    def forward(self, x):
        x = F.relu(self.conv1((x - 0.5) / 0.25))
        x = F.relu(self.conv2(x))
        x = x.view(x.size(0), -1)
        return self.fc2(F.relu(self.fc1(x)))


@pytest.mark.parametrize("kind", [WideResNet, Functional], ids=lambda kind: kind.__name__)
def test_a_network_of_ones_own_gets_a_proven_radius_that_no_attack_breaks(kind):
    model, x = kind(), torch.rand(2, 3, 16, 16, dtype=torch.float64)
    y = model(x).argmax(dim=1)
    radius = certified_radius(model, x, tolerance=1e-3, limit=1e-2, effort="product")
    assert (radius > 0).all()
    for target in range(10):
        for step in attack(model, x, 1.0, target, 1, steps=3):
            moved = x + step * (0.999 * radius / step.flatten(1).norm(dim=1)).view(-1, 1, 1, 1)
            assert (model(moved).argmax(dim=1) == y).all()
    assert (steepest_slope(model, x, 0.01) <= local_lipschitz(model, x, 0.01).lipschitz).all()


# --- a network of affine residual blocks that was trained to be certified --------------------------------------------


class LiResNet(nn.Module):
    """Blocks x + W x, each with MaxMin behind it (as in LiResNet, Hu et al. 2023)."""

    def __init__(self, width=16, blocks=2):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 5, 4, 2)
        self.blocks = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(blocks))
        self.neck, self.fc, self.out = nn.Conv2d(width, 32, 3, 2, 1), nn.Linear(32 * 16, 64), nn.Linear(64, 10)
        self.act = MaxMin()
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                nn.init.orthogonal_(layer.weight)
        for block in self.blocks:
            nn.init.zeros_(block.weight)

    def forward(self, x):
        x = self.act(self.stem(x))
        for block in self.blocks:
            x = self.act(x + block(x))
        return self.out(self.act(self.fc(self.act(self.neck(x)).flatten(1))))


def trained(model, images, labels, epsilon, steps, size=64):
    """By the bound itself, on the ball alone; the network is read once."""
    graph, norms = Graph.of(model, images[:1]), PowerIteration(2)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for step in range(steps):
        batch = torch.randint(len(images), (size,))
        bound = propagate(graph, images[batch], epsilon * min(1, 2 * step / steps), norms, box=False)
        loss = F.cross_entropy(gloro_logits(bound, labels[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


def test_a_trained_net_of_affine_residuals_certifies_most_of_what_its_attack_leaves(digits):
    (x, y, _), (x_test, y_test, _) = (next(iter(digits[train].batches(len(digits[train])))) for train in (True, False))
    model = trained(LiResNet().eval(), x, y, epsilon=0.4, steps=300)
    x_test, y_test, epsilon = x_test[:64], y_test[:64], 0.3
    left = model(x_test).argmax(dim=1) == y_test
    for target in range(10):
        with torch.enable_grad():
            for step in attack(model, x_test, epsilon, target, 1, steps=5):
                left &= model(x_test + step).argmax(dim=1) == y_test
    certified = certify(model, x_test, y_test, epsilon)
    assert not (certified & ~left).any()
    assert left.sum() >= 48
    assert certified.sum() >= 0.85 * left.sum()


# --- orthogonal weights ----------------------------------------------------------------------------------------------


class Orthogonal(nn.Module):
    """MaxMin between orthogonal matrices, written in plain calls but for the activation."""

    def __init__(self, size=8):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(3))
        self.act = MaxMin()
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight)

    def forward(self, x):
        for layer in self.layers[:-1]:
            x = self.act(F.linear(x, layer.weight, layer.bias))
        return F.linear(x, self.layers[-1].weight, self.layers[-1].bias)


def test_where_weights_are_orthogonal_the_radius_is_the_margin_over_the_root_of_two():
    model, x = Orthogonal().double().eval(), torch.rand(IMAGES, 8, dtype=torch.float64)
    first, second = model(x).topk(2, dim=1).values.T
    expected = (first - second) / 2**0.5
    found = certified_radius(model, x, tolerance=1e-6, effort="product")
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=2e-6)
