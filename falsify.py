"""Try to break proven certificates of a saved model: no attack may succeed. `--help` lists the flags.

Attacks on every certified image, in the whole ball: descent on the margin, from many random points and from where the
dual has its references, and ascent on the slope ||h(x') - h(x)|| / ||x' - x|| of the last hidden layer h, which no
Lipschitz bound may be below. What they attain also shows how tight the bounds are.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

import numpy as np
import torch

import evaluate
from locallip import distributed, flags
from locallip.bound.proof import proven_norms
from locallip.evaluation import pictures
from locallip.evaluation.attacks import ATTACK_STEPS
from locallip.evaluation.certificates import clip_range
from locallip.evaluation.falsification import COLUMNS, Trial, falsify
from locallip.evaluation.progress import progress
from locallip.evaluation.report import refuse_existing
from locallip.files import InputError, check_writable, run_script, write_csv

QUANTILES = (0, 0.1, 0.5, 0.9, 1)


def main() -> None:
    args = arguments()
    distributed.refuse_several()
    if args.epsilon == 0:
        raise InputError("there is nothing to attack at --epsilon 0")
    folder = Path(args.out) if args.out else None
    if folder:
        check_writable(folder)
        refuse_existing(folder / "attacks.csv", args.overwrite)
    model, images, _, _ = evaluate.load(args)
    torch.manual_seed(args.seed)
    exact = copy.deepcopy(model).double()
    plan = exact, images[:1].images / 255.0, len(images), args.failure_probability
    norms = proven_norms(*plan, radii=2, seed=args.certificate_seed)
    print(f"--certificate_seed {norms.seed} --seed {args.seed}")
    trial = Trial(args.epsilon, args.restarts, args.attack_steps, args.slope_steps, clip_range(args))
    parts = {name: [] for name in COLUMNS}
    with progress(len(images)) as advance:
        for x, y, places in images.batches(args.test_batch_size):
            found = falsify(model, exact, x, y, norms, trial)
            if found:
                found["image"] = places[found["image"]]
            for name, column in found.items():
                parts[name].append(column.cpu().numpy())
            advance(len(x), certified=sum(map(len, parts["image"])), fallen=sum(p.sum() for p in parts["fallen"]))
    columns = {name: np.concatenate(part) if part else np.empty(0, bool) for name, part in parts.items()}
    print(as_text(columns, len(images), trial))
    if folder:
        write(columns, args.epsilon, folder)
    if columns["fallen"].any():
        fallen = columns["image"][columns["fallen"]]
        print(
            f"BROKEN CERTIFICATE: proven certificates of {len(fallen)} images fell, {fallen[:20].tolist()}; "
            f"please report this with --certificate_seed {norms.seed} --seed {args.seed}",
            file=sys.stderr,
        )
        sys.exit(1)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = flags.ArgumentParser(__doc__)
    evaluate.add_model_flags(parser)
    flag = parser.add_argument
    flag("--restarts", type=flags.positive_int, default=20, help="random starts of the attack per certified image")
    flag("--attack_steps", type=flags.positive_int, default=ATTACK_STEPS, help="steps of each attack on the margin")
    flag("--slope_steps", type=flags.positive_int, default=100, help="steps of the attack on the Lipschitz bound")
    flag("--clip", action="store_true", help="certify and attack valid images only, with pixels in [0, 1]")
    flag("--out", type=flags.path, help="folder for the CSV row per certified image and the pictures")
    flag("--overwrite", action="store_true", help="replace a report that --out has already")
    return parser.parse_args()


def as_text(columns: dict[str, np.ndarray], images: int, trial: Trial) -> str:
    """What the attacks found, for the terminal. images: how many there were, certified or not."""
    count, fallen = len(columns["image"]), int(columns["fallen"].sum())
    lines = [
        f"{count} of {images} images certified at epsilon {trial.epsilon:.6g}; {trial.restarts} restarts of "
        f"{trial.steps} steps on each",
        f"labels changed: {(columns['attained_margin'] <= 0).sum()}; certificates fallen: {fallen}",
    ]
    if count:
        names = ", ".join(f"{quantile:.0%}" for quantile in QUANTILES)
        lines.append(f"bound on the drop of the margin over the largest that was attained, quantiles {names}:")
        for name in ("product", "dual"):
            values = columns[f"{name}_over_attained"]
            if not np.isnan(values).all():
                # Of entries themselves: one may be infinite.
                quantiles = np.quantile(values, QUANTILES, method="inverted_cdf")
                lines.append(f"  {name}: " + ", ".join(f"{value:.3f}" for value in quantiles))
        lines.append(
            f"medians: steepest slope {np.median(columns['slope']):.4g}, local bound "
            f"{np.median(columns['local_bound']):.4g}, global bound {columns['global_bound'][0]:.4g}; "
            f"slope / local bound {np.median(columns['slope'] / columns['local_bound']):.3f}"
        )
    return "\n".join(lines)


def write(columns: dict[str, np.ndarray], epsilon: float, folder: Path) -> None:
    """Write the row per image and the pictures."""
    rows = [{name: values[i] for name, values in columns.items()} for i in range(len(columns["image"]))]
    write_csv(folder / "attacks.csv", rows, list(columns))
    bounds = columns["global_bound"], columns["local_bound"], columns["slope"]
    over_attained = columns["product_over_attained"], columns["dual_over_attained"]
    for name, draw, what in (
        ("bounds_and_slopes", pictures.bounds_and_slopes, bounds),
        ("bound_over_attained", pictures.bound_over_attained, over_attained),
    ):
        picture = folder / f"{name}.png"
        with pictures.drawing(picture) as axes:
            draw(axes, *what, epsilon)
        print(picture)


if __name__ == "__main__":
    run_script(main)
