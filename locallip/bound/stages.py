"""The stages of a certificate: cheap norms, better norms, and the dual, each asked about what is still open."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from locallip.bound.bound import Bound
from locallip.bound.dual.around import chain_of
from locallip.bound.dual.chain import Chain
from locallip.bound.dual.classes import prove_classes
from locallip.bound.graph import Graph
from locallip.bound.norms import Norms
from locallip.bound.walk import propagate
from locallip.bound.worst_case import worst_logits, worst_margin

# Rounds of pinning at most; they end by themselves when nothing leaves the box any more.
ROUNDS = 1000


@dataclass
class Question:
    """Whether the labels are the answers in the whole balls around N images.

    Attributes:
        graph: the network.
        x: (N, ...) images.
        y: (N,) labels.
        epsilon: (N,) L2 radii in the space of x.
        clip: smallest and largest value of a valid image, if the attacker is bound to them.
    """

    graph: Graph
    x: Tensor
    y: Tensor
    epsilon: Tensor
    clip: tuple[float, float] | None = None

    def take(self, images: Tensor) -> Question:
        """The question about some of the images."""
        return replace(self, x=self.x[images], y=self.y[images], epsilon=self.epsilon[images])


@dataclass
class Carried:
    """What a stage hands on to the next: the chain around N images, and what it knows of every class.

    Attributes:
        chain: None where the dual cannot be asked, or has been.
        margins: (N, K) by how much the label's logit exceeds that of each class in the whole ball; inf at the label.
        besides: (N, K) what a margin may lose by the rounding of the deployed network.
    """

    chain: Chain | None
    margins: Tensor
    besides: Tensor

    def take(self, images: Tensor) -> Carried:
        """What is carried of some of the images."""
        chain = self.chain and self.chain.take(images)
        return Carried(chain, self.margins[images], self.besides[images])


@dataclass
class Answer:
    """What a stage found for N images.

    Attributes:
        columns: by name, (N, ...): `logits`, `worst_margin`, `hidden_lipschitz`, `eliminated_rows` and
            `eliminated_columns`, and `point` of a stage that attacks, as in `proof.Proof`.
        settled: (N,) bool, what no later stage need be asked about.
        global_hidden_lipschitz: scalar; None of a stage that computes none.
        carried: for the next stage; None: nothing.
    """

    columns: dict[str, Tensor]
    settled: Tensor
    global_hidden_lipschitz: Tensor | None = None
    carried: Carried | None = None


class Stage(ABC):
    """One way to answer the question.

    Attributes:
        name: for reports.
        costly: whether it is worth knowing what an attack breaks before it is asked.
    """

    name: str
    costly: bool

    @abstractmethod
    def ask(self, question: Question, carried: Carried | None) -> Answer:
        """Answer. carried: what the stage before handed on about these images."""


@dataclass
class ProductStage(Stage):
    """The product of norms, and the worst case at the last hidden layer.

    Attributes:
        name: see `Stage`.
        norms: see there.
        from_below: whether no lower end is above that of the last stage, so that what fails by them stays so.
        before_dual: whether the dual comes next; what fails by the product is open then.
        masks: whether the norms make use of masks.
        least_gain: by what share the local Lipschitz constant has to be below the global one for the stages behind to
            be asked; what stays open otherwise is settled so.
        costly: see `Stage`.
    """

    name: str
    norms: Norms
    from_below: bool = True
    before_dual: bool = False
    masks: bool = True
    least_gain: float = 0.0
    costly: bool = False

    def ask(self, question: Question, carried: Carried | None) -> Answer:
        x, y, epsilon, clip = question.x, question.y, question.epsilon, question.clip
        bound = propagate(question.graph, x, epsilon, self.norms, clip, keep_layers=self.before_dual)
        worst = worst_logits(bound, y, ROUNDS)
        margin, possible = worst_margin(worst, y), worst_margin(bound.logits, y) > 0
        settled = margin > 0
        if self.from_below and not self.before_dual:
            lowest = replace(bound, radius=epsilon * bound.lowest_hidden_lipschitz)
            settled = settled | ~(worst_margin(worst_logits(lowest, y, ROUNDS), y) > 0)
        if self.least_gain:
            most = (1 - self.least_gain) * bound.global_hidden_lipschitz
            settled = settled | ~(bound.hidden_lipschitz <= most)
        rows, columns = eliminated(bound)
        found = {
            "logits": bound.logits,
            "worst_margin": margin,
            "hidden_lipschitz": bound.hidden_lipschitz,
            "eliminated_rows": rows,
            "eliminated_columns": columns,
        }
        carries = self._carried(bound, worst, question, carried) if self.before_dual else None
        return Answer(found, settled | ~possible, bound.global_hidden_lipschitz, carries)

    def _carried(self, bound: Bound, worst: Tensor, question: Question, before: Carried | None) -> Carried:
        y = question.y[:, None]
        margins = (worst.gather(1, y) - worst).scatter(1, y, torch.inf)
        margins = margins if before is None else best_of(before.margins, margins)
        deployed = bound.deployed_rounding
        deployed = torch.zeros_like(margins) if isinstance(deployed, float) else deployed
        chain = chain_of(bound, question.x, question.epsilon, self.norms, question.clip, self.masks)
        return Carried(chain, margins, (deployed + deployed.gather(1, y)).scatter(1, y, 0))


@dataclass
class DualStage(Stage):
    """The centred dual (see `dual.proof`) for the classes that the product leaves open.

    Attributes:
        name: see `Stage`.
        iterations: of the search for multipliers, at most.
    """

    name: str = "dual"
    iterations: int = 60
    costly: bool = True

    def ask(self, question: Question, carried: Carried | None) -> Answer:
        if carried is None or carried.chain is None:
            return Answer({}, torch.zeros_like(question.y, dtype=torch.bool))
        asked = ~(carried.margins > 0)
        found = prove_classes(carried.chain, question.y, asked, carried.besides, self.iterations)
        margins = best_of(carried.margins, found.margin)
        margin = margins.amin(dim=1)
        return Answer({"worst_margin": margin}, margin > 0, carried=replace(carried, chain=None, margins=margins))


def best_of(margins: Tensor, others: Tensor) -> Tensor:
    """The larger of two lower bounds each; a NaN says nothing about the other."""
    return torch.where(margins.isnan(), others, torch.where(others.isnan(), margins, torch.maximum(margins, others)))


def is_by_dual(name: str) -> bool:
    """Whether a stage of this name is the dual."""
    return name.startswith(DualStage.name)


def comes_before_better_norms(name: str) -> bool:
    """Whether a stage of this name is the dual where the product could still have gone on to better norms."""
    return is_by_dual(name) and name != DualStage.name


def eliminated(bound: Bound) -> tuple[Tensor, Tensor]:
    """Shares (N, L) of the rows and of the columns that the ball switches off, of each of the L local norms."""

    def share(mask: Tensor | None) -> Tensor:
        return torch.zeros_like(bound.radius) if mask is None else (~mask).flatten(1).to(bound.radius.dtype).mean(dim=1)

    if not bound.masks:
        return bound.radius.new_zeros(len(bound.radius), 0), bound.radius.new_zeros(len(bound.radius), 0)
    rows, columns = zip(*bound.masks.values())
    return torch.stack([share(mask) for mask in rows], dim=1), torch.stack([share(mask) for mask in columns], dim=1)
