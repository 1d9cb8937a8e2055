"""Nets whose worst case is known exactly: no bound is below it, at any scale of the weights."""

import itertools
import math

import pytest
import torch
from oracles import CLASSES, clipped_maxmin, clipped_relu, linear_net, relu
from torch import nn

from locallip.bound.certificates import certify, local_lipschitz
from locallip.bound.proof import EFFORTS, prove, proven_norms
from locallip.verification import verify

SCALES = [1e-12, 1e-6, 1.0, 1e6, 1e12]
EPSILONS = [1e-3, 0.1, 1.0]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def proven_margin(model, x, y, epsilon, effort):
    """The lower bound (N,) on the margin in the ball."""
    return prove(model, x, y, epsilon, proven_norms(model, x, len(x), seed=0), effort=effort).worst_margin


def answers(model, x):
    return model(x).argmax(dim=1).detach()


def margin_of(logits, y):
    """By how much the label's logit exceeds every other: (...), from (..., K); y of one shape with the rest."""
    label = y[..., None]
    return (logits.gather(-1, label) - logits.scatter(-1, label, -torch.inf).amax(dim=-1, keepdim=True)).squeeze(-1)


# --- linear ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("epsilon", EPSILONS)
def test_the_worst_margin_of_a_linear_net_is_attained_but_for_rounding(effort, scale, epsilon):
    weight, bias = scale * torch.randn(CLASSES, 7).double(), scale * torch.randn(CLASSES).double()
    model, x = linear_net((weight, bias)), torch.rand(20, 7).double()
    y = answers(model, x)
    logits, slopes = model(x), (weight[:, None] - weight).norm(dim=2)  # (K, K)
    drops = logits.gather(1, y[:, None]) - logits - epsilon * slopes[y]
    truth = drops.scatter(1, y[:, None], torch.inf).amin(dim=1)
    found = proven_margin(model, x, y, epsilon, effort)
    assert (found < truth).all()
    torch.testing.assert_close(found, truth, rtol=0, atol=3e-6 * scale * max(1, epsilon) * 10)
    assert local_lipschitz(model, x, epsilon).lipschitz.max() <= torch.linalg.matrix_norm(weight, ord=2) * (1 + 1e-9)


# --- one neuron ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("activation", [relu, clipped_relu])
def test_the_worst_margin_of_one_neuron_is_at_an_end_of_what_it_can_see(effort, scale, epsilon, activation):
    model = nn.Sequential(nn.Linear(4, 1), activation(1), nn.Linear(1, 2)).double().requires_grad_(False)
    model[0].weight *= scale
    model[0].bias *= scale
    if activation is clipped_relu:
        model[1].threshold *= scale
    x = torch.rand(40, 4).double()
    y = answers(model, x)
    reach = epsilon * model[0].weight.norm()
    seen = torch.stack([model[0](x) + sign * reach for sign in (-1, 1)])  # (2, N, 1)
    truth = margin_of(model[1:](seen), y.expand(2, -1)).amin(dim=0)
    found = proven_margin(model, x, y, epsilon, effort)
    assert (found <= truth).all()
    sure = found > 0
    assert (truth[sure] > 0).all()


def test_one_neuron_that_stays_linear_has_the_true_worst_margin():
    model = nn.Sequential(nn.Linear(4, 1), nn.ReLU(), nn.Linear(1, 2)).double().requires_grad_(False)
    model[0].bias += 10
    x = torch.rand(10, 4).double()
    y = answers(model, x)
    slope = (model[2].weight[0] - model[2].weight[1]).abs() * model[0].weight.norm()
    truth = margin_of(model(x), y) - 0.3 * slope
    torch.testing.assert_close(proven_margin(model, x, y, 0.3, "dual"), truth, rtol=0, atol=1e-5)


# --- two layers: the linear regions in a disk, one by one -------------------------------------------------------------


def kinks(layer, activation):
    """Lines (normal, offset) in the plane across which the activations of a Linear(2, H) change their slope."""
    rows = list(zip(layer.weight, layer.bias))
    if isinstance(activation, nn.ReLU):
        return rows
    if hasattr(activation, "threshold"):
        return rows + [(w, b - t) for (w, b), t in zip(rows, activation.threshold.flatten())]
    half = len(rows) // 2
    lines = []
    for (a, p), (b, q), high, low in zip(rows[:half], rows[half:], activation.max.flatten(), activation.min.flatten()):
        lines += [(a - b, p - q), *((w, o - end) for w, o in ((a, p), (b, q)) for end in (high, low))]
    return lines


def slopes(layer, activation, direction):
    """Every gradient (2,) that direction . activation(layer(x)) can have."""
    weight = layer.weight
    if isinstance(activation, nn.ReLU) or hasattr(activation, "threshold"):
        parts = [(0 * row, d * row) for d, row in zip(direction, weight)]
    else:
        half = len(weight) // 2
        parts = [
            [c * u + d * v for u in (a, b, 0 * a) for v in (a, b, 0 * a)]
            for a, b, c, d in zip(weight[:half], weight[half:], direction[:half], direction[half:])
        ]
    return [sum(choice) for choice in itertools.product(*parts)]


def candidates(model, x, epsilon, y):
    """Points of the disk, among which every margin over a wrong class is smallest.

    Where a function is linear on the pieces of a disk, its minimum is at a corner of a piece, where a line meets the
    circle, or where the circle's tangent is across a gradient.
    """
    first, activation, last = model
    lines = [(w, w @ x + b) for w, b in kinks(first, activation) if w.norm() > 0]
    steps = [torch.zeros(2).double()]
    for w, b in lines:
        foot, left = -b * w / w.square().sum(), epsilon**2 - (b**2 / w.square().sum())
        if left >= 0:
            along = torch.stack([-w[1], w[0]]) / w.norm()
            steps += [foot + sign * left.sqrt() * along for sign in (-1, 1)]
    for (v, a), (w, b) in itertools.combinations(lines, 2):
        matrix = torch.stack([v / v.norm(), w / w.norm()])
        if matrix.det().abs() > 1e-9:
            steps.append(torch.linalg.solve(matrix, -torch.stack([a / v.norm(), b / w.norm()])))
    for other in range(len(last.weight)):
        for slope in slopes(first, activation, last.weight[y] - last.weight[other]):
            if slope.norm() > 0:
                steps.append(-epsilon * slope / slope.norm())
    steps = torch.stack(steps)
    return x + steps[steps.norm(dim=1) <= epsilon * (1 + 1e-12)]


ACTIVATIONS = {"relu": relu, "clipped relu": clipped_relu, "clipped maxmin": clipped_maxmin}


def two_layers(name, scales=(1.0, 1.0)):
    """Two inputs, four hidden units, three classes; scaled so that all scales compute the same but for factors."""
    model = nn.Sequential(nn.Linear(2, 4), ACTIVATIONS[name](4), nn.Linear(4, 3)).double().requires_grad_(False)
    for tensor in (model[0].weight, model[0].bias, *model[1].parameters()):
        tensor *= scales[0]
    model[2].weight *= scales[1]
    model[2].bias *= scales[0] * scales[1]
    return model


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("seed", range(4))
def test_no_bound_is_below_the_worst_of_all_linear_regions(name, seed):
    torch.manual_seed(seed)
    model, x = two_layers(name), 2 * torch.rand(4, 2).double()
    y = answers(model, x)
    for epsilon in (0.05, 0.3, 1.0):
        truth = torch.stack([worst_of_all(model, x[i], y[i], epsilon) for i in range(4)])
        product, dual = (proven_margin(model, x, y, epsilon, effort) for effort in EFFORTS)
        assert (product <= truth).all()
        assert (dual <= truth).all()


def worst_of_all(model, x, y, epsilon):
    points = candidates(model, x, epsilon, y)
    return margin_of(model(points), y.expand(len(points))).min()


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_enumeration_is_no_less_thorough_than_ten_thousand_points(name):
    model, x = two_layers(name), torch.rand(2).double()
    y = answers(model, x[None])[0]
    angle, length = 2 * math.pi * torch.rand(10_000).double(), torch.rand(10_000).double().sqrt()
    points = x + 0.7 * (length * torch.stack([angle.cos(), angle.sin()])).T
    sampled = margin_of(model(points), y.expand(len(points))).min()
    worst = worst_of_all(model, x, y, 0.7)
    assert worst <= sampled
    assert sampled - worst < 0.05 * (margin_of(model(x[None]), y[None])[0] - worst) + 1e-3


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("scales", [(1e-12, 1e12), (1e12, 1e-12), (1e12, 1e12), (1e-12, 1e-12), (1e6, 1e-12)], ids=str)
def test_no_certificate_falls_at_huge_and_tiny_weights(name, scales):
    model, x = two_layers(name, scales), torch.rand(8, 2).double()
    y = answers(model, x)
    certified = 0
    for epsilon in (1e-3, 0.05, 0.3):
        truth = torch.stack([worst_of_all(model, x[i], y[i], epsilon) for i in range(len(x))])
        for effort in EFFORTS:
            sure = certify(model, x, y, epsilon, effort=effort)
            assert (truth[sure] > 0).all()
            assert (proven_margin(model, x, y, epsilon, effort) <= truth).all()
            certified += int(sure.sum())
        assert (truth[verify(model, x, y, epsilon).has("attacked")] < 0).all()
    assert certified > 0


# --- deeper, on a line: every break between linear pieces -------------------------------------------------------------


def breaks(model, left, right):
    """Ends of the intervals, and all places between them where the net of one input is not linear: sorted (B,)."""
    places = torch.tensor([left, right], dtype=torch.float64)
    for position, layer in enumerate(model[:-1]):
        if isinstance(layer, nn.ReLU):
            before = model[:position](places[:, None])  # (B, H), linear between neighbours
            ends = before[:-1], before[1:]
            crosses = ends[0] * ends[1] < 0
            share = torch.where(crosses, ends[0] / (ends[0] - ends[1]), 0)
            gap = (places[1:] - places[:-1])[:, None]
            places = torch.cat([places, (places[:-1, None] + share * gap)[crosses]]).sort().values
    return places


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("scale", SCALES)
def test_no_bound_is_below_the_worst_of_all_pieces_of_a_deep_net_on_a_line(effort, depth, scale):
    sizes = [1, *[4] * depth, 3]
    layers = [
        (torch.randn(n, m).mul(scale ** (number == 0)).tolist(), torch.randn(n).mul(scale).tolist())
        for number, (m, n) in enumerate(itertools.pairwise(sizes))
    ]
    model = deep(layers).requires_grad_(False)
    x = torch.randn(10, 1).double()
    y = answers(model, x)
    for epsilon in (0.01, 0.2):
        found = proven_margin(model, x, y, epsilon, effort)
        for image in range(len(x)):
            places = breaks(model, x[image].item() - epsilon, x[image].item() + epsilon)
            assert found[image] <= margin_of(model(places[:, None]), y[image].expand(len(places))).min()


def deep(layers):
    """Linear layers from their weights and biases, with ReLU between."""
    modules = []
    for weight, bias in layers:
        linear = nn.Linear(len(weight[0]), len(weight)).double()
        linear.weight.data, linear.bias.data = torch.tensor(weight).double(), torch.tensor(bias).double()
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])
