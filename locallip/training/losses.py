"""The losses by the names that --loss has for them; a further one is a function in `bound.losses` and a line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from locallip.bound.bound import Bound
from locallip.bound.losses import bcp_loss, cll_loss, emma_loss, gloro_kl_loss, gloro_loss, margin_loss
from locallip.bound.worst_case import class_radii
from locallip.files import InputError


@dataclass(frozen=True)
class Situation:
    """What a loss is made of.

    Attributes:
        bound: around N images.
        worst: (N, K) from `worst_logits`.
        y: (N,) labels.
        epsilon: radius of the bound, pixel space.
        radius: the one that epsilon rises to.
        kappa: weight of the clean loss in BCP loss.
        weight: see `Loss`.
    """

    bound: Bound
    worst: Tensor
    y: Tensor
    epsilon: float | Tensor
    radius: float
    kappa: float | Tensor
    weight: float | None

    @property
    def logits(self) -> Tensor:
        """(N, K) at the images."""
        return self.bound.logits


@dataclass(frozen=True)
class Loss:
    """A loss that training can have.

    Attributes:
        compute: the mean over the images of a situation.
        weight: default of --loss_weight, the number that the loss leaves to choose; None: there is none.
        weight_below: the number has to be smaller than this.
        needs_radius: whether the radius that epsilon rises to must not be 0.
    """

    compute: Callable[[Situation], Tensor]
    weight: float | None = None
    weight_below: float = float("inf")
    needs_radius: bool = False


def _margin(s: Situation) -> Tensor:
    radii = class_radii(s.logits, s.y, s.bound.last, s.bound.hidden_lipschitz)
    return margin_loss(s.logits, radii / s.radius, s.y, s.epsilon / s.radius, s.weight)


def _cll(s: Situation) -> Tensor:
    return cll_loss(s.logits, s.y, s.bound.last, s.bound.hidden_lipschitz, s.epsilon, s.radius, s.weight)


LOSSES = {
    "bcp": Loss(lambda s: bcp_loss(s.logits, s.worst, s.y, s.kappa)),
    "gloro": Loss(lambda s: gloro_loss(s.logits, s.worst, s.y)),
    "gloro-kl": Loss(lambda s: gloro_kl_loss(s.logits, s.worst, s.y, s.weight), weight=1.5),
    "margin": Loss(_margin, weight=66.0, needs_radius=True),
    "cll": Loss(_cll, weight=0.3, weight_below=1.0, needs_radius=True),
    "emma": Loss(lambda s: emma_loss(s.logits, s.worst, s.y)),
}


def choose_weight(name: str, weight: float | None, radius: float) -> float | None:
    """The number that a loss is trained with: `weight`, or its default where that is None.

    radius: the one that epsilon rises to.

    Raises:
        InputError: if the loss has no such number, or the number or the radius is none for it.
    """
    loss = LOSSES[name]
    if loss.needs_radius and radius == 0:
        raise InputError(f"--loss {name} measures by --epsilon_train, which must be greater than 0")
    if weight is None:
        return loss.weight
    if loss.weight is None:
        weighted = ", ".join(name for name, loss in LOSSES.items() if loss.weight is not None)
        raise InputError(f"--loss {name} has no --loss_weight; those that have one are {weighted}")
    if weight >= loss.weight_below:
        raise InputError(f"--loss_weight of --loss {name} must be smaller than {loss.weight_below:g}, got {weight:g}")
    return weight
