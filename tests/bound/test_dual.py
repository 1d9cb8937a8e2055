"""The centred dual on whole networks: sound, the same as the plain loops, and refused where it would prove nothing."""

import functools
import math
from dataclasses import replace

import dual_oracle
import numpy as np
import pytest
import torch
from torch import nn

from local_bound import propagate
from locallip.bound.dual.around import chain_around as chain_of
from locallip.bound.dual.chain import Chain, Hidden, single
from locallip.bound.dual.elementwise import BentLine, ClippedLine
from locallip.bound.dual.pairs import ClippedPairs
from locallip.bound.dual.proof import proven_margin
from locallip.bound.dual.search import search
from locallip.bound.dual.stage import prove_classes
from locallip.bound.dual.start import attack, first_guess, trajectory
from locallip.bound.dual.value import Multipliers, evaluate, gradient, through
from locallip.bound.layers import ClampGroupSort, ReLU_x
from locallip.bound.operators import Dense
from locallip.bound.proven_norms import ProvenNorms

IMAGES, CLASSES = 4, 5
KINDS = ("relux", "relu", "maxmin", "mixture", "leaky")
EPSILONS = (0.05, 0.4, 2.0)


def relux(*shape):
    layer = ReLU_x(shape)
    nn.init.uniform_(layer.threshold, 0, 0.5)
    return layer


def maxmin(*shape):
    layer = ClampGroupSort(shape, 0, 0)
    nn.init.uniform_(layer.max, 0, 0.4)
    nn.init.uniform_(layer.min, -0.4, 0)
    return layer


def relu(*shape):
    return nn.ReLU()


ACTIVATIONS = {"relux": [relux] * 3, "relu": [relu] * 3, "maxmin": [maxmin] * 3, "mixture": [relux, maxmin, relu]}


def network(kind, scales=(1, 1, 1, 1)):
    first, second, third = ACTIVATIONS["relu" if kind == "leaky" else kind]
    layers = [
        *(nn.Conv2d(1, 4, 3, 1, 1), first(4, 6, 6)),
        *(nn.Conv2d(4, 6, 4, 2, 1), second(6, 3, 3)),
        nn.Flatten(),
        *(nn.Linear(54, 12), third(12)),
        nn.Linear(12, CLASSES),
    ]
    model = nn.Sequential(*layers).double().requires_grad_(False)
    for layer, scale in zip([layer for layer in model if isinstance(layer, nn.Conv2d | nn.Linear)], scales):
        layer.weight *= scale
    return model


def output(chain, x):
    """The logits (S, K) of the chain at points (S, ...)."""
    h = x
    for layer in chain.hidden:
        h = layer.activation(layer.operator.affine(h.reshape(-1, *layer.operator.input_shape)))
    return h.flatten(1) @ chain.weight.T + chain.bias


class Case:
    """A network's chain around images, the questions about it, and multipliers from a short search."""

    def __init__(self, kind, epsilon, pixels=None, scales=(1, 1, 1, 1), iterations=12):
        torch.manual_seed(0)
        self.model, self.epsilon, self.pixels = network(kind, scales), epsilon, pixels
        self.x = torch.rand(IMAGES, 1, 6, 6, dtype=torch.float64)
        # Masks of a walk with masked norms; leaky ReLU is put into the chain of ReLU, whose masks are not its own.
        steps = 0 if kind == "leaky" else 200
        chain = chain_of(self.model, self.x, epsilon, ProvenNorms(1e-6, 1000, steps=steps, seed=0), pixels)
        if kind == "leaky":
            chain = with_leaky(chain)
        self.images_chain = chain
        logits = output(chain, self.x)
        self.y = logits.argmax(dim=1)
        pairs = [(i, k) for i in range(IMAGES) for k in range(CLASSES) if k != self.y[i]]
        self.images, self.other = (torch.tensor(part) for part in zip(*pairs))
        self.chain, self.label = chain.take(self.images), self.y[self.images]
        self.slope = chain.weight[self.other] - chain.weight[self.label]
        self.margin = (logits[self.images, self.label] - logits[self.images, self.other]).double()
        self.multipliers = self.search(iterations)

    def search(self, iterations):
        """Multipliers for all questions, whether done or not."""
        scaled, slope, scale = single(self.chain, self.slope)
        step, _ = attack(scaled, slope, 8)
        found = first_guess(scaled, slope, step)
        for _ in range(iterations):
            by = gradient(scaled, found, evaluate(scaled, slope, found))
            for part, move in zip((*found.g, *found.c), (*by.g, *by.c)):
                rate = 0.05 * part.abs().flatten(1).amax(dim=1) / move.abs().flatten(1).amax(dim=1).clamp(min=1e-20)
                part -= move * rate.view(-1, *[1] * (part.dim() - 1))
            found.delta *= torch.exp(-0.05 * by.delta.sign())
        return found.unscaled(scale)

    def points(self):
        """Steps (S, ...) in the ball around each question's image: many at random, and what attacks find."""
        torch.manual_seed(1)
        random = torch.randn(len(self.images), 200, *self.x.shape[1:], dtype=torch.float64)
        random = random / random.flatten(2).norm(dim=2)[:, :, None, None, None] * self.epsilon
        random = random * torch.rand(1, 200, 1, 1, 1, dtype=torch.float64) ** 0.1
        pushed = torch.stack([attack(self.chain, self.slope, steps)[0] for steps in (1, 3, 10, 40)], dim=1)
        steps = torch.cat([random, pushed], dim=1)
        if self.pixels:
            x = self.chain.x[:, None]
            steps = (x + steps).clamp(*self.pixels) - x
        return steps


def with_leaky(chain):
    """The same chain with leaky ReLU, and centres computed anew."""
    hidden, value = [], chain.x
    for layer in chain.hidden:
        center = layer.operator.affine(value.reshape(-1, *layer.operator.input_shape))
        hidden.append(replace(layer, activation=BentLine(0.1), center=center))
        value = hidden[-1].activation(center)
    return replace(chain, hidden=hidden)


@functools.cache
def case(kind, epsilon, pixels=None):
    return Case(kind, epsilon, pixels)


every_case = pytest.mark.parametrize(
    ("kind", "epsilon", "pixels"),
    [(kind, epsilon, pixels) for kind in KINDS for epsilon in EPSILONS for pixels in (None, (0.0, 1.0))],
)


@every_case
def test_no_point_of_the_ball_takes_more_than_the_proof_allows(kind, epsilon, pixels):
    it = case(kind, epsilon, pixels)
    proven = proven_margin(it.chain, it.label, it.other, it.multipliers)
    steps = it.points()
    for number in range(len(proven)):
        logits = output(it.images_chain, it.chain.x[number] + steps[number])
        attained = logits[:, it.label[number]] - logits[:, it.other[number]]
        assert attained.min() >= proven[number]
    assert proven.isfinite().all()
    assert (proven <= it.margin).all()


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


@pytest.mark.parametrize("kind", ["relux", "maxmin"])
def test_references_outside_the_remaining_columns_are_refused(kind):
    it = case(kind, 0.05)
    number = next(n for n, mask in enumerate(it.chain.reference_masks()) if mask is not None and not mask.all())
    c = [part.clone() for part in it.multipliers.c]
    c[number] = torch.where(it.chain.reference_masks()[number], c[number], 0.1)
    with pytest.raises(ValueError, match="a reference of layer"):
        proven_margin(it.chain, it.label, it.other, replace(it.multipliers, c=c))


def test_multipliers_on_eliminated_rows_are_refused():
    it = case("relux", 0.05)
    number = next(n for n, layer in enumerate(it.chain.hidden) if not layer.rows.all())
    g = [part.clone() for part in it.multipliers.g]
    g[number] = torch.where(it.chain.hidden[number].rows, g[number], 0.1)
    with pytest.raises(ValueError, match="g of layer"):
        proven_margin(it.chain, it.label, it.other, replace(it.multipliers, g=g))


def test_masks_that_the_box_does_not_show_are_refused():
    layer = next(layer for layer in case("relux", 0.4).images_chain.hidden if layer.columns.any())
    box = layer.center - 1, layer.center + 1
    less = torch.zeros_like(layer.columns)
    arguments = layer.operator, layer.activation, layer.center, layer.norm, layer.absolute
    with pytest.raises(ValueError, match="not among the remaining columns"):
        Hidden.around(*arguments, less, less, box)
    with pytest.raises(ValueError, match="need the box"):
        Hidden.around(*arguments, less, less)
    with pytest.raises(ValueError, match="rows are the columns"):
        Hidden.around(*arguments, less, None, box)


@pytest.mark.parametrize("where", ["g", "c", "delta", "center", "norm", "epsilon", "x", "weight"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_proves_nothing(where, value):
    it = case("relux", 0.4)
    chain, multipliers = it.chain.take(torch.arange(2)), it.multipliers.take(torch.arange(2))
    hidden = [replace(layer) for layer in chain.hidden]
    if where in ("g", "c"):
        getattr(multipliers, where)[0].view(2, -1)[:, 0] = value
        if where == "g" and chain.hidden[0].rows is not None:
            multipliers.g[0][...] = torch.where(chain.hidden[0].rows, value, 0)
    elif where == "delta":
        multipliers.delta[:, 1] = value
    elif where in ("center", "norm"):
        hidden[1] = replace(hidden[1], **{where: torch.full_like(getattr(hidden[1], where), value)})
    chain = replace(chain, hidden=hidden)
    if where in ("epsilon", "x", "weight"):
        chain = replace(chain, **{where: torch.full_like(getattr(chain, where), value)})
    proven = proven_margin(chain, it.label[:2], it.other[:2], multipliers)
    assert (proven == -torch.inf).all()


def test_centers_that_are_off_are_paid_for():
    """Those of float32, or worse: the proof measures what they miss and stays true."""
    it = case("relu", 0.4)
    hidden = [
        replace(layer, center=layer.center + 1e-3 * torch.randn_like(layer.center), lo=None, hi=None)
        for layer in it.chain.hidden
    ]
    hidden = [
        replace(layer, rows=None, columns=None, norm=whole.norm) for layer, whole in zip(hidden, whole_norms(it).hidden)
    ]
    chain = replace(it.chain, hidden=hidden)
    off = proven_margin(chain, it.label, it.other, it.multipliers)
    right = proven_margin(whole_norms(it), it.label, it.other, it.multipliers)
    assert (off < right + 0.1).all()
    for number, steps in enumerate(it.points()):
        logits = output(it.images_chain, it.chain.x[number] + steps)
        assert (logits[:, it.label[number]] - logits[:, it.other[number]]).min() >= off[number]


def whole_norms(it):
    chain = chain_of(it.model, it.x, it.epsilon, ProvenNorms(1e-6, 1000, steps=0, seed=0)).take(it.images)
    return chain.without_boxes()


@pytest.mark.parametrize("scales", [(1e-12, 1e4, 1e4, 1e4), (1e6, 1e6, 1e6, 1e6), (1e-8, 1e-8, 1e-8, 1e-8)])
def test_huge_and_tiny_weights_change_nothing_but_the_scale(scales):
    """Without biases and with plain ReLU, a scaled network is the same one up to a factor."""
    torch.manual_seed(0)
    plain = without_biases(network("relu"))
    scaled = without_biases(network("relu"))
    scaled.load_state_dict(plain.state_dict())
    for layer, scale in zip([layer for layer in scaled if hasattr(layer, "weight")], scales):
        layer.weight *= scale
    x = torch.rand(IMAGES, 1, 6, 6, dtype=torch.float64)
    y = plain(x).argmax(dim=1)
    asked = torch.ones(IMAGES, CLASSES, dtype=torch.bool)
    margins = [
        prove_classes(chain_of(model, x, 0.01, ProvenNorms(1e-6, 1000, steps=0, seed=0)), y, asked).margin
        for model in (plain, scaled)
    ]
    assert torch.equal(margins[0] > 0, margins[1] > 0)
    assert (margins[0] > 0).any()


def without_biases(model):
    for layer in model:
        if hasattr(layer, "bias"):
            layer.bias.zero_()
    return model


# --- networks whose worst case is known ------------------------------------------------------------------------------


def dense_chain(matrices, biases, activations, weight, x, epsilon):
    hidden, value = [], x
    for matrix, bias, act in zip(matrices, biases, activations):
        operator = Dense(matrix, bias, 0)
        center, norm = operator.affine(value), torch.linalg.matrix_norm(matrix, ord=2) * (1 + 1e-12)
        absolute = torch.linalg.matrix_norm(matrix.abs(), ord=2) * (1 + 1e-12)
        hidden.append(Hidden.around(operator, act, center, norm, absolute))
        value = act(center)
    return Chain(x, epsilon.expand(len(x)), hidden, weight, weight.new_zeros(len(weight)))


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


# --- search and stage ------------------------------------------------------------------------------------------------


def test_questions_that_leave_early_are_proven_as_the_search_says():
    it = case("maxmin", 0.05)
    found = search(it.chain, it.slope, it.margin, iterations=60)
    done = found.done.nonzero().squeeze(1)
    assert len(done) > 3
    assert len(set(found.iterations[done].tolist())) > 1
    proven = proven_margin(it.chain.take(done), it.label[done], it.other[done], found.multipliers)
    assert (proven > 0).all()


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


def test_the_stage_proves_more_than_the_product_and_only_what_is_asked():
    it = case("maxmin", 0.05)
    asked = torch.ones(IMAGES, CLASSES, dtype=torch.bool)
    asked[0] = False
    answer = prove_classes(it.images_chain, it.y, asked)
    assert (answer.margin[0] == -torch.inf).all()
    assert (answer.margin.gather(1, it.y[:, None]) == -torch.inf).all()
    for number in range(1, IMAGES):
        proven = answer.margin[number] > 0
        least = (it.margin[it.images == number]).min()
        assert proven.sum() == CLASSES - 1 or answer.fallen[number] or least < 1
    besides = torch.full((IMAGES, CLASSES), 1e3, dtype=torch.float64)
    assert not (prove_classes(it.images_chain, it.y, asked, besides).margin > 0).any()


def test_an_image_that_the_attack_breaks_is_reported_with_the_point():
    it = Case("relu", 6.0)
    answer = prove_classes(it.images_chain, it.y, torch.ones(IMAGES, CLASSES, dtype=torch.bool))
    fallen = answer.fallen.nonzero().squeeze(1)
    assert len(fallen)
    assert (answer.step[fallen].flatten(1).norm(dim=1) <= 6.0 * (1 + 1e-5)).all()
    assert (it.model((it.x + answer.step)[fallen]).argmax(dim=1) != it.y[fallen]).all()


def test_the_chain_is_the_network():
    it = case("mixture", 0.4)
    assert torch.allclose(output(it.images_chain, it.x), it.model(it.x), rtol=1e-12)
    with torch.no_grad():
        bound = propagate(it.model, it.x, 0.4, ProvenNorms(1e-6, 1000, steps=200, seed=0))
    for layer, norm in zip(it.images_chain.hidden, bound.local_norms.values()):
        assert torch.allclose(layer.norm, norm, rtol=1e-6)
        assert through(layer, torch.zeros(1, *layer.operator.input_shape, dtype=torch.float64)).abs().max() == 0
