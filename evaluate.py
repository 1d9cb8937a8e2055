"""Clean, PGD and certified accuracy of a saved model; `--help` lists the flags."""

from __future__ import annotations

import argparse
import hashlib
import secrets
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import utils
from data_load import DATA_SETS, count_classes, load_data
from locallip import devices, distributed, flags
from locallip.bound.proof import EFFORTS
from locallip.bound.proven_norms import DEPLOYED
from locallip.checkpoints import find_checkpoint, load_checkpoint, load_weights
from locallip.dependencies import l2_pgd_attack
from locallip.evaluation import report
from locallip.evaluation.certificates import Estimate, Proven
from locallip.evaluation.evaluation import evaluate
from locallip.evaluation.outcome import Outcome
from locallip.evaluation.plan import Plan
from locallip.evaluation.summary import as_text, summarize, versions
from locallip.evaluation.unfinished import Unfinished, begin, images_sha256, source_sha256
from locallip.files import InputError, run_script
from locallip.images import ImageSet, hold_out


def arguments(defaults: Mapping[str, Any] | None = None) -> argparse.Namespace:
    """The command line; `defaults` go before those of the flags."""
    parser = flags.ArgumentParser(__doc__)
    add_model_flags(parser)
    flag = parser.add_argument
    certificate = "upper bounds on all norms, the published protocol, whose norms are estimates from below, or both"
    flag("--certificate", choices=["proven", "estimate", "both"], default="proven", help=certificate)
    deployed = "what a proven certificate is for: the exact function, or what the network computes in float32"
    flag("--deployed", choices=list(DEPLOYED), default="exact", help=deployed)
    effort = "how far a proof goes: to the product of norms, or on to the centred dual, which certifies more"
    flag("--effort", choices=EFFORTS, default="dual", help=effort)
    flag("--clip", action="store_true", help="certify against valid images only, with pixels in [0, 1]")
    flag("--test_sniter", type=flags.positive_int, default=2000, help="power iterations per norm of an estimate")
    flag("--test_opt_iter", type=flags.positive_int, default=1000, help="rounds of pinning of an estimate")
    curve = "test images, the first so many in whole batches, that the curves over the radius are made of"
    flag("--curve_images", type=flags.positive_int, default=1000, help=curve)
    out = (
        "folder for the report: a CSV row per image, summary.json and pictures; of both, proven/ (or product/) and "
        "estimate/ below it"
    )
    flag("--out", type=flags.path, help=out)
    resume = "go on with the evaluation that was stopped before it could write its report to --out"
    flag("--resume", action="store_true", help=resume)
    flag("--overwrite", action="store_true", help="replace a report, or an unfinished one, that --out has already")
    parser.set_defaults(**(defaults or {}))
    args = parser.parse_args()
    of_a_proof = ("deployed", "certificate_seed", "effort", "failure_probability")
    named = [f"--{name}" for name in of_a_proof if getattr(args, name) != parser.get_default(name)]
    if args.certificate == "estimate" and named:
        raise InputError(f"no part of an estimate, but of a proven certificate: {', '.join(named)}")
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if args.resume and not args.out:
        raise InputError("--resume needs the --out of the evaluation that was stopped")
    return args


def add_model_flags(parser: argparse.ArgumentParser, several: bool = False) -> None:
    """The flags that say what is evaluated, and at which radius.

    several: any number of checkpoints may be named, or none.
    """
    utils.add_common_flags(parser, list(utils.MODELS))
    # What is not given is taken from the checkpoint, where it knows.
    parser.set_defaults(data=None, model=None, width=None)
    flag = parser.add_argument
    saved = "checkpoint file, or the prefix of one (PREFIX_best.pth)"
    if several:
        flag("--saved_model", type=flags.path, nargs="+", help=f"{saved}, or several; default: those in pretrained/")
    else:
        flag("--saved_model", type=flags.path, required=True, help=saved)
    epsilon = "L2 radius in pixel space (pixels in [0, 1]); default: the paper's for the data set"
    flag("--epsilon", type=flags.natural_float, help=epsilon)
    flag("--images", type=flags.positive_int, help="only the first so many images; default: all")
    held_out = "instead of the test set the so many training images that --val_split holds out, with the same --seed"
    flag("--held_out", type=flags.natural_int, default=0, help=held_out)
    probability = "of a proven certificate: that any norm of the whole run is too small"
    flag("--failure_probability", type=flags.probability, default=1e-6, help=probability)
    seed = "of the random start vectors of a proven certificate; default: from the operating system"
    flag("--certificate_seed", type=flags.natural_int, help=seed)


def load(args: argparse.Namespace) -> tuple[nn.Sequential, ImageSet, str, dict[str, Any]]:
    """What the flags name: model in eval mode and images on one device, the checkpoint's SHA-256 and content.

    Fills in data, model and width from the checkpoint where `args` do not name them, and the data set's radius.

    Raises:
        InputError: if one of them is missing, damaged or does not fit, or images to hold out were trained on.
    """
    with distributed.all_or_none():
        device = distributed.select_device(args.device)
        path = find_checkpoint(args.saved_model)
        checkpoint, sha256 = load_checkpoint(path), hashlib.sha256(path.read_bytes()).hexdigest()
    trained = checkpoint.get("arguments")
    trained = trained if isinstance(trained, dict) else {}
    assumed = args.model is None and "model" not in trained
    for name, kind, otherwise in (("data", str, "mnist"), ("model", str, "relux"), ("width", int | float, 1.0)):
        if getattr(args, name) is None:
            setattr(args, name, trained.get(name, otherwise))
        if not isinstance(getattr(args, name), kind):
            raise InputError(f"{path} does not say what it was trained with: its {name} is {getattr(args, name)!r}")
    if args.held_out:
        _refuse_trained_on(args, trained, path)
    classes = count_classes(args.data, args.data_dir)
    model = utils.select_model(args.data, args.model, width=args.width, classes=classes)
    try:
        load_weights(model, checkpoint["state_dict"], str(path))
    except InputError as error:
        hint = f"; it does not say its network, and --model {args.model} was assumed: name another" if assumed else ""
        raise InputError(f"{error}{hint or _other_network(args, trained)}") from None
    model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    if args.epsilon is None:
        args.epsilon = DATA_SETS[args.data].epsilon
        validated = trained.get("epsilon", args.epsilon)
        if validated != args.epsilon and distributed.is_main():
            print(f"epsilon is {args.epsilon:g}, the data set's; training validated at {validated}: --epsilon names it")
    with distributed.one_per_machine_first():
        images = load_data(args.data, args.data_dir, train=bool(args.held_out))
    if args.held_out:
        _, images = hold_out(images, args.held_out, args.seed)
    return model, images.to(device)[: args.images], sha256, checkpoint


def _other_network(args: argparse.Namespace, trained: Mapping[str, Any]) -> str:
    """A hint for a network that is not the one that was trained; empty: the checkpoint knows of no other."""
    named = [
        name for name in ("data", "model", "width") if trained.get(name, getattr(args, name)) != getattr(args, name)
    ]
    if not named:
        return ""
    own = " ".join(f"--{name} {trained[name]}" for name in named)
    return f"; it was trained with {own}: drop {' and '.join(f'--{name}' for name in named)}"


def _refuse_trained_on(args: argparse.Namespace, trained: Mapping[str, Any], path: Path) -> None:
    """Refuse images to hold out that a network was trained on, as far as its checkpoint knows."""
    if args.data != trained.get("data", args.data):
        raise InputError(f"{path} was trained on {trained['data']}; --held_out of {args.data} means nothing for it")
    count, seed = trained.get("val_split", args.held_out), trained.get("seed", args.seed)
    if not (isinstance(count, int) and isinstance(seed, int)):
        raise InputError(f"{path} does not say what it was trained with: val_split {count!r}, seed {seed!r}")
    if count == 0:
        raise InputError(f"{path} was trained on all training images (--val_split 0); drop --held_out")
    # The first so many of one order are held out, so fewer are among them.
    if seed != args.seed or count < args.held_out:
        own = f"--held_out {count} --seed {seed}"
        raise InputError(f"{path} was trained on some of these images; those that it held out are {own}")


def main(defaults: Mapping[str, Any] | None = None) -> None:
    args = arguments(defaults)
    with distributed.process_group(args.device):
        found = _evaluate_checkpoint(args)
    broken = [_complain_of_broken_certificates(outcome, kind) for kind, outcome in found.items()]
    if any(broken):
        sys.exit(1)


def _evaluate_checkpoint(args: argparse.Namespace) -> dict[str, Outcome]:
    """Evaluate, print and write reports; returns the outcome by the certificate's kind in the process that does so."""
    with distributed.all_or_none():
        find_checkpoint(args.saved_model)  # before imports that take seconds
        l2_pgd_attack()  # what cannot be imported says so now, not behind the first batch
    model, images, sha256, checkpoint = load(args)
    folders = _folders(args)
    run = None
    with distributed.all_or_none():
        if distributed.is_main():
            run = _begin(args, sha256, images, [folder for folder in folders.values() if folder])
    run = distributed.share(run)
    unfinished = Unfinished(Path(args.out), run, distributed.share(time.time_ns())) if args.out else None
    started = time.perf_counter()

    questions = Plan.of(args, len(images)).questions()
    certificates = [
        Proven(model, args, images[:1].images / 255, questions, run["seed"])
        if kind == "proven"
        else Estimate(model, args)
        for kind in folders
    ]
    found = evaluate(model, images, args, certificates, unfinished)
    with distributed.all_or_none():
        if distributed.is_main():
            seconds = unfinished.seconds() if unfinished else time.perf_counter() - started
            begun_with = argparse.Namespace(**run["arguments"])
            hardware = _text(checkpoint.get("hardware")), devices.hardware(images.labels.device)
            on = begun_with, model[-1].out_features, sha256, checkpoint.get("arguments"), *hardware
            for folder, part, certificate in zip(folders.values(), found, certificates):
                how, stages = certificate.describe(part.counts), part.counts.get("seconds", np.empty(0)).tolist()
                _report(part.outcome, summarize(part.outcome, *on, how, seconds, stages), folder)
    if unfinished:  # the report is written, by whichever process
        unfinished.discard()
    return {kind: part.outcome for kind, part in zip(folders, found)} if distributed.is_main() else {}


def _folders(args: argparse.Namespace) -> dict[str, Path | None]:
    """Where the report of each certificate goes that is asked for, by its kind; None without --out."""
    if args.certificate != "both":
        return {args.certificate: Path(args.out) if args.out else None}
    of_proof = "product" if args.effort == "product" else "proven"
    names = {"proven": of_proof, "estimate": "estimate"}
    return {kind: Path(args.out) / name if args.out else None for kind, name in names.items()}


def _report(outcome: Outcome, summary: dict[str, Any], folder: Path | None) -> None:
    print(as_text(summary))
    if folder:
        for written in report.write(folder, outcome, summary):
            print(written)


def _text(value: Any) -> str | None:
    """What a checkpoint of any origin says, if it is text."""
    return value if isinstance(value, str) else None


def _begin(args: argparse.Namespace, checkpoint: str, images: ImageSet, folders: list[Path]) -> dict[str, Any]:
    """The run: all that its findings depend on. An earlier one where --resume goes on with it."""
    asked = {name: value for name, value in vars(args).items() if name != "resume"}
    run = {
        "arguments": asked,
        "seed": secrets.randbits(128) if args.certificate_seed is None else args.certificate_seed,
        "checkpoint": checkpoint,
        "images": images_sha256(images),
        "code": source_sha256(),
        "versions": versions(),
        "device": images.labels.device.type,
    }
    if not args.out:
        return run
    batches = len(Plan.of(args, len(images)))
    return begin(Path(args.out), folders, run, batches, args.certificate_seed, args.resume, args.overwrite)


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
    run_script(main)
