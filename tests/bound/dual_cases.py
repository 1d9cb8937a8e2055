"""Networks with questions about them, and multipliers, for the tests of the dual."""

import functools
from dataclasses import replace

import torch
from torch import nn

from locallip.bound.dual.around import chain_around
from locallip.bound.dual.chain import Chain, Hidden, single
from locallip.bound.dual.elementwise import BentLine
from locallip.bound.dual.start import attack, first_guess
from locallip.bound.dual.value import evaluate, gradient
from locallip.bound.layers import ClampGroupSort, ReLU_x
from locallip.bound.operators import Dense
from locallip.bound.proven_norms import ProvenNorms

IMAGES, CLASSES = 4, 5
EPSILONS = (0.05, 0.4, 2.0)
KINDS = ("relux", "relu", "maxmin", "mixture", "leaky")


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
        chain = chain_around(self.model, self.x, epsilon, ProvenNorms(1e-6, 1000, steps=steps, seed=0), pixels)
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


def whole_norms(it):
    chain = chain_around(it.model, it.x, it.epsilon, ProvenNorms(1e-6, 1000, steps=0, seed=0)).take(it.images)
    return chain.without_boxes()


def without_biases(model):
    for layer in model:
        if hasattr(layer, "bias"):
            layer.bias.zero_()
    return model


def dense_chain(matrices, biases, activations, weight, x, epsilon):
    hidden, value = [], x
    for matrix, bias, act in zip(matrices, biases, activations):
        operator = Dense(matrix, bias, 0)
        center, norm = operator.affine(value), torch.linalg.matrix_norm(matrix, ord=2) * (1 + 1e-12)
        absolute = torch.linalg.matrix_norm(matrix.abs(), ord=2) * (1 + 1e-12)
        hidden.append(Hidden.around(operator, act, center, norm, absolute))
        value = act(center)
    return Chain(x, epsilon.expand(len(x)), hidden, weight, weight.new_zeros(len(weight)))
