"""The attack of the paper on the label, as advertorch has it."""

from __future__ import annotations

from torch import Tensor, nn

from locallip.dependencies import l2_pgd_attack

PGD_STEPS = 100
# At the other radii of the picture; fewer steps can only make PGD look weaker, never a certificate look true.
PGD_CURVE_STEPS = 25


def pgd(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float, steps: int = PGD_STEPS) -> Tensor:
    """The attack of the paper: steps of epsilon / 4 from a random point of the ball, inside [0, 1]."""
    if epsilon == 0:
        return x
    x = x.contiguous()  # advertorch flattens what it is given in this order only
    cross_entropy = nn.CrossEntropyLoss(reduction="sum")
    attack = l2_pgd_attack()(model, cross_entropy, epsilon, steps, epsilon / 4, True, 0.0, 1.0)
    point = attack.perturb(x, y)
    # The attack rounds after it has projected; a hair outside of the ball would prove nothing.
    step = (point - x).flatten(1)
    scale = (epsilon * (1 - 1e-6) / step.norm(dim=1).clamp(min=1e-30)).clamp(max=1)
    return x + (step * scale[:, None]).view_as(x)
