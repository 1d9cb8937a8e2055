"""What the tests of the bound compare with: brute force by dense matrices, sampling and attack, and networks for it."""

import functools
import itertools
from typing import NamedTuple

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from local_bound import Bound, propagate
from locallip.bound.layers import ClampGroupSort, Normalize, ReLU_x
from locallip.bound.norms import Arithmetic, Bracket
from locallip.bound.operators import Conv, Dense
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.rounding import FLOAT64

# --- operators and norms ---------------------------------------------------------------------------------------------

# The same examples every time, so that a failure is nobody's bad luck.
examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)
more_examples = settings(examples, max_examples=60)
BATCH = 3
SURELY = 1e-6  # failure probability


def dense_matrix(layer, shape):
    """What is linear in a function of (N, *shape), as a matrix: (outputs, inputs)."""
    size = shape.numel()
    basis = torch.eye(size, dtype=torch.float64).view(size, *shape)
    return (layer(basis) - layer(torch.zeros_like(basis))).flatten(1).T


def matrix_of(operator):
    """(outputs, inputs)"""
    return dense_matrix(operator.apply, operator.input_shape)


def masked(matrix, rows, columns):
    """What masks (N, ...) leave of a matrix: (N, outputs, inputs), or (outputs, inputs) without any."""
    matrix = matrix if rows is None else matrix * rows.flatten(1)[:, :, None]
    return matrix if columns is None else matrix * columns.flatten(1)[:, None, :]


def masked_matrix(operator, rows, columns):
    """What masks leave of an operator, as `masked`."""
    return masked(matrix_of(operator), rows, columns)


def norm_of(matrix):
    """Largest singular value."""
    return torch.linalg.matrix_norm(matrix, ord=2)


def gram_iteration(matrix, rounds=6):
    """||G||_F^(2^-t) after G <- G^T G, t times (Delattre et al. 2023); no eigenvalue or frequency is involved."""
    logarithm, gram = torch.zeros((), dtype=matrix.dtype), matrix
    for _ in range(rounds):
        size = gram.norm().clamp(min=1e-300)
        gram, logarithm = (gram / size).T @ (gram / size), 2 * (logarithm + size.log())
    return ((logarithm + gram.norm().log()) / 2**rounds).exp()  # 0 for a matrix of zeros


class ExactNorms:
    """Norms from singular values: the published walk with true norms, so that certificates are true."""

    local_ball = False
    arithmetic = Arithmetic()

    def whole(self, operator):
        return self.masked(operator, None, None, None)

    def masked(self, operator, rows, columns, whole):
        norm = norm_of(masked_matrix(operator, rows, columns))
        return Bracket(norm, norm)

    def absolute(self, operator):
        return norm_of(matrix_of(operator).abs())


class ExactLocalNorms(ExactNorms):
    """The same on the walk of a proof, whose ball shrinks with the local norms."""

    local_ball = True


class ExactProvenNorms(ExactLocalNorms):
    """The same, and the walk allows for its own rounding in float64."""

    arithmetic = Arithmetic(own=FLOAT64)


def batch(shape, count=BATCH):
    """(N, *shape) of random numbers."""
    return torch.randn(count, *shape, dtype=torch.float64)


def inner(a, b):
    """Inner product for every image: (N,)."""
    return (a * b).flatten(1).sum(dim=1)


@st.composite
def convolutions(draw, kernel=None, dims=2):
    """A small random convolution of any geometry, on images of any size that it can take."""
    sizes, steps, paddings = (st.tuples(*[st.integers(*ends)] * dims) for ends in ((1, 4), (1, 3), (0, 2)))
    kernel, stride, dilation = draw(sizes if kernel is None else kernel), draw(steps), draw(steps)
    padding = draw(paddings)
    groups = draw(st.sampled_from([1, 1, 2]))
    # No smaller than what the kernel needs.
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation)]
    sides = [side + draw(st.integers(0, 5 if dims < 3 else 1)) for side in smallest]
    inputs, outputs = (groups * draw(st.integers(1, 2)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(outputs, inputs // groups, *kernel, dtype=torch.float64)
    bias = torch.randn(outputs, dtype=torch.float64) if draw(st.booleans()) else None
    return Conv(weight, bias, 0, torch.Size([inputs, *sides]), stride, padding, dilation, groups)


@st.composite
def dense_layers(draw):
    """A small random matrix."""
    torch.manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(draw(st.integers(1, 8)), draw(st.integers(1, 8)), dtype=torch.float64)
    return Dense(weight, torch.randn(len(weight), dtype=torch.float64) if draw(st.booleans()) else None, 0)


operators = st.one_of(convolutions(), dense_layers())


@st.composite
def masked_operators(draw):
    """An operator with a mask for its rows and one for its columns; either may be absent, full or empty."""
    operator = draw(operators)
    share = st.sampled_from([None, 0.0, 0.3, 0.7, 1.0])
    rows, columns = (
        None if (kept := draw(share)) is None else torch.rand(BATCH, *shape) < kept
        for shape in (operator.output_shape, operator.input_shape)
    )
    return operator, rows, columns


def with_spectrum(spectrum):
    """A 1x1 convolution on one pixel, which is a matrix, of these singular values; its last input does nothing."""
    size = len(spectrum)
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for _ in range(2))
    matrix = torch.cat([left * spectrum.double() @ right, torch.zeros(size, 1).double()], dim=1)
    return Conv(matrix[:, :, None, None], None, 0, torch.Size([size + 1, 1, 1]))


# --- networks and points ---------------------------------------------------------------------------------------------

KINDS = ("relux", "relu", "maxmin", "mixture", "normalized")
EPSILONS = (0.05, 0.4, 2.0)
IMAGES = 4
SAMPLES = 64
CLASSES = 5
MAPS, ENTRIES, SIGNALS, VOLUMES = (2, 6, 6), (12,), (2, 12), (2, 3, 4, 4)
ACTIVATION_TYPES = (nn.ReLU, ReLU_x, ClampGroupSort)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


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


def linear_net(*layers):
    """Dense layers without activations in float64, from their (weight, bias)."""
    model = nn.Sequential(*(nn.Linear(weight.shape[1], len(weight)) for weight, _ in layers)).double()
    for layer, (weight, bias) in zip(model, layers):
        layer.weight.data, layer.bias.data = weight.double(), bias.double()
    return model.requires_grad_(False)


def stack_of(*layers):
    """A float64 net of 1-input layers with ReLU between, from pairs of weight and bias."""
    modules = []
    for weight, bias in layers:
        linear = nn.Linear(1, len(weight)).double()
        linear.weight.data, linear.bias.data = torch.tensor(weight).double(), torch.tensor(bias).double()
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def train_a_little(model, images, steps=40):
    """A few steps on the digits, enough to be right mostly."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        x, y, _ = next(iter(images[100 * (step % 10) : 100 * (step % 10 + 1)].batches(100)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


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
