"""Deciding images in stages: cheap norms first, and better ones for the images that are still open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from locallip.bound.bound import Bound
from locallip.bound.graph import Graph
from locallip.bound.norms import Norms
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.walk import propagate
from locallip.bound.worst_case import worst_logits, worst_margin

# Lanczos steps of the stages of a proof.
LANCZOS_STEPS = (0, 25, 75, 250)
# Rounds of pinning at most; they end by themselves when nothing leaves the box any more.
ROUNDS = 1000


@dataclass(frozen=True)
class Stage:
    """One way to get norms, cheaper than that of the stage behind it.

    Attributes:
        name: for reports.
        norms: see there.
        from_above: whether no upper end of their brackets is below that of the last stage, so that what is certified
            stays so.
        from_below: whether no lower end is above that of the last stage, so that what fails by them stays so.
    """

    name: str
    norms: Norms
    from_above: bool = True
    from_below: bool = True


def proof_stages(norms: ProvenNorms) -> list[Stage]:
    """Global norms, then more and more Lanczos steps."""
    names = {steps: f"local, {steps} Lanczos steps" if steps else "global" for steps in LANCZOS_STEPS}
    return [Stage(name, norms.with_steps(steps)) for steps, name in names.items()]


def proven_norms(
    model: nn.Module,
    x: Tensor,
    images: int,
    failure_probability: float = 1e-6,
    radii: int = 1,
    seed: int | None = None,
    deployed: str = "exact",
) -> ProvenNorms:
    """Norms whose budget covers `prove` on so many images, at so many radii each.

    x: (N, ...) images of the network, of which only shape and dtype count. Otherwise see `ProvenNorms`.
    """
    local_stages = sum(steps > 0 for steps in LANCZOS_STEPS)
    planned = images * radii * len(Graph.of(model).operators(x)) * local_stages
    return ProvenNorms(failure_probability, planned, seed=seed, deployed=deployed)


@dataclass
class Proof:
    """What `decide` found for N images.

    Attributes:
        logits: (N, K) at x.
        worst_margin: (N,) by how much the label's logit exceeds every other in the whole ball; certified where > 0.
        hidden_lipschitz: (N,) of the stage that decided, up to the last hidden layer.
        global_hidden_lipschitz: scalar.
        eliminated: two (N, L), the shares of rows and columns that the ball switches off of each local norm.
        decided: number of images that each stage decided; last, how many stayed open to the end.
    """

    logits: Tensor
    worst_margin: Tensor
    hidden_lipschitz: Tensor
    global_hidden_lipschitz: Tensor
    eliminated: tuple[Tensor, Tensor]
    decided: list[int]


@torch.no_grad()
def prove(
    model: nn.Module | Graph,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    norms: ProvenNorms,
    clip: tuple[float, float] | None = None,
) -> Proof:
    """Certify in stages: global norms first, then more and more Lanczos steps for the images that are still open.

    model, x: float64. Arguments and errors otherwise are those of `decide`. norms: see `proven_norms`.
    """
    return decide(proof_stages(norms), model, x, y, epsilon, clip)


@torch.no_grad()
def decide(
    stages: Sequence[Stage],
    model: nn.Module | Graph,
    x: Tensor,
    y: Tensor,
    epsilon: float | Tensor,
    clip: tuple[float, float] | None = None,
) -> Proof:
    """Ask stage by stage whether images are certified, each only about those that are still open.

    An image is decided when its margin is positive, or when it would not be with norms at the lower ends of their
    brackets, or if it is misclassified. Only the first certifies; the others save work. Nothing depends on the defaults
    of the process.

    y: (N,) int64; anything else is a ValueError. Arguments and errors otherwise are those of `propagate`.
    """
    refuse_labels(y, x)
    epsilon = torch.as_tensor(epsilon, dtype=x.dtype, device=x.device).expand(len(x))
    graph = model if isinstance(model, Graph) else Graph.of(model)
    still_open = torch.arange(len(x), device=x.device)
    decided: list[int] = []
    known: list[Tensor] = []
    for stage in stages:
        with torch.autocast(x.device.type, enabled=False):
            bound = propagate(graph, x[still_open], epsilon[still_open], stage.norms, clip)
            margin, best = _margins(bound, y[still_open], epsilon[still_open])
            possible = worst_margin(bound.logits, y[still_open]) > 0
        found = [bound.logits, margin, bound.hidden_lipschitz, *eliminated(bound)]
        known = known or [column.clone() for column in found]
        for every, some in zip(known, found):
            every[still_open] = some
        settled = ((margin > 0) & stage.from_above) | (~(best > 0) & stage.from_below)
        rest = ~settled & possible
        decided.append(int((~rest).sum()))
        still_open = still_open[rest]
        if not len(still_open):
            break
    logits, margin, local, *shares = known
    return Proof(logits, margin, local, bound.global_hidden_lipschitz, tuple(shares), [*decided, len(still_open)])


def refuse_labels(y: Any, x: Tensor) -> None:
    """Refuse labels that are not (N,) int64 for N images, with a ValueError."""
    if y.shape != (len(x),) or y.dtype != torch.int64:
        raise ValueError(f"need one label per image, (N,) int64, got {tuple(y.shape)} {y.dtype} for {len(x)} images")


def _margins(bound: Bound, y: Tensor, epsilon: Tensor) -> tuple[Tensor, Tensor]:
    """The margin in the ball, and that of norms at the lower ends of their brackets, (N,) each."""
    lowest = replace(bound, radius=epsilon * bound.lowest_hidden_lipschitz)
    return tuple(worst_margin(worst_logits(b, y, ROUNDS), y) for b in (bound, lowest))


def eliminated(bound: Bound) -> tuple[Tensor, Tensor]:
    """Shares (N, L) of the rows and of the columns that the ball switches off, of each of the L local norms."""

    def share(mask: Tensor | None) -> Tensor:
        return torch.zeros_like(bound.radius) if mask is None else (~mask).flatten(1).to(bound.radius.dtype).mean(dim=1)

    if not bound.masks:
        return bound.radius.new_zeros(len(bound.radius), 0), bound.radius.new_zeros(len(bound.radius), 0)
    rows, columns = zip(*bound.masks.values())
    return torch.stack([share(mask) for mask in rows], dim=1), torch.stack([share(mask) for mask in columns], dim=1)
