"""A whole evaluation: clean, attacked and certified, batch by batch and at radii around epsilon."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import distributed
from locallip.evaluation.attacks import PGD_CURVE_STEPS, PGD_STEPS, pgd, right
from locallip.evaluation.certificates import Estimate, Proven
from locallip.evaluation.outcome import CERTIFIED_MULTIPLES, PGD_MULTIPLES, Outcome
from locallip.images import ImageSet


def evaluate(
    model: nn.Sequential, images: ImageSet, args: argparse.Namespace, certificates: Sequence[Estimate | Proven]
) -> list[Outcome]:
    """Evaluate a model in eval mode on all images, as `args` say; both on one device. One outcome per certificate.

    Several processes share the images out among them, and each returns the outcomes of all.
    """
    own, parts, done = distributed.shard(images), [], 0
    quiet = None if distributed.is_main() else True
    with tqdm(total=len(own), unit="image", disable=quiet, dynamic_ncols=True) as bar:
        for x, y, _ in own.batches(args.test_batch_size):
            curve = bool(args.out) and done * distributed.processes() < args.curve_images
            parts.append(evaluate_batch(model, x, y, args, certificates, curve))
            done += len(x)
            bar.update(len(x))
            bar.set_postfix(certificates[0].progress())
    # The parts of the processes one after the other, then every image in its place.
    parts = [part for of_process in distributed.gather(parts) for part in of_process]
    order = np.argsort(np.concatenate(distributed.places(len(images))))
    return [Outcome.concatenate(of_certificate).take(order) for of_certificate in zip(*parts)]


def evaluate_batch(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    args: argparse.Namespace,
    certificates: Sequence[Estimate | Proven],
    curve: bool = False,
) -> list[Outcome]:
    """Everything about one batch, for each certificate. x: (N, C, H, W), y: (N,). curve: also at the other radii."""

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
        "pgd_over_radius": over_radius(clean, survived, survives, PGD_MULTIPLES, curve),
    }
    return [Outcome(**attacked, **_certified(x, y, args, certificate, curve)) for certificate in certificates]


@torch.no_grad()
def _certified(
    x: Tensor, y: Tensor, args: argparse.Namespace, certificate: Estimate | Proven, curve: bool
) -> dict[str, np.ndarray]:
    def certifies(places: Tensor, multiple: float) -> Tensor:
        return certificate.at(x[places], y[places], multiple * args.epsilon)

    found = certificate(x, y)
    found["certified"] = found["worst_margin"] > 0
    known = found["margin"] > 0, found["certified"]
    certified_over_radius = over_radius(*known, certifies, CERTIFIED_MULTIPLES, curve)
    columns = {name: column.cpu().numpy() for name, column in found.items()}
    return columns | {"certified_over_radius": certified_over_radius}


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
