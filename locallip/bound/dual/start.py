"""A first guess of the multipliers: the end of a targeted attack and the gradient there."""

from __future__ import annotations

import torch
from torch import Tensor

from locallip.bound.dual.chain import Chain
from locallip.bound.dual.value import Multipliers, back, through
from locallip.bound.tensors import masked, norm, per_image

# How the free part of the penalty is shared out: every layer gets so many times what the one before it gets.
_GROWTH = 1.7
# Of what the attack's own penalty would be, below which the reference costs nothing.
_FREE = 0.9
# The farther a layer is from the input, the smaller the best g and references are beside the attack's: by so much from
# layer to layer. Learned on pairs of three networks; docs/log.md has the figures.
_SHRINKING = {"g": 0.95, "c": 0.9}


def trajectory(chain: Chain, step: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What a step (P, ...) of the input does: steps of all operators' outputs, and changes of input and activations."""
    steps, changes = [], [step]
    for layer in chain.hidden:
        steps.append(through(layer, changes[-1]))
        changes.append(layer.activation.change(layer.center, steps[-1]))
    return steps, changes


def backward(chain: Chain, slope: Tensor, steps: list[Tensor], inputs: Tensor) -> tuple[list[Tensor], Tensor]:
    """Gradients of slope . h before every activation, and at the input; `inputs` is shaped like it."""
    grads, grad = [], slope
    for layer, step in zip(reversed(chain.hidden), reversed(steps)):
        grads.append(layer.activation.backward(layer.center + step, grad.reshape(step.shape)))
        grad = back(layer, grads[-1])
    return grads[::-1], grad.reshape(inputs.shape)


def attack(chain: Chain, slope: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Steps (P, ...) inside the ball that raise slope . h, and by how much they do (P,).

    Every round moves on along the gradient and goes back to the ball; the first takes the gradient's direction itself.
    """
    step, best = torch.zeros_like(chain.x), torch.zeros_like(chain.x)
    most = torch.full_like(chain.epsilon, -torch.inf)
    for number in range(iterations + 1):
        steps, changes = trajectory(chain, step)
        gain = (slope * changes[-1].flatten(1)).sum(dim=1)
        better = gain > most
        best, most = torch.where(per_image(better, step), step, best), torch.where(better, gain, most)
        if number == iterations:
            return best, most
        _, grad = backward(chain, slope, steps, step)
        stuck = norm(grad) == 0
        if stuck.any():
            grad = torch.where(per_image(stuck, grad), _linear_gradient(chain, slope, step), grad)
        length = 2 * chain.epsilon * (1 - number / iterations) ** 1.5
        step = _inside(chain, step + grad * per_image(length / norm(grad).clamp(min=1e-30), grad))
    return best, most


def _linear_gradient(chain: Chain, slope: Tensor, inputs: Tensor) -> Tensor:
    """The gradient that would be if activations did nothing: a way off a plateau."""
    grad = slope
    for layer in reversed(chain.hidden):
        grad = layer.operator.adjoint(grad.reshape(-1, *layer.operator.output_shape))
    return grad.reshape(inputs.shape)


def _inside(chain: Chain, step: Tensor) -> Tensor:
    if chain.lo is not None:
        step = torch.minimum(torch.maximum(step, chain.lo), chain.hi)
    scale = (chain.epsilon / norm(step).clamp(min=1e-30)).clamp(max=1)
    return step * per_image(scale, step)


def first_guess(chain: Chain, slope: Tensor, step: Tensor) -> Multipliers:
    """Multipliers from the end point of an attack: its trajectory, the gradient there, and shares of the penalty."""
    steps, changes = trajectory(chain, step)
    g, at_input = backward(chain, slope, steps, step)
    g = [masked(x, layer.rows) * _SHRINKING["g"] ** place for place, (x, layer) in enumerate(zip(g, chain.hidden))]
    masks = chain.reference_masks()
    c = [masked(x, mask) * _SHRINKING["c"] ** place for place, (x, mask) in enumerate(zip(changes, masks))]
    shares = torch.tensor([_GROWTH**number for number in range(len(g))], dtype=slope.dtype, device=slope.device)
    norms = torch.stack([layer.norm for layer in chain.hidden], dim=1).clamp(min=1e-3)
    free = _FREE * norm(at_input).clamp(min=1e-6) / chain.epsilon
    delta = free[:, None] * shares / shares.sum() / norms.cumprod(dim=1) ** 2
    return Multipliers(g, delta, c)
