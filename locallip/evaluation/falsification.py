"""Everything that is tried against the proven certificates of a batch, and how much room it leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from locallip.bound.bound import Bound
from locallip.bound.dual.around import chain_of
from locallip.bound.dual.chain import Chain
from locallip.bound.dual.proof import proven_margin
from locallip.bound.dual.search import Tightest, tighten
from locallip.bound.graph import Graph
from locallip.bound.proof import lanczos_steps, proof_stages, prove
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.stages import ROUNDS, ProductStage
from locallip.bound.walk import propagate
from locallip.bound.worst_case import worst_logits
from locallip.evaluation.attacks import Clip, attack_slopes, descend, is_inside, margins, random_steps

# Images at a time in the search of the dual.
_TOGETHER = 32


@dataclass(frozen=True)
class Trial:
    """What is tried on every certified image.

    Attributes:
        epsilon: L2 radius, above 0.
        restarts: how often descent on the margin starts at a random point of the ball.
        steps: of each descent.
        slope_steps: of the ascent on the slope.
        clip: smallest and largest value of a valid image, if only these count.
    """

    epsilon: float
    restarts: int
    steps: int
    slope_steps: int
    clip: Clip = None


# A column per finding of `falsify`, in the order of the report.
COLUMNS = (
    "image",  # place in the test set
    "label",
    "nearest",  # the wrong class with the largest logit, whose margin the drops are of
    "clean_margin",  # over all wrong classes, at the image
    "worst_margin",  # at least so much in the whole ball, says the certificate
    "attained_margin",  # the smallest one that an attack found
    "attained_drop",  # the largest that an attack found, of the margin over the nearest class
    "product_drop",  # at most so much, by the product
    "dual_drop",  # at most so much, by the dual after all iterations; NaN where there is none
    "product_over_attained",
    "dual_over_attained",
    "local_bound",  # Lipschitz constant up to the last hidden layer
    "global_bound",
    "slope",  # the steepest one found there
    "fallen",
)


def falsify(
    model: nn.Sequential, exact: nn.Sequential, x: Tensor, y: Tensor, norms: ProvenNorms, trial: Trial
) -> dict[str, Tensor]:
    """Attack the certified ones among images x (N, ...): a row (M,) for each of them, by the names in `COLUMNS`.

    Fallen is a certificate where an attack finds a margin below the certified one, a drop above a bound on it, or a
    slope above the Lipschitz constant; each in float64, at a point of the ball.

    model: in the precision in which attacks move. exact: the same in float64. norms: planned for two radii.
    """
    x64 = x.double()
    proof = prove(exact, x64, y, trial.epsilon, norms, trial.clip)
    images = (proof.worst_margin > 0).nonzero().squeeze(1)
    x, x64, y = x[images], x64[images], y[images]
    if not len(images):
        return {}
    target = _Target.around(exact, x64, y, norms, trial)
    with torch.no_grad():
        at_x = margins(exact(x64), y)
    attained, drop = at_x.amin(dim=1), x64.new_zeros(len(x))
    for step in _attempts(model, x, y, target, trial):
        found = _margins_at(exact, x64, y, step, trial)
        attained = torch.minimum(attained, found.amin(dim=1))
        drop = torch.maximum(drop, (at_x - found).gather(1, target.other[:, None]).squeeze(1))
    slope = attack_slopes(exact[:-1], x64, trial.epsilon, trial.slope_steps, trial.clip)
    holds = (attained >= proof.worst_margin[images]) & (slope <= target.bound.hidden_lipschitz)
    holds &= (drop <= target.product) & ~(drop > target.dual)
    return {
        "image": images,
        "label": y,
        "nearest": target.other,
        "clean_margin": at_x.amin(dim=1),
        "worst_margin": proof.worst_margin[images],
        "attained_margin": attained,
        "attained_drop": drop,
        "product_drop": target.product,
        "dual_drop": target.dual,
        "product_over_attained": target.product / drop,
        "dual_over_attained": target.dual / drop,
        "local_bound": target.bound.hidden_lipschitz,
        "global_bound": target.bound.global_hidden_lipschitz.expand(len(x)),
        "slope": slope,
        "fallen": ~holds,
    }


@dataclass
class _Target:
    """What is proven around M images, of the margin over the nearest class `other`.

    Attributes:
        product, dual: (M,) bounds on how far it drops; NaN where the dual cannot be asked.
        steps: from the dual, (M, ...) each, that an attack may start from.
    """

    bound: Bound
    other: Tensor
    product: Tensor
    dual: Tensor
    steps: list[Tensor]

    @classmethod
    @torch.no_grad()
    def around(cls, exact: nn.Sequential, x: Tensor, y: Tensor, norms: ProvenNorms, trial: Trial) -> _Target:
        graph = Graph.of(exact, x)
        stages = proof_stages(graph, x, norms)
        # Those of the proof, but local ones in any case.
        asked = (stage.norms.steps for stage in stages if isinstance(stage, ProductStage))
        steps = max(lanczos_steps(graph, x, norms)[0], *asked)
        norms = norms.with_steps(steps)
        bound = propagate(exact, x, trial.epsilon, norms, trial.clip, keep_layers=True)
        at_x = margins(bound.logits, y)
        clean, other = at_x.min(dim=1)
        worst = margins(worst_logits(bound, y, ROUNDS), y).gather(1, other[:, None]).squeeze(1)
        chain = chain_of(bound, x, torch.full_like(clean, trial.epsilon), norms, trial.clip)
        if chain is None:
            return cls(bound, other, clean - worst, torch.full_like(clean, torch.nan), [])
        margin, steps = _tight(chain, y, other)
        return cls(bound, other, clean - worst, clean - margin, steps)


def _tight(chain: Chain, y: Tensor, other: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The dual's lower bound on f_y - f_other in the ball (M,), and steps (M, ...) to start attacks from."""
    bounds, steps = [], []
    for part in torch.arange(len(y), device=y.device).split(_TOGETHER):
        around, label, wrong = chain.take(part), y[part], other[part]
        found: Tightest = tighten(around, around.weight[wrong] - around.weight[label])
        bounds.append(proven_margin(around, label, wrong, found.multipliers))
        steps.append(found.steps)
    return torch.cat(bounds), [torch.cat(of_all) for of_all in zip(*steps)]


def _attempts(model: nn.Sequential, x: Tensor, y: Tensor, target: _Target, trial: Trial) -> Iterator[Tensor]:
    """Steps (M, ...) from x that attacks end with."""
    epsilon = x.new_full((len(x),), trial.epsilon)
    yield descend(model, x, y, epsilon, None, None, trial.steps, trial.clip)
    for _ in range(trial.restarts):
        yield descend(model, x, y, epsilon, random_steps(x, epsilon), None, trial.steps, trial.clip)
    for start in target.steps:
        yield descend(model, x, y, epsilon, start, target.other, trial.steps, trial.clip)


@torch.no_grad()
def _margins_at(exact: nn.Sequential, x: Tensor, y: Tensor, step: Tensor, trial: Trial) -> Tensor:
    """Margins (M, K) at x + step in float64; inf where that is no point of the ball."""
    point = x + step.double()
    counts = is_inside(x, point, torch.full_like(x.flatten(1)[:, 0], trial.epsilon), trial.clip)
    return torch.where(counts[:, None], margins(exact(point), y), torch.inf)
