"""Clean, PGD and certified accuracy of a saved model; `--help` lists the flags."""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

import distributed
import report
import utils
from data_load import DATA_SETS, ImageSet, count_classes, load_data
from dependencies import L2PGDAttack
from local_bound import propagate, prove, worst_logits, worst_margin
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proof import LANCZOS_STEPS, eliminated
from locallip.bound.proven_norms import DEPLOYED, ProvenNorms
from report import CERTIFIED_MULTIPLES, PGD_MULTIPLES, Outcome
from utils import InputError

PGD_STEPS = 100
# At the other radii of the picture; fewer steps can only make PGD look weaker, never a certificate look true.
PGD_CURVE_STEPS = 25


def arguments(defaults: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """The command line; `defaults` go before those of the flags."""
    parser = utils.ArgumentParser(__doc__)
    add_model_flags(parser)
    flag = parser.add_argument
    certificate = "upper bounds on all norms, the published protocol, whose norms are estimates from below, or both"
    flag("--certificate", choices=["proven", "estimate", "both"], default="proven", help=certificate)
    seed = "of the random start vectors of a proven certificate; default: from the operating system"
    flag("--certificate_seed", type=utils.natural_int, help=seed)
    deployed = "what a proven certificate is for: the exact function, or what the network computes in float32"
    flag("--deployed", choices=list(DEPLOYED), default="exact", help=deployed)
    flag("--clip", action="store_true", help="certify against valid images only, with pixels in [0, 1]")
    flag("--test_sniter", type=utils.positive_int, default=2000, help="power iterations per norm of an estimate")
    flag("--test_opt_iter", type=utils.positive_int, default=1000, help="rounds of pinning of an estimate")
    curve = "test images, the first so many in whole batches, that the curves over the radius are made of"
    flag("--curve_images", type=utils.positive_int, default=1000, help=curve)
    out = (
        "folder for the report: a CSV row per image, summary.json and pictures; below it, proven/ and estimate/ of both"
    )
    flag("--out", type=utils.path, help=out)
    flag("--overwrite", action="store_true", help="replace a report that --out has already")
    parser.set_defaults(**(defaults or {}))
    args = parser.parse_args()
    if args.certificate == "estimate" and (args.deployed != "exact" or args.certificate_seed is not None):
        raise InputError("--deployed and --certificate_seed belong to a proven certificate, not to an estimate")
    return args


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that say what is evaluated, and at which radius."""
    utils.add_common_flags(parser, list(utils.MODELS))
    # What is not given is taken from the checkpoint, where it knows.
    parser.set_defaults(data=None, model=None, width=None)
    flag = parser.add_argument
    saved = "checkpoint file, or the prefix of one (PREFIX_best.pth)"
    flag("--saved_model", type=utils.path, required=True, help=saved)
    epsilon = "L2 radius in pixel space (pixels in [0, 1]); default: the paper's for the data set"
    flag("--epsilon", type=utils.natural_float, help=epsilon)
    flag("--images", type=utils.positive_int, help="only the first so many test images; default: all")
    probability = "of a proven certificate: that any norm of the whole run is too small"
    flag("--failure_probability", type=utils.probability, default=1e-6, help=probability)


def load(args: argparse.Namespace) -> tuple[nn.Sequential, ImageSet, Path, dict[str, Any]]:
    """What the flags name: model in eval mode and test images on one device, the checkpoint's path and content.

    Fills in data, model and width from the checkpoint where `args` do not name them, and the data set's radius.

    Raises:
        InputError: if one of them is missing, damaged or does not fit.
    """
    device = distributed.select_device(args.device)
    path = find_checkpoint(args.saved_model)
    checkpoint = utils.load_checkpoint(path)
    trained = checkpoint.get("arguments")
    trained = trained if isinstance(trained, dict) else {}
    for name, kind, otherwise in (("data", str, "mnist"), ("model", str, "relux"), ("width", int | float, 1.0)):
        if getattr(args, name) is None:
            setattr(args, name, trained.get(name, otherwise))
        if not isinstance(getattr(args, name), kind):
            raise InputError(f"{path} does not say what it was trained with: its {name} is {getattr(args, name)!r}")
    classes = count_classes(args.data, args.data_dir)
    model = utils.select_model(args.data, args.model, width=args.width, classes=classes)
    utils.load_weights(model, checkpoint["state_dict"], str(path))
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if args.epsilon is None:
        args.epsilon = DATA_SETS[args.data].epsilon
    with distributed.one_per_machine_first():
        images = load_data(args.data, args.data_dir, train=False)
    return model, images.to(device)[: args.images], path, checkpoint


class Estimate:
    """The published protocol: norms by power iteration, which approaches them from below, in float32.

    Answers what `--test_sniter` iterations for every norm would, in stages. An image that the global bound certifies,
    or that is misclassified, needs no local norms. One that a few iterations fail to certify stays so, since estimates
    only grow with further ones. Norms and margins reported are those of the stage that decided.
    """

    def __init__(self, model: nn.Sequential, args: argparse.Namespace):
        self.model, self.args, self.clip = model, args, clip_range(args)
        self.norms = PowerIteration(args.test_sniter, seed=args.seed, skip_idle_masks=True)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What is known about a batch at epsilon."""
        many, few = self.args.test_sniter, max(1, self.args.test_sniter // 100)
        known: dict[str, Tensor] = {}
        still_open = torch.arange(len(x), device=x.device)
        # The global norms of the first batch's many iterations start those of all others.
        for local_positions, iterations in (
            ([], few if self.norms.global_vectors else many),
            (None, few),
            (None, many),
        ):
            self.norms.local_positions, self.norms.iterations = local_positions, iterations
            self.norms.local_vectors = {}
            found = self._ask(x[still_open], y[still_open])
            known = known or {name: column.clone() for name, column in found.items()}
            for name, column in found.items():
                known[name][still_open] = column
            certified, failed = found["worst_margin"] > 0, found["worst_margin"] <= 0  # neither, if it is NaN
            still_open = still_open[certified if local_positions is None else failed & (found["margin"] > 0)]
            if not len(still_open):
                break
        return known

    def _ask(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        bound = propagate(self.model, x, self.args.epsilon, self.norms, self.clip)
        rows, columns = eliminated(bound)
        return {
            "margin": worst_margin(bound.logits, y),
            "worst_margin": worst_margin(worst_logits(bound, y, self.args.test_opt_iter), y),
            "local_bound": bound.hidden_lipschitz,
            "global_bound": bound.global_hidden_lipschitz.expand(len(x)),
            "global_radius": global_radius(self.model, bound.logits, y, bound.global_hidden_lipschitz),
            "eliminated_rows": rows,
            "eliminated_columns": columns,
        }

    def at(self, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
        """Certified (N,) at another radius, by fewer iterations."""
        self.norms.iterations, self.norms.local_vectors = max(10, self.args.test_sniter // 20), {}
        self.norms.local_positions = None
        bound = propagate(self.model, x, epsilon, self.norms, self.clip)
        return worst_margin(worst_logits(bound, y, self.args.test_opt_iter), y) > 0

    def describe(self) -> dict[str, Any]:
        """For the summary."""
        return {"kind": "estimate", "power_iterations": self.args.test_sniter, "clip": self.args.clip}

    def progress(self) -> dict[str, int]:
        """For the progress bar."""
        return {}


class Proven:
    """Upper bounds on all norms, in float64, with rounding allowed for (see `proven_norm`).

    images: how many this process will ask about. Every process has an equal share of the failure probability, and
    random vectors of its own.
    """

    def __init__(self, model: nn.Sequential, args: argparse.Namespace, images: int):
        self.model, self.args, self.clip = copy.deepcopy(model).double(), args, clip_range(args)
        asked = images + len(CERTIFIED_MULTIPLES) * (
            min(images, args.curve_images + args.test_batch_size) if args.out else 0
        )
        planned = asked * len(self.model) * len(LANCZOS_STEPS)
        compares = args.clip or args.deployed != "exact"
        probability = args.failure_probability / (2 if compares else 1) / distributed.processes()
        seed = None if args.certificate_seed is None else args.certificate_seed + 2 * distributed.rank()
        self.norms = ProvenNorms(probability, planned, seed=seed, deployed=args.deployed)
        self.decided = [0] * (len(LANCZOS_STEPS) + 1)
        # What --clip gains and --deployed costs is measured beside the certificate without them.
        self.plain_norms: ProvenNorms | None = None
        self.plain_certified = 0
        if compares:
            self.plain_norms = ProvenNorms(probability, planned, seed=None if seed is None else seed + 1)

    def __call__(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        """What is known about a batch at epsilon."""
        proof = prove(self.model, x.double(), y, self.args.epsilon, self.norms, self.clip)
        if self.plain_norms is not None:
            plain = prove(self.model, x.double(), y, self.args.epsilon, self.plain_norms)
            self.plain_certified += int((plain.worst_margin > 0).sum())
        open_to_the_end = proof.decided.pop()
        for stage, count in enumerate(proof.decided):
            self.decided[stage] += count
        self.decided[-1] += open_to_the_end
        return {
            "margin": worst_margin(proof.logits, y),
            "worst_margin": proof.worst_margin,
            "local_bound": proof.hidden_lipschitz,
            "global_bound": proof.global_hidden_lipschitz.expand(len(x)),
            "global_radius": global_radius(self.model, proof.logits, y, proof.global_hidden_lipschitz),
            "eliminated_rows": proof.eliminated[0],
            "eliminated_columns": proof.eliminated[1],
        }

    def at(self, x: Tensor, y: Tensor, epsilon: float) -> Tensor:
        """Certified (N,) at another radius."""
        return prove(self.model, x.double(), y, epsilon, self.norms, self.clip).worst_margin > 0

    def describe(self) -> dict[str, Any]:
        """For the summary, of all processes together; `seed` lists theirs if there are several."""
        seeds = distributed.gather(self.norms.seed)
        plain_certified = sum(distributed.gather(self.plain_certified))
        return {
            "kind": "proven",
            "failure_probability": self.args.failure_probability,
            "seed": seeds[0] if len(seeds) == 1 else seeds,
            "deployed": self.args.deployed,
            "clip": self.args.clip,
            "lanczos_steps": list(LANCZOS_STEPS),
            "decided": [sum(counts) for counts in zip(*distributed.gather(self.decided))],
            "certified_plain": None if self.plain_norms is None else plain_certified,
        }

    def progress(self) -> dict[str, int]:
        """For the progress bar."""
        return {"decided": sum(self.decided[:-1]), "undecided": self.decided[-1]}


def clip_range(args: argparse.Namespace) -> tuple[float, float] | None:
    """Pixel values of a valid image, if the attacker is bound to them."""
    return (0.0, 1.0) if args.clip else None


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


def right(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: the label has the largest logit, and none is NaN."""
    return (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)


def pgd(model: nn.Sequential, x: Tensor, y: Tensor, epsilon: float, steps: int = PGD_STEPS) -> Tensor:
    """The attack of the paper: steps of epsilon / 4 from a random point of the ball, inside [0, 1]."""
    if epsilon == 0:
        return x
    x = x.contiguous()  # advertorch flattens what it is given in this order only
    cross_entropy = nn.CrossEntropyLoss(reduction="sum")
    point = L2PGDAttack(model, cross_entropy, epsilon, steps, epsilon / 4, True, 0.0, 1.0).perturb(x, y)
    # The attack rounds after it has projected; a hair outside of the ball would prove nothing.
    step = (point - x).flatten(1)
    scale = (epsilon * (1 - 1e-6) / step.norm(dim=1).clamp(min=1e-30)).clamp(max=1)
    return x + (step * scale[:, None]).view_as(x)


def global_radius(model: nn.Sequential, logits: Tensor, y: Tensor, lipschitz: Tensor) -> Tensor:
    """Radius (N,) up to which the global bound alone certifies: the smallest margin over ||w_y - w_j|| times it."""
    weight = model[-1].weight
    margins = logits.gather(1, y[:, None]) - logits  # (N, K)
    slopes = (weight[y].unsqueeze(1) - weight).norm(dim=2) * lipschitz
    radii = (margins / slopes).scatter(1, y[:, None], torch.inf)
    return radii.amin(dim=1).clamp(min=0)


def find_checkpoint(saved_model: str) -> Path:
    """The file of that name, or the best checkpoint of the run with that prefix."""
    for path in (Path(saved_model), Path(saved_model + "_best.pth")):
        if utils.exists(path) and path.is_file():
            return path
    raise InputError(f"no checkpoint: neither {saved_model} nor {saved_model}_best.pth is a file")


def main(defaults: Mapping[str, Any] | None = None) -> None:
    args = arguments(defaults)
    with distributed.process_group(args.device):
        found = _evaluate_checkpoint(args)
    broken = [_complain_of_broken_certificates(outcome, kind) for kind, outcome in found.items()]
    if any(broken):
        sys.exit(1)


def _evaluate_checkpoint(args: argparse.Namespace) -> dict[str, Outcome]:
    """Evaluate, print and write reports; returns the outcome by the certificate's kind in the process that does so."""
    model, images, path, checkpoint = load(args)
    both = args.certificate == "both"
    kinds = ["proven", "estimate"] if both else [args.certificate]
    folders = [Path(args.out) / kind if both else Path(args.out) for kind in kinds if args.out]
    for folder in folders if distributed.is_main() else []:
        utils.check_writable(folder)
        report.refuse_existing(folder / "summary.json", args.overwrite)

    torch.manual_seed(args.seed + distributed.rank())
    started = time.perf_counter()
    own = len(distributed.shard(images))
    certificates = [Proven(model, args, own) if kind == "proven" else Estimate(model, args) for kind in kinds]
    outcomes = evaluate(model, images, args, certificates)
    certified_by = [certificate.describe() for certificate in certificates]
    if not distributed.is_main():
        return {}
    seconds = time.perf_counter() - started
    for number, (outcome, how) in enumerate(zip(outcomes, certified_by)):
        summary = report.summarize(outcome, args, path, checkpoint.get("arguments"), how, seconds)
        print(report.as_text(summary))
        if args.out:
            for written in report.write(folders[number], outcome, summary):
                print(written)
    return dict(zip(kinds, outcomes))


def _complain_of_broken_certificates(outcome: Outcome, kind: str) -> bool:
    broken = np.flatnonzero(outcome.certified & ~outcome.pgd)
    if len(broken):
        print(
            f"BROKEN CERTIFICATE: PGD changed the label of {len(broken)} certified images, {broken[:20].tolist()}. "
            + (
                "The norms are estimates from below; evaluate with --certificate proven."
                if kind == "estimate"
                else "A proven certificate must never break: please report this with the seed in summary.json."
            ),
            file=sys.stderr,
        )
    return bool(len(broken))


if __name__ == "__main__":
    utils.run_script(main)
