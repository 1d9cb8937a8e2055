"""Clean, PGD and certified accuracy of a saved model; `--help` lists the flags."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import report
import utils
from data_load import ImageSet, load_data
from dependencies import L2PGDAttack
from local_bound import Bound, propagate, worst_logits, worst_margin
from report import CERTIFIED_MULTIPLES, PGD_MULTIPLES, Outcome
from spectral_norm import PowerIteration
from utils import InputError

PGD_STEPS = 100
# At the other radii of the picture; fewer steps can only make PGD look weaker, never a certificate look true.
PGD_CURVE_STEPS = 25


def arguments() -> argparse.Namespace:
    parser = utils.ArgumentParser(__doc__)
    utils.add_common_flags(parser, list(utils.MODELS))
    flag = parser.add_argument
    flag("--saved_model", required=True, help="checkpoint file, or the prefix of one (PREFIX_best.pth)")
    epsilon = "L2 radius in pixel space (pixels in [0, 1]); default: the paper's for the data set"
    flag("--epsilon", type=utils.natural_float, help=epsilon)
    flag("--test_sniter", type=utils.positive_int, default=2000, help="power iterations per norm")
    flag("--test_opt_iter", type=utils.positive_int, default=1000, help="rounds of pinning for the worst-case logits")
    flag("--images", type=utils.positive_int, help="evaluate only the first so many test images; default: all")
    flag("--out", help="folder for the report: a CSV row per image, summary.json and pictures")
    args = parser.parse_args()
    if args.epsilon is None:
        args.epsilon = utils.EPSILON[args.data]
    return args


def evaluate(model: nn.Sequential, images: ImageSet, args: argparse.Namespace) -> Outcome:
    """Evaluate a model in eval mode on all images, as `args` say; both on one device."""
    norms = PowerIteration(args.test_sniter, seed=args.seed)
    parts = []
    with tqdm(total=len(images), unit="image", disable=None, dynamic_ncols=True) as bar:
        for x, y, _ in images.batches(args.test_batch_size):
            parts.append(evaluate_batch(model, x, y, norms, args))
            bar.update(len(x))
    return Outcome.concatenate(parts)


def evaluate_batch(
    model: nn.Sequential, x: Tensor, y: Tensor, norms: PowerIteration, args: argparse.Namespace
) -> Outcome:
    """Everything about one batch. x: (N, C, H, W), y: (N,)."""
    attacked = pgd(model, x, y, args.epsilon)
    attacked_curve = [pgd(model, x, y, m * args.epsilon, PGD_CURVE_STEPS) for m in PGD_MULTIPLES if args.out]
    with torch.no_grad():
        norms.iterations, norms.local_vectors = args.test_sniter, {}
        bound = propagate(model, x, args.epsilon, norms)
        worst = worst_margin(worst_logits(bound, y, args.test_opt_iter), y)
        clean = right(bound.logits, y)
        rows, columns = eliminated(bound)
        found = {
            "label": y,
            "prediction": bound.logits.argmax(dim=1),
            "clean": clean,
            "pgd": clean & right(model(attacked), y),
            "certified": worst > 0,
            "margin": worst_margin(bound.logits, y),
            "worst_margin": worst,
            "local_bound": bound.local_lipschitz,
            "global_bound": bound.global_lipschitz.expand(len(x)),
            "global_radius": global_radius(bound, y),
            "eliminated_rows": rows,
            "eliminated_columns": columns,
            "pgd_over_radius": by_column([clean & right(model(point), y) for point in attacked_curve], x),
            "certified_over_radius": certified_over_radius(model, x, y, norms, args),
        }
    return Outcome(**{name: column.cpu().numpy() for name, column in found.items()})


def right(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: the label has the largest logit, and none is NaN."""
    return (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)


def pgd(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float, steps: int = PGD_STEPS) -> Tensor:
    """The attack of the paper: steps of epsilon / 4 from a random point of the ball, inside [0, 1]."""
    if epsilon == 0:
        return x
    cross_entropy = nn.CrossEntropyLoss(reduction="sum")
    return L2PGDAttack(model, cross_entropy, epsilon, steps, epsilon / 4, True, 0.0, 1.0).perturb(x, y)


def global_radius(bound: Bound, y: Tensor) -> Tensor:
    """Radius (N,) up to which the global bound alone certifies: the smallest margin over ||w_y - w_j|| times it."""
    margins = bound.logits.gather(1, y[:, None]) - bound.logits  # (N, K)
    slopes = (bound.last_weight[y].unsqueeze(1) - bound.last_weight).norm(dim=2) * bound.global_lipschitz
    radii = (margins / slopes).scatter(1, y[:, None], torch.inf)
    return radii.amin(dim=1).clamp(min=0)


def eliminated(bound: Bound) -> tuple[Tensor, Tensor]:
    """Shares (N, L) of the rows and of the columns that the ball switches off, of each of the L local norms."""

    def share(mask: Tensor | None) -> Tensor:
        return torch.zeros_like(bound.radius) if mask is None else (~mask).flatten(1).float().mean(dim=1)

    columns, rows = zip(*bound.masks.values())
    return by_column([share(mask) for mask in rows], bound.radius), by_column([share(m) for m in columns], bound.radius)


def certified_over_radius(
    model: nn.Sequential, x: Tensor, y: Tensor, norms: PowerIteration, args: argparse.Namespace
) -> Tensor:
    """(N, R) bool. Goes down from the largest radius; every norm starts from the vectors of the radius before."""
    norms.iterations = max(10, args.test_sniter // 20)
    columns = []
    for multiple in CERTIFIED_MULTIPLES[::-1] if args.out else ():
        bound = propagate(model, x, float(multiple * args.epsilon), norms)
        columns.insert(0, worst_margin(worst_logits(bound, y, args.test_opt_iter), y) > 0)
    return by_column(columns, x)


def by_column(columns: list[Tensor], like: Tensor) -> Tensor:
    """(N, R) from R tensors (N,), also where R is 0."""
    return torch.stack(columns, dim=1) if columns else like.new_zeros(len(like), 0, dtype=torch.bool)


def find_checkpoint(saved_model: str) -> Path:
    """The file of that name, or the best checkpoint of the run with that prefix."""
    for path in (Path(saved_model), Path(saved_model + "_best.pth")):
        if path.is_file():
            return path
    raise InputError(f"no checkpoint: neither {saved_model} nor {saved_model}_best.pth is a file")


def main() -> None:
    args = arguments()
    device = utils.select_device(args.device)
    path = find_checkpoint(args.saved_model)
    model = utils.select_model(args.data, args.model, width=args.width)
    checkpoint = utils.load_checkpoint(path)
    utils.load_weights(model, checkpoint["state_dict"], str(path))
    model.to(device).eval().requires_grad_(False)
    images = load_data(args.data, args.data_dir, train=False).to(device)[: args.images]
    if args.out:
        utils.check_writable(Path(args.out))

    torch.manual_seed(args.seed)
    started = time.perf_counter()
    outcome = evaluate(model, images, args)
    seconds = time.perf_counter() - started
    summary = report.summarize(outcome, args, path, checkpoint.get("arguments"), seconds)
    print(report.as_text(summary))
    if args.out:
        for written in report.write(Path(args.out), outcome, summary):
            print(written)
    broken = np.flatnonzero(outcome.certified & ~outcome.pgd)
    if len(broken):
        print(
            f"BROKEN CERTIFICATE: PGD changed the label of {len(broken)} certified images, {broken[:20].tolist()}. "
            f"The norms are estimates from below; evaluate with more --test_sniter.",
            file=sys.stderr,
        )
        sys.exit(1)


if __name__ == "__main__":
    utils.run_script(main)
