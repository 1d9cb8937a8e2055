"""What the tests of the bound compare with: brute force by dense matrices, sampling and attack, and networks for it."""

import functools
import itertools
from typing import NamedTuple

import torch
from torch import nn

from local_bound import Bound, propagate
from locallip.bound.layers import ClampGroupSort, Normalize, ReLU_x
from locallip.bound.norms import Bracket
from locallip.bound.power_iteration import PowerIteration

# --- matrices --------------------------------------------------------------------------------------------------------


def norm_of(matrix):
    return torch.linalg.matrix_norm(matrix, ord=2)


def dense_matrix(layer, shape):
    """(outputs, inputs) of the linear part of a layer or a function, applied to (N, *shape)."""
    size = shape.numel()
    basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
    return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T


def masked(matrix, rows, columns):
    """(N, outputs, inputs) for masks (N, ...); None switches nothing off."""
    matrix = matrix if columns is None else matrix * columns.flatten(1)[:, None, :]
    return matrix if rows is None else matrix * rows.flatten(1)[:, :, None]


class ExactNorms(PowerIteration):
    """Norms from singular values, so that certificates are true and the same question has the same answer."""

    def __init__(self):
        super().__init__(1)

    def whole(self, operator):
        norm = norm_of(dense_matrix(operator.apply, operator.input_shape))
        return Bracket(norm, norm)

    def masked(self, operator, rows, columns, whole):
        norm = norm_of(masked(dense_matrix(operator.apply, operator.input_shape), rows, columns))
        return Bracket(norm, norm)


# --- networks and points ---------------------------------------------------------------------------------------------

KINDS = ("relux", "relu", "maxmin", "mixture", "normalized")
EPSILONS = (0.05, 0.4, 2.0)
IMAGES = 4
SAMPLES = 64
CLASSES = 5
MAPS, ENTRIES = (2, 6, 6), (12,)
ACTIVATION_TYPES = (nn.ReLU, ReLU_x, ClampGroupSort)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)


def clipped_relu(*shape):
    layer = ReLU_x(shape)
    nn.init.uniform_(layer.threshold, 0, 0.5)
    return layer


def clipped_maxmin(*shape):
    layer = ClampGroupSort(shape, maxthres=0, minthres=0)
    nn.init.uniform_(layer.max, 0, 0.4)
    nn.init.uniform_(layer.min, -0.4, 0)
    return layer


def relu(*shape):
    return nn.ReLU()


_ACTIVATIONS = {
    "relux": [clipped_relu] * 3,
    "relu": [relu] * 3,
    "maxmin": [clipped_maxmin] * 3,
    "mixture": [clipped_relu, clipped_maxmin, relu],
}


def network(kind):
    """Two convolutions and two dense layers for images (1, 6, 6), in double precision."""
    if kind == "normalized":
        return _normalized_network()
    first, second, third = _ACTIVATIONS[kind]
    layers = [
        *(nn.Conv2d(1, 4, 3, 1, 1), first(4, 6, 6)),
        *(nn.Conv2d(4, 6, 4, 2, 1), second(6, 3, 3)),
        nn.Flatten(),
        *(nn.Linear(54, 12), third(12)),
        nn.Linear(12, CLASSES),
    ]
    return nn.Sequential(*layers).double()


def _normalized_network():
    """With every linear layer that is not a plain convolution or matrix."""
    layers = [
        Normalize([0.3], [0.5]),
        *(nn.Conv2d(1, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.Dropout(), nn.ReLU()),
        nn.AvgPool2d(3, 2, 1),
        nn.Identity(),
        nn.Flatten(),
        *(nn.Linear(36, 12), nn.BatchNorm1d(12), clipped_relu(12)),
        nn.Linear(12, CLASSES),
    ]
    for layer in layers:
        if isinstance(layer, BATCH_NORMS):
            for tensor in (layer.running_mean, layer.bias.data):
                nn.init.uniform_(tensor, -0.2, 0.2)
            for tensor in (layer.running_var, layer.weight.data):
                nn.init.uniform_(tensor, 0.5, 2)
    return nn.Sequential(*layers).double().eval()


def dense_network(*middle):
    """Something between 6 inputs and 8 hidden units."""
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3)).double()


def network_with(layer):
    """A layer between 12 entries and 12 entries."""
    return nn.Sequential(nn.Linear(12, 12), nn.ReLU(), layer, nn.Linear(12, CLASSES)).double()


def settled(*layers):
    """A network in eval mode whose batch normalisations have seen something."""
    model = nn.Sequential(*layers).double().eval()
    for layer in model.modules():
        if isinstance(layer, BATCH_NORMS):
            nn.init.uniform_(layer.running_mean, -0.5, 0.5)
            nn.init.uniform_(layer.running_var, 0.5, 2)
            if layer.affine:
                nn.init.uniform_(layer.weight, -2, 2)
                nn.init.uniform_(layer.bias, -0.5, 0.5)
    return model


def own_network():
    """Every kind of layer in one network."""
    model = settled(
        Normalize([0.3, 0.6], [0.5, 0.25]),
        nn.Sequential(nn.Conv2d(2, 4, 3, padding="same", groups=2), nn.BatchNorm2d(4), nn.ReLU(), nn.AvgPool2d(2)),
        *(nn.Dropout(), nn.Conv2d(4, 6, 2, dilation=2), nn.ReLU(), nn.BatchNorm2d(6), nn.Identity()),
        *(nn.Flatten(), nn.Linear(6, 8), clipped_relu(8), nn.BatchNorm1d(8, affine=False)),
        nn.Linear(8, CLASSES),
    )
    nn.init.normal_(model[-1].weight)  # so much that what the clipping leaves can change every answer
    return model


def images(*shape):
    return torch.rand(IMAGES, *shape, dtype=torch.float64)


def walk(model, x, epsilon, **settings):
    """The bound with norms that have converged."""
    return propagate(model, x, epsilon, PowerIteration(500), **settings)


class Case(NamedTuple):
    """A network, images, their labels, the bound around them, and points (S, N, ...) in the ball."""

    model: nn.Sequential
    x: torch.Tensor
    y: torch.Tensor
    epsilon: float
    bound: Bound
    points: torch.Tensor


@functools.cache
def make_case(kind, epsilon):
    torch.manual_seed(0)
    model, x = network(kind), images(1, 6, 6)
    with torch.no_grad():
        y = model(x).argmax(dim=1)
    return Case(model, x, y, epsilon, walk(model, x, epsilon), points_in_the_ball(model, x, epsilon))


def points_in_the_ball(model, x, epsilon):
    """(S, N, ...): random points inside and on the sphere, and the ends of gradient ascent towards every class."""
    directions = nn.functional.normalize(torch.randn(SAMPLES, *x.shape, dtype=x.dtype).flatten(2), dim=2)
    lengths = torch.rand(SAMPLES, 1, 1, dtype=x.dtype)
    lengths[::2] = 1
    inside = (epsilon * lengths * directions).view(SAMPLES, *x.shape)
    targets = itertools.product(range(model[-1].out_features), (1, -1))
    return x + torch.cat([inside, *(attack(model, x, epsilon, *target) for target in targets)])


def attack(model, x, epsilon, target, sign, steps=8):
    """(steps, N, ...): the displacements on the way up (sign 1) or down (-1) the logit of a class."""
    path = [torch.zeros_like(x)]
    for _ in range(steps):
        step = path[-1].clone().requires_grad_()
        (gradient,) = torch.autograd.grad(model(x + step)[:, target].sum(), step)
        moved = step.detach() + epsilon * sign * nn.functional.normalize(gradient.flatten(1), dim=1).view_as(x)
        length = moved.flatten(1).norm(dim=1).clamp(min=epsilon).view(-1, *[1] * (x.dim() - 1))
        path.append(moved * epsilon / length)
    return torch.stack(path[1:])


def outputs_of(model, points, layers):
    """What the first layers make of all points: (S, N, ...)."""
    with torch.no_grad():
        result = model[:layers](points.flatten(0, 1))
    return result.view(*points.shape[:2], *result.shape[1:])


def assert_ball_and_box_hold(bound, hidden):
    """Points (S, N, H) of the last hidden layer."""
    assert (hidden <= bound.upper + 1e-9).all()
    assert (hidden >= bound.lower - 1e-9).all()
    assert ((hidden - bound.center).norm(dim=2) <= bound.radius * (1 + 1e-6) + 1e-9).all()


def largest_step(direction, lower, upper, radius):
    """max direction . delta with lower <= delta <= upper and ||delta|| <= radius, over the last dimension.

    The maximiser is clip(t direction, lower, upper) with the largest t that the ball allows; bisection finds it.
    """
    low = torch.zeros_like(direction[..., :1])
    high = torch.full_like(low, 1e9)
    for _ in range(200):
        middle = (low + high) / 2
        delta = (middle * direction).clamp(lower, upper)
        inside = delta.norm(dim=-1, keepdim=True) <= radius
        low, high = torch.where(inside, middle, low), torch.where(inside, high, middle)
    return (direction * (low * direction).clamp(lower, upper)).sum(dim=-1)
