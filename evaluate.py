"""Clean, PGD and certified accuracy of a saved model; `--help` lists the flags."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import report
import utils
from data_load import load_data
from dependencies import L2PGDAttack
from local_bound import Bound, propagate, worst_logits, worst_margin
from spectral_norm import PowerIteration
from utils import InputError

PGD_STEPS = 100
# The curve over the radius goes to this multiple of epsilon, in so many steps.
CURVE_REACH, CURVE_STEPS = 2.0, 16


def arguments() -> argparse.Namespace:
    parser = utils.ArgumentParser(__doc__)
    utils.add_common_flags(parser, list(utils.MODELS))
    flag = parser.add_argument
    flag("--saved_model", required=True, help="checkpoint file, or the prefix of one (PREFIX_best.pth)")
    flag(
        "--epsilon", type=utils.natural_float, help="L2 radius in pixel space (pixels in [0, 1]); default: the paper's"
    )
    flag("--test_sniter", type=utils.positive_int, default=2000, help="power iterations per norm")
    flag("--test_opt_iter", type=utils.positive_int, default=1000, help="rounds of pinning for the worst-case logits")
    flag("--images", type=utils.positive_int, help="evaluate only the first so many test images")
    flag("--out", help="folder for the per-image CSV and the pictures")
    args = parser.parse_args()
    if args.epsilon is None:
        args.epsilon = utils.EPSILON[args.data]
    return args


@dataclass
class Outcome:
    """What was found for a batch or a whole set of N images; every field is an array (N, ...)."""

    label: np.ndarray
    prediction: np.ndarray
    clean: np.ndarray  # bool: classified right
    pgd: np.ndarray  # bool: still right at the point that PGD found
    certified: np.ndarray  # bool: right in the whole ball, by the bound
    margin: np.ndarray  # label's logit minus the largest other one, at x
    worst_margin: np.ndarray  # the same, bounded over the ball
    local_bound: np.ndarray
    global_bound: np.ndarray
    global_radius: np.ndarray  # radius that the global bound certifies, 0 where x is misclassified
    certified_over_radius: np.ndarray | None  # (N, radii) bool

    @staticmethod
    def concatenate(parts: list[Outcome]) -> Outcome:
        columns = [asdict(part) for part in parts]
        return Outcome(
            **{
                name: None if columns[0][name] is None else np.concatenate([c[name] for c in columns])
                for name in columns[0]
            }
        )


def evaluate_batch(
    model: nn.Sequential,
    x: Tensor,
    y: Tensor,
    norms: PowerIteration,
    args: argparse.Namespace,
    radii: np.ndarray | None,
) -> Outcome:
    """Everything about one batch. x: (N, C, H, W), y: (N,)."""
    attacked = pgd(model, x, y, args.epsilon)
    with torch.no_grad():
        norms.iterations, norms.local_vectors = args.test_sniter, {}
        bound = propagate(model, x, args.epsilon, norms)
        worst = worst_margin(worst_logits(bound, y, args.test_opt_iter), y)
        clean = right(bound.logits, y)
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
        }
        curve = None if radii is None else certified_over_radius(model, x, y, norms, args, radii)
    return Outcome(**{name: column.cpu().numpy() for name, column in found.items()}, certified_over_radius=curve)


def right(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: the label has the largest logit, and none is NaN."""
    return (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)


def pgd(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
    """The attack of the paper: 100 steps of epsilon / 4 from a random point of the ball, inside [0, 1]."""
    if epsilon == 0:
        return x
    cross_entropy = nn.CrossEntropyLoss(reduction="sum")
    attack = L2PGDAttack(model, cross_entropy, epsilon, PGD_STEPS, epsilon / 4, True, 0.0, 1.0)
    return attack.perturb(x, y)


def global_radius(bound: Bound, y: Tensor) -> Tensor:
    """Radius (N,) up to which the global bound alone certifies: the smallest margin over ||w_y - w_j|| times it."""
    margins = bound.logits.gather(1, y[:, None]) - bound.logits  # (N, K)
    slopes = (bound.last_weight[y].unsqueeze(1) - bound.last_weight).norm(dim=2) * bound.global_lipschitz
    radii = (margins / slopes).scatter(1, y[:, None], torch.inf)
    return radii.amin(dim=1).clamp(min=0)


def certified_over_radius(
    model: nn.Sequential, x: Tensor, y: Tensor, norms: PowerIteration, args: argparse.Namespace, radii: np.ndarray
) -> np.ndarray:
    """(N, radii) bool. Goes down from the largest radius; each norm starts from the vectors of the radius before."""
    norms.iterations = max(10, args.test_sniter // 20)
    curve = np.empty((len(x), len(radii)), dtype=bool)
    for column in reversed(range(len(radii))):
        bound = propagate(model, x, float(radii[column]), norms)
        curve[:, column] = (worst_margin(worst_logits(bound, y, args.test_opt_iter), y) > 0).cpu().numpy()
    return curve


def find_checkpoint(saved_model: str) -> Path:
    """The file of that name, or the best checkpoint of the run with that prefix."""
    for path in (Path(saved_model), Path(saved_model + "_best.pth")):
        if path.is_file():
            return path
    raise InputError(f"no checkpoint: neither {saved_model} nor {saved_model}_best.pth is a file")


def print_summary(outcome: Outcome, args: argparse.Namespace) -> None:
    def line(name: str, flags: np.ndarray, how: str) -> None:
        print(f"{name:<10}{flags.mean() * 100:6.2f} % ({flags.sum()}/{len(flags)})  {how}")

    print(f"{args.data}, {len(outcome.label)} test images, epsilon {args.epsilon:.6g} (L2, pixel space)")
    line("clean", outcome.clean, "")
    line("PGD", outcome.pgd, f"{PGD_STEPS} steps of epsilon/4, random start, in [0, 1]")
    line("certified", outcome.certified, f"estimate: norms by {args.test_sniter} power iterations")
    ratio = np.median(outcome.local_bound / outcome.global_bound)
    print(
        f"Lipschitz bound up to the last hidden layer: local {np.median(outcome.local_bound):.4g} (median), "
        f"global {outcome.global_bound[0]:.4g}; local / global {ratio:.3f} (median)"
    )
    unfinite = int(np.isnan(outcome.worst_margin).sum())
    if unfinite:
        print(f"{unfinite} images have a NaN in their bound and count as not certified")


def main() -> None:
    args = arguments()
    device = utils.select_device(args.device)
    path = find_checkpoint(args.saved_model)
    checkpoint = utils.load_checkpoint(path)
    model = utils.select_model(args.data, args.model, width=args.width)
    utils.load_weights(model, checkpoint["state_dict"], str(path))
    model.to(device).eval().requires_grad_(False)
    test_set = load_data(args.data, args.data_dir, train=False).to(device)[: args.images]
    if args.out:
        utils.check_writable(Path(args.out))

    torch.manual_seed(args.seed)
    norms = PowerIteration(args.test_sniter, seed=args.seed)
    radii = np.linspace(0, CURVE_REACH * args.epsilon, CURVE_STEPS + 1) if args.out else None
    parts = []
    with tqdm(total=len(test_set), unit="image", disable=None, dynamic_ncols=True) as bar:
        for x, y, _ in test_set.batches(args.test_batch_size):
            parts.append(evaluate_batch(model, x, y, norms, args, radii))
            bar.update(len(x))
    outcome = Outcome.concatenate(parts)
    print_summary(outcome, args)
    if args.out:
        for written in report.write(Path(args.out), outcome, args.epsilon, radii):
            print(written)

    broken = np.flatnonzero(outcome.certified & ~outcome.pgd)
    if len(broken):
        print(f"BROKEN CERTIFICATE: PGD changed the label of {len(broken)} certified images, index {broken[:20].tolist()}. "
              f"The norms are estimates from below; evaluate with more --test_sniter.", file=sys.stderr)  # fmt: skip
        sys.exit(1)


if __name__ == "__main__":
    utils.run_script(main)
