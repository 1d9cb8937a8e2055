"""The dual on networks whose worst case is known."""

import math

import pytest
import torch
from dual_cases import dense_chain, output

from locallip.bound.dual.elementwise import BentLine, ClippedLine
from locallip.bound.dual.pairs import ClippedPairs
from locallip.bound.dual.proof import proven_margin
from locallip.bound.dual.search import search
from locallip.bound.dual.value import evaluate


def test_a_linear_network_is_certified_to_within_a_thousandth():
    torch.manual_seed(0)
    matrices = [torch.randn(6, 6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)]
    weight = torch.randn(2, 6, dtype=torch.float64)
    identity = ClippedLine(-math.inf, math.inf)
    x, epsilon = torch.rand(1, 6, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    chain = dense_chain(matrices, [None, None], [identity] * 2, weight, x, epsilon)
    drop = 0.3 * ((weight[1] - weight[0]) @ matrices[1] @ matrices[0]).norm()
    found = search(chain, weight[1:] - weight[:1], drop.expand(1) * 1.001, iterations=400)
    assert found.done.all()
    assert found.drop == pytest.approx(float(drop), rel=1e-4)
    value = evaluate(chain, weight[1:] - weight[:1], found.multipliers).value
    assert drop <= value <= 1.001 * drop


@pytest.mark.parametrize("center", [-0.1, 0.2, 0.8])
def test_one_neuron_is_certified_to_within_a_hundredth(center):
    """f_0 - f_1 = -h, h a clipped ReLU: it drops by as much as h can rise."""
    one = torch.ones(1, 1, dtype=torch.float64)
    x, epsilon = torch.full((1, 1), center, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
    weight = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    chain = dense_chain([one], [None], [ClippedLine(0.0, one)], weight, x, epsilon)
    drop = min(max(center + 0.3, 0), 1) - min(max(center, 0), 1)
    found = search(chain, weight[1:] - weight[:1], torch.tensor([drop * 1.01]).double(), iterations=400)
    assert found.done.all()
    value = evaluate(chain, weight[1:] - weight[:1], found.multipliers).value
    assert drop - 1e-12 <= float(value) <= drop * 1.01


@pytest.mark.parametrize(
    "act", [ClippedLine(0.0, math.inf), ClippedLine(0.0, 0.4), ClippedPairs(-0.3, 0.3), BentLine(0.1)]
)
@pytest.mark.parametrize("seed", range(4))
def test_two_layers_on_the_plane_are_never_below_the_worst_point_of_a_fine_grid(act, seed):
    torch.manual_seed(seed)
    matrices = [torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64) / 2]
    biases = [torch.randn(4, dtype=torch.float64) / 4 for _ in range(2)]
    weight, x = torch.randn(2, 4, dtype=torch.float64), torch.rand(1, 2, dtype=torch.float64)
    chain = dense_chain(matrices, biases, [act] * 2, weight, x, torch.tensor(0.5, dtype=torch.float64))
    angles, radii = torch.linspace(0, 2 * math.pi, 721).double(), torch.linspace(0, 0.5, 101).double()
    disc = torch.stack([torch.outer(radii, angles.cos()), torch.outer(radii, angles.sin())], dim=2).view(-1, 2)
    logits = output(chain, x + disc)
    margins = logits[:, 0] - logits[:, 1]
    drop = (margins[0] - margins.min()).expand(1)
    slope = weight[1:] - weight[:1]
    found = search(chain, slope, drop * 1.5 + 0.02, iterations=300)
    assert found.bound >= drop * (1 - 1e-5)
    assert found.drop <= drop * (1 + 1e-2) + 1e-6
    if found.done.all():
        proven = proven_margin(chain, torch.tensor([0]), torch.tensor([1]), found.multipliers)
        assert proven <= margins.min()
