"""A whole evaluation: clean, attacked and certified, batch by batch and at radii around epsilon."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from locallip import distributed
from locallip.bound.stages import is_by_dual
from locallip.evaluation.attacks import right
from locallip.evaluation.certificates import Estimate, Proven
from locallip.evaluation.outcome import MULTIPLES, OPEN, Findings, Outcome
from locallip.evaluation.pgd import PGD_CURVE_STEPS, PGD_STEPS, pgd
from locallip.evaluation.plan import Plan, seed_of
from locallip.evaluation.progress import progress
from locallip.evaluation.unfinished import Unfinished
from locallip.images import ImageSet


def evaluate(
    model: nn.Sequential,
    images: ImageSet,
    args: argparse.Namespace,
    certificates: Sequence[Estimate | Proven],
    unfinished: Unfinished | None = None,
) -> list[Findings]:
    """Evaluate a model in eval mode on all images, as `args` say; both on one device. Findings by each certificate.

    Several processes share the batches out among them, and each returns the findings of all.

    unfinished: where batches that are done are kept, and where those of earlier starts are; None: nowhere.
    """
    plan = Plan.of(args, len(images))
    known = {} if unfinished is None else unfinished.read(len(certificates))
    seen = distributed.gather(set(known))
    # Each batch has one process to answer for it: the first that has it on its disk, or the one that works it out.
    found = {place: known[place] for place in known.keys() - set().union(*seen[: distributed.rank()])}
    still_open = [place for place in range(len(plan)) if not any(place in places for places in seen)]
    own = still_open[distributed.rank() :: distributed.processes()]
    done, to_do = (sum(map(plan.size, places)) for places in (known, own))
    with progress(done + to_do, done, quiet=not distributed.is_main()) as advance:
        for place in own:
            x, y, _ = next(images[plan.span(place)].batches(plan.batch_size))
            found[place] = evaluate_batch(model, x, y, args, certificates, place, plan.has_curve(place))
            if unfinished is not None:
                unfinished.keep(place, found[place])
            outcomes = [parts[0].outcome for parts in found.values()]
            certified = sum(outcome.certified.sum() for outcome in outcomes)
            advance(len(x), certified=certified, open=sum(map(Outcome.is_open, outcomes)))
    everything = {place: parts for of_process in distributed.gather(found) for place, parts in of_process.items()}
    in_order = [everything[place] for place in range(len(plan))]
    return [Findings.concatenate(list(of_certificate)) for of_certificate in zip(*in_order)]


def evaluate_batch(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    args: argparse.Namespace,
    certificates: Sequence[Estimate | Proven],
    place: int = 0,
    curve: bool = False,
) -> list[Findings]:
    """Everything about one batch, by each certificate. x: (N, C, H, W), y: (N,).

    place: of the batch in the set, which its random numbers depend on. curve: also at the other radii.
    """
    torch.manual_seed(seed_of(args.seed, place))

    def survives(places: Tensor, multiple: float) -> Tensor:
        steps = PGD_STEPS if multiple == 1 else PGD_CURVE_STEPS
        attacked = pgd(model, x[places], y[places], multiple * args.epsilon, steps)
        with torch.no_grad():
            return right(model(attacked), y[places])

    with torch.no_grad():
        logits = model(x)
    clean = right(logits, y)
    survived = ask(clean, lambda places: survives(places, 1))
    attacked = {
        "label": y.cpu().numpy(),
        "prediction": logits.argmax(dim=1).cpu().numpy(),
        "clean": clean.cpu().numpy(),
        "pgd": survived.cpu().numpy(),
        "pgd_over_radius": over_radius(clean, survived, survives, MULTIPLES, curve),
    }
    fallen = clean & ~survived
    return [_findings(attacked, x, y, fallen, args, certificate, place, curve) for certificate in certificates]


@torch.no_grad()
def _findings(
    attacked: dict[str, np.ndarray],
    x: Tensor,
    y: Tensor,
    fallen: Tensor,
    args: argparse.Namespace,
    certificate: Estimate | Proven,
    place: int,
    curve: bool,
) -> Findings:
    def certifies(places: Tensor, multiple: float, effort: str) -> Tensor:
        return certificate.at(x[places], y[places], multiple * args.epsilon, effort)

    def over(effort: str, at_epsilon: Tensor) -> np.ndarray:
        return over_radius(right_at_x, at_epsilon, partial(certifies, effort=effort), MULTIPLES, curve)

    known = certificate(x, y, fallen, place)
    found = known.columns
    found["certified"] = found["worst_margin"] > 0
    right_at_x = found["margin"] > 0
    by_dual = torch.tensor([is_by_dual(name) for name in known.certified_by], device=x.device)
    by_product = found["certified"] & ~by_dual
    if curve:  # the dual comes before the best norms
        by_product |= ask(found["certified"] & by_dual, partial(certifies, multiple=1, effort="product"))
    curves = {"product_over_radius": over("product", by_product)}
    is_all = certificate.effort == "product"
    curves["certified_over_radius"] = curves["product_over_radius"] if is_all else over("dual", found["certified"])
    columns = {name: column.cpu().numpy() for name, column in found.items()}
    decided_by = _decided_by(known.certified_by, attacked)
    return Findings(Outcome(**attacked, **columns, **curves, decided_by=decided_by), known.counts)


def _decided_by(certified_by: np.ndarray, attacked: dict[str, np.ndarray]) -> np.ndarray:
    undecided = np.where(attacked["clean"], np.where(attacked["pgd"], OPEN, "attack"), "misclassified")
    return np.where(certified_by == "", undecided, certified_by)


def ask(asked: Tensor, answer: Callable[[Tensor], Tensor]) -> Tensor:
    """(N,) bool: what `answer` says of the images asked about, given their places; False for the others."""
    result, places = torch.zeros_like(asked), asked.nonzero().squeeze(1)
    if len(places):
        result[places] = answer(places)
    return result


def over_radius(
    at_zero: Tensor,
    at_epsilon: Tensor,
    answer: Callable[[Tensor, float], Tensor],
    multiples: Sequence[float],
    curve: bool = True,
) -> np.ndarray:
    """For which images `answer` is yes at R rising multiples of epsilon, asked outwards from epsilon: (N, R) 0 or 1.

    What holds in a ball holds in every smaller one, so an image is asked about only where that leaves it open. An
    attack that fails at epsilon is taken to fail at smaller radii.

    at_zero, at_epsilon: (N,) bool, the answers there. curve: False asks nothing and gives NaN.
    """
    if not curve:
        return np.full((len(at_zero), len(multiples)), np.nan)
    columns = {0.0: at_zero, 1.0: at_epsilon}
    inner = outer = at_epsilon
    for m in sorted((m for m in multiples if 0 < m < 1), reverse=True):
        columns[m] = inner = inner | ask(at_zero & ~inner, lambda places, m=m: answer(places, m))
    for m in sorted(m for m in multiples if m > 1):
        columns[m] = outer = ask(outer, lambda places, m=m: answer(places, m))
    return torch.stack([columns[float(m)] for m in multiples], dim=1).double().cpu().numpy()
