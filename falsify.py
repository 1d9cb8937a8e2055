"""Try to break proven certificates of a saved model: no attack may succeed. `--help` lists the flags.

Two attacks on certified images: PGD with restarts on the label, and gradient ascent on the slope
||h(x') - h(x)|| / ||x' - x|| of the last hidden layer h inside the ball, which no Lipschitz bound may be below. The
second also shows how tight the bound is.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import evaluate
from local_bound import propagate, prove
from locallip import distributed, flags
from locallip.bound.proof import LANCZOS_STEPS, proven_norms
from locallip.evaluation import pictures
from locallip.evaluation.attacks import attack_labels, attack_slopes
from locallip.evaluation.report import refuse_existing
from locallip.files import InputError, check_writable, run_script, write_csv


def main() -> None:
    parser = flags.ArgumentParser(__doc__)
    evaluate.add_model_flags(parser)
    flag = parser.add_argument
    flag("--restarts", type=flags.positive_int, default=10, help="random starts of PGD per certified image")
    flag("--slope_steps", type=flags.positive_int, default=100, help="steps of the attack on the bound")
    flag("--out", type=flags.path, help="folder for the CSV row per image and the picture of bounds and slopes")
    flag("--overwrite", action="store_true", help="replace a report that --out has already")
    args = parser.parse_args()
    distributed.refuse_several()
    model, images, _, _ = evaluate.load(args)
    if args.epsilon == 0:
        raise InputError("there is nothing to attack at --epsilon 0")
    if args.out:
        check_writable(Path(args.out))
        refuse_existing(Path(args.out) / "attacks.csv", args.overwrite)
    torch.manual_seed(args.seed)
    exact = copy.deepcopy(model).double()
    norms = proven_norms(exact, images[:1].images / 255.0, len(images), args.failure_probability, radii=2)
    print(f"seed of the certificates: {norms.seed}")
    found = {"local_bound": [], "global_bound": [], "slope": [], "fallen": []}
    with tqdm(total=len(images), unit="image", disable=None, dynamic_ncols=True) as bar:
        for x, y, _ in images.batches(args.test_batch_size):
            x = x.double()
            certified = prove(exact, x, y, args.epsilon, norms).worst_margin > 0
            bar.update(len(x))
            x, y = x[certified], y[certified]
            if not len(x):
                continue
            with torch.no_grad():
                bound = propagate(exact, x, args.epsilon, norms.with_steps(LANCZOS_STEPS[2]))
            found["fallen"].append(attack_labels(exact, x, y, args.epsilon, args.restarts))
            found["slope"].append(attack_slopes(exact[:-1], x, args.epsilon, args.slope_steps))
            found["local_bound"].append(bound.hidden_lipschitz)
            found["global_bound"].append(bound.global_hidden_lipschitz.expand(len(x)))
    columns = {name: torch.cat(parts).cpu().numpy() if parts else np.empty(0) for name, parts in found.items()}
    finish(columns, len(images), args.epsilon, args.restarts, Path(args.out) if args.out else None)


def finish(columns: dict[str, np.ndarray], images: int, epsilon: float, restarts: int, folder: Path | None) -> None:
    """Print what the attacks found, write the report, and end with exit code 1 if a certificate fell."""
    count = len(columns["slope"])
    fallen = columns["fallen"].astype(bool)
    steep = ~(columns["slope"] <= columns["local_bound"])
    broken = fallen | steep
    print(f"{count} of {images} images certified at epsilon {epsilon:.6g}; {restarts} PGD attacks on each")
    print(f"labels changed: {fallen.sum()}; slopes above the local bound: {steep.sum()}")
    if count:
        tightness = np.median(columns["slope"] / columns["local_bound"])
        print(
            f"medians: steepest slope {np.median(columns['slope']):.4g}, local bound "
            f"{np.median(columns['local_bound']):.4g}, global bound {columns['global_bound'][0]:.4g}; "
            f"slope / local bound {tightness:.3f}"
        )
    if folder:
        rows = [{name: values[i] for name, values in columns.items()} for i in range(count)]
        write_csv(folder / "attacks.csv", rows, list(columns))
        picture = folder / "bounds_and_slopes.png"
        with pictures.drawing(picture) as axes:
            bounds = columns["global_bound"], columns["local_bound"]
            pictures.bounds_and_slopes(axes, *bounds, columns["slope"], epsilon)
        print(picture)
    if broken.any():
        print(f"BROKEN CERTIFICATE: {broken.sum()} proven certificates fell; please report this", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
