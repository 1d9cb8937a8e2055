"""The attack of the paper on the label, as advertorch has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from locallip.dependencies import l2_pgd_attack
from locallip.evaluation.attacks import inside, margins

PGD_STEPS = 100
# At the other radii of the picture; fewer steps can only make PGD look weaker, never a certificate look true.
PGD_CURVE_STEPS = 25
# Margins at the images up to which cross-entropy is taken of the logits as they are. It has a gradient that shrinks
# with the exponential of the margin, and in float32 none at all beyond a hundred.
_LARGEST_MARGIN = 10.0
# Of the loss, whose gradient advertorch does not stretch to the length of a step where it is shorter than 1e-6; a power
# of two changes no digit of any other.
_WEIGHT = 2.0**30


def pgd(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float, steps: int = PGD_STEPS) -> Tensor:
    """The attack of the paper: steps of epsilon / 4 up the cross-entropy, from a random point of the ball, in [0, 1].

    Where an image has a margin above 10, its logits are divided by what makes that 10: a network does not get harder to
    attack by being multiplied by a large number.
    """
    if epsilon == 0:
        return x
    x = x.contiguous()  # advertorch flattens what it is given in this order only
    with torch.no_grad():
        temperature = (margins(model(x), y).amin(dim=1, keepdim=True) / _LARGEST_MARGIN).clamp(min=1)

    def calibrated(points: Tensor) -> Tensor:
        return model(points) / temperature

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return _WEIGHT * F.cross_entropy(logits, labels, reduction="sum")

    point = l2_pgd_attack()(calibrated, loss, epsilon, steps, epsilon / 4, True, 0.0, 1.0).perturb(x, y)
    # The attack rounds after it has projected; a hair outside of the ball would prove nothing.
    return x + inside(x, point - x, x.new_full((len(x),), epsilon))
