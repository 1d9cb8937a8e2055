"""Attacks: PGD on the label as the paper has it, with restarts on certified images, and ascent on the slope.

No slope ||h(x') - h(x)|| / ||x' - x|| of the last hidden layer h inside a ball can be above a true Lipschitz bound.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from locallip.dependencies import L2PGDAttack

PGD_STEPS = 100
# At the other radii of the picture; fewer steps can only make PGD look weaker, never a certificate look true.
PGD_CURVE_STEPS = 25


def right(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: the label has the largest logit, and none is NaN."""
    return (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)


def pgd(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float, steps: int = PGD_STEPS) -> Tensor:
    """The attack of the paper: steps of epsilon / 4 from a random point of the ball, inside [0, 1]."""
    if epsilon == 0:
        return x
    x = x.contiguous()  # advertorch flattens what it is given in this order only
    cross_entropy = nn.CrossEntropyLoss(reduction="sum")
    point = L2PGDAttack(model, cross_entropy, epsilon, steps, epsilon / 4, True, 0.0, 1.0).perturb(x, y)
    # The attack rounds after it has projected; a hair outside of the ball would prove nothing.
    step = (point - x).flatten(1)
    scale = (epsilon * (1 - 1e-6) / step.norm(dim=1).clamp(min=1e-30)).clamp(max=1)
    return x + (step * scale[:, None]).view_as(x)


def attack_labels(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float, restarts: int) -> Tensor:
    """Whether PGD changes the label, from any of so many random starts: (N,) bool. model and x in one precision."""
    fallen = torch.zeros_like(y, dtype=torch.bool)
    for _ in range(restarts):
        fallen |= ~right(model(pgd(model, x, y, epsilon)), y)
    return fallen


def attack_slopes(hidden: nn.Sequential, x: Tensor, epsilon: float, steps: int) -> Tensor:
    """The steepest slope from x that gradient ascent finds inside the ball: (N,). hidden, x: float64."""
    shape = (-1, *[1] * (x.dim() - 1))
    center = hidden(x)
    step = torch.randn_like(x)
    step = step * (epsilon / 2 / step.flatten(1).norm(dim=1)).view(shape)
    steepest = x.new_zeros(len(x))
    for _ in range(steps):
        step = step.detach().requires_grad_()
        slope = (hidden(x + step) - center).norm(dim=1) / step.flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(slope.sum(), step)
        steepest = torch.maximum(steepest, slope.detach().nan_to_num())
        length = gradient.flatten(1).norm(dim=1).clamp(min=1e-30)
        step = step.detach() + gradient * (epsilon / 5 / length).view(shape)
        step = step * (epsilon / step.flatten(1).norm(dim=1).clamp(min=1e-30)).clamp(max=1).view(shape)
    return steepest
