"""An evaluation in numbers: accuracies with their intervals, for JSON and for people."""

from __future__ import annotations

import argparse
import math
import platform
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from locallip.bound.stages import is_by_dual
from locallip.evaluation.outcome import Outcome
from locallip.evaluation.pgd import PGD_STEPS

_PACKAGES = ("torch", "torchvision", "numpy", "advertorch")


def summarize(
    outcome: Outcome,
    args: argparse.Namespace,
    classes: int,
    checkpoint: str,
    training: dict | None,
    trained_on: str | None,
    evaluated_on: str,
    certificate: dict,
    seconds: float,
    stage_seconds: Sequence[float] = (),
) -> dict:
    """The evaluation in numbers, ready for JSON.

    classes: that the network tells apart. checkpoint: the SHA-256 of the evaluated file. training: the
    arguments it was trained with, and trained_on: the hardware, if it knows. evaluated_on: the hardware. certificate:
    its `kind`, `proven` or `estimate`, and what belongs to it. seconds: wall time. stage_seconds: the same of its
    stages.
    """
    by_dual = np.array([is_by_dual(name) for name in outcome.decided_by], dtype=bool)
    return {
        "arguments": vars(args),
        "checkpoint": {"sha256": checkpoint, "training": training, "hardware": trained_on},
        "images": len(outcome.label),
        "classes": classes,
        "epsilon": args.epsilon,
        "certificate": certificate,
        "accuracy": {
            "clean": _accuracy(outcome.clean),
            "pgd": _accuracy(outcome.pgd),
            "certified": _accuracy(outcome.certified),
            "certified_by_product": _accuracy(outcome.certified & ~by_dual),
            "certified_globally": _accuracy(outcome.global_radius > args.epsilon),
        },
        "decided_by": {
            str(name): int(count) for name, count in zip(*np.unique(outcome.decided_by, return_counts=True))
        },
        "lipschitz": {
            "images_with_local": int(np.isfinite(ratio(outcome)).sum()),
            "local_median": _median(outcome.local_bound[np.isfinite(ratio(outcome))]),
            "global": _median(outcome.global_bound),
            "local_over_global_median": _median(ratio(outcome)),
        },
        "not_a_number": int(np.isnan(outcome.worst_margin).sum()),
        "certified_but_broken_by_pgd": int((outcome.certified & ~outcome.pgd).sum()),
        "seconds": round(seconds, 1),
        "stage_seconds": [round(stage, 1) for stage in stage_seconds],
        "versions": versions(),
        "hardware": evaluated_on,
    }


def ratio(outcome: Outcome) -> np.ndarray:
    """(N,) local over global Lipschitz bound; NaN where it is not smaller, or one of them not finite."""
    usable = np.isfinite(outcome.global_bound) & (outcome.local_bound < outcome.global_bound)
    return np.divide(outcome.local_bound, outcome.global_bound, out=np.full(len(usable), np.nan), where=usable)


def _median(values: np.ndarray) -> float | None:
    """The median of the finite values; None, which JSON knows, if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def versions() -> dict[str, str | None]:
    """Of Python and of the packages that the figures depend on; None: not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _accuracy(flags: np.ndarray) -> dict[str, Any]:
    low, high = wilson_interval(int(flags.sum()), len(flags))
    return {"count": int(flags.sum()), "percent": 100 * float(flags.mean()), "interval_95": [100 * low, 100 * high]}


def wilson_interval(count: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's score interval of a share, at 95 % unless another normal quantile `z` is given."""
    share, weight = count / total, z * z / total
    middle = (share + weight / 2) / (1 + weight)
    half = z * math.sqrt(share * (1 - share) / total + weight / (4 * total)) / (1 + weight)
    return max(0.0, middle - half), min(1.0, middle + half)


def as_text(summary: dict) -> str:
    """The summary for people, a few lines."""
    arguments, how_certified = summary["arguments"], _how_certified(summary["certificate"])
    named = {
        "clean": ("clean", ""),
        "pgd": ("PGD", f"{PGD_STEPS} steps of epsilon/4 inside [0, 1]"),
        "certified": ("certified", how_certified),
        "certified_by_product": ("", "by the product of norms, before the dual was asked"),
        "certified_globally": ("", "global bound alone, rounding not allowed for"),
    }
    images = f"{summary['images']} {'held-out training' if arguments.get('held_out') else 'test'} images"
    lines = [f"{arguments['data']}: {images}, epsilon {summary['epsilon']:.6g} (L2, pixel space)"]
    by_dual = any(map(is_by_dual, summary["certificate"].get("stages", [])))
    for name, accuracy in summary["accuracy"].items():
        if name == "certified_by_product" and not by_dual:
            continue
        low, high = accuracy["interval_95"]
        label, how = named[name]
        count = f"({accuracy['count']}/{summary['images']})"
        lines.append(f"{label:<10}{accuracy['percent']:6.2f} % {count}  95 %: {low:.1f} to {high:.1f}  {how}".rstrip())
    plain = summary["certificate"].get("certified_plain")
    if plain is not None:
        gain = summary["accuracy"]["certified"]["count"] - plain
        lines.append(
            f"for the exact function and the whole ball: {plain} certified; the flags change that by {gain:+d}"
        )
    lipschitz = summary["lipschitz"]
    if lipschitz["local_over_global_median"] is not None:
        lines.append(
            f"Lipschitz bound up to the last hidden layer: global {lipschitz['global']:.4g}, local "
            f"{lipschitz['local_median']:.4g}, local / global {lipschitz['local_over_global_median']:.3f} "
            f"(medians of the {lipschitz['images_with_local']} images whose local bound came out smaller)"
        )
    if summary["not_a_number"]:
        lines.append(f"{summary['not_a_number']} images have a NaN in their bound and count as not certified")
    return "\n".join(lines)


def _how_certified(certificate: dict) -> str:
    valid = " against valid images" if certificate["clip"] else ""
    if certificate["kind"] == "estimate":
        return f"estimate{valid}: norms by {certificate['power_iterations']} power iterations"
    function = "the float32 network" if certificate["deployed"] == "float32" else "the exact function"
    return f"proven{valid} for {function}, but for a probability of {certificate['failure_probability']:g}"
