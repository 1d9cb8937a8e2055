"""What the tests measure the bound by: brute force in small dimensions, and small random operators and networks."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import nn

from locallip.bound.layers import ReLU_x
from locallip.bound.norms import Arithmetic, Bracket
from locallip.bound.operators import Conv, Dense
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


def masked_matrix(operator, rows, columns):
    """What masks leave of a matrix: (N, outputs, inputs), or (outputs, inputs) without any."""
    matrix = matrix_of(operator)
    matrix = matrix if rows is None else matrix * rows.flatten(1)[:, :, None]
    return matrix if columns is None else matrix * columns.flatten(1)[:, None, :]


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
def convolutions(draw, kernel=None):
    """A small random convolution of any geometry, on images of any size that it can take."""
    sizes, pair = (st.tuples(st.integers(1, high), st.integers(1, high)) for high in (4, 3))
    kernel, stride, dilation = draw(sizes if kernel is None else kernel), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    groups = draw(st.sampled_from([1, 1, 2]))
    # No smaller than what the kernel needs.
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation)]
    sides = [side + draw(st.integers(0, 5)) for side in smallest]
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


# --- networks --------------------------------------------------------------------------------------------------------


def clipped_relu(*shape):
    """Clipped ReLU with random thresholds."""
    layer = ReLU_x(shape)
    nn.init.uniform_(layer.threshold, 0, 0.5)
    return layer


def points_in_the_ball(model, x, epsilon, samples=64, classes=5):
    """(S, N, ...): random points inside and on the sphere, and the ends of gradient ascent towards every class."""
    directions = nn.functional.normalize(torch.randn(samples, *x.shape, dtype=x.dtype).flatten(2), dim=2)
    lengths = torch.rand(samples, 1, 1, dtype=x.dtype)
    lengths[::2] = 1
    inside = (epsilon * lengths * directions).view(samples, *x.shape)
    return x + torch.cat([inside, *(attack(model, x, epsilon, c, s) for c in range(classes) for s in (1, -1))])


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
