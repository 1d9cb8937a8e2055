"""The bound of the dual on whole networks: as the plain loops have it, its gradient, and every layer's inequality."""

import math

import dual_oracle
import numpy as np
import pytest
import torch
from dual_cases import EPSILONS, KINDS, case, output

from local_bound import propagate
from locallip.bound.dual.start import trajectory
from locallip.bound.dual.value import Multipliers, evaluate, gradient, through
from locallip.bound.proven_norms import ProvenNorms


@pytest.mark.parametrize("kind", ["relux", "relu", "maxmin", "mixture"])
@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("pixels", [None, (0.0, 1.0)])
def test_the_batched_bound_is_that_of_the_plain_loops(kind, epsilon, pixels):
    it = case(kind, epsilon, pixels)
    found = evaluate(it.chain, it.slope, it.multipliers)
    for number in range(0, len(it.images), 5):
        layers = [plain_layer(layer, number) for layer in it.chain.hidden]
        ends = None if pixels is None else tuple(flat(end[number]) for end in (it.chain.lo, it.chain.hi))
        expected = dual_oracle.bound(
            layers,
            [flat(layer.center[number]) for layer in it.chain.hidden],
            flat(it.slope[number]),
            float(it.chain.epsilon[number]),
            [flat(g[number]) for g in it.multipliers.g],
            it.multipliers.delta[number].tolist(),
            [flat(c[number]) for c in it.multipliers.c],
            ends,
        )
        assert float(found.value[number]) == pytest.approx(expected, rel=1e-8)


def flat(x):
    return x.detach().flatten().numpy()


def plain_layer(layer, number):
    """A layer of the chain as the oracle takes it."""
    inputs = torch.eye(layer.operator.input_shape.numel(), dtype=torch.float64)
    matrix = layer.operator.apply(inputs.view(-1, *layer.operator.input_shape)).flatten(1).T.numpy()
    size = len(matrix)
    pairs = layer.activation.pairs
    ends = [
        np.full(size, end) if not isinstance(end, torch.Tensor) else flat(end[0])
        for end in (layer.activation.low, layer.activation.high)
    ]
    rows = np.ones(size, dtype=bool) if layer.rows is None else flat(layer.rows[number])
    box = [
        np.full(size, s * math.inf) if end is None else flat(end[number]) for s, end in ((-1, layer.lo), (1, layer.hi))
    ]
    return matrix, "pairs" if pairs else "line", *ends, float(layer.norm[number]), rows, None, *box


def test_the_gradient_is_that_of_the_bound():
    it = case("maxmin", 0.4)
    generator = torch.Generator().manual_seed(0)
    by = gradient(it.chain, it.multipliers, evaluate(it.chain, it.slope, it.multipliers))

    def moved(sign):
        g, delta, c = (list(it.multipliers.g), it.multipliers.delta, list(it.multipliers.c))
        g = [part + sign * 1e-7 * move for part, move in zip(g, moves.g)]
        c = [part + sign * 1e-7 * move for part, move in zip(c, moves.c)]
        delta = delta * torch.exp(sign * 1e-7 * moves.delta)
        return evaluate(it.chain, it.slope, Multipliers(g, delta, c)).value

    def like(x):
        return torch.randn(x.shape, generator=generator, dtype=torch.float64) * x.abs().mean()

    moves = Multipliers([like(x) for x in by.g], like(by.delta), [like(x) for x in it.multipliers.c])
    masks = it.chain.reference_masks()
    moves.c = [x if mask is None else torch.where(mask, x, 0) for x, mask in zip(moves.c, masks)]
    expected = (moved(1) - moved(-1)) / 2e-7
    parts = [(x * y).flatten(1).sum(dim=1) for x, y in zip((*by.g, *by.c), (*moves.g, *moves.c))]
    slope = sum(parts) + (by.delta * moves.delta).sum(dim=1)
    assert torch.allclose(slope, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_inequality_of_every_layer_holds_on_points(kind):
    it = case(kind, 0.4)
    t = evaluate(it.chain, it.slope, it.multipliers).t
    for step in it.points().unbind(dim=1)[::20]:
        steps, changes = trajectory(it.chain, step)
        for number, layer in enumerate(it.chain.hidden):
            moved = changes[number] - it.multipliers.c[number]
            rest = steps[number] - t[number]
            rest = rest if layer.rows is None else torch.where(layer.rows, rest, 0)
            assert (rest.flatten(1).norm(dim=1) <= layer.norm * moved.flatten(1).norm(dim=1) * (1 + 1e-9) + 1e-12).all()


def test_masks_eliminate_something_in_these_cases():
    assert any((~layer.columns).any() for layer in case("relux", 0.05).chain.hidden)
    assert any((~layer.columns).any() for layer in case("maxmin", 0.05).chain.hidden)


def test_the_chain_is_the_network():
    it = case("mixture", 0.4)
    assert torch.allclose(output(it.images_chain, it.x), it.model(it.x), rtol=1e-12)
    with torch.no_grad():
        bound = propagate(it.model, it.x, 0.4, ProvenNorms(1e-6, 1000, steps=200, seed=0))
    for layer, norm in zip(it.images_chain.hidden, bound.local_norms.values()):
        assert torch.allclose(layer.norm, norm, rtol=1e-6)
        assert through(layer, torch.zeros(1, *layer.operator.input_shape, dtype=torch.float64)).abs().max() == 0
