"""What evaluations leave behind: a CSV row per image, a summary, pictures, and the table of all summaries.

`python report.py` gathers results/JOB/{proven,estimate}/summary.json into the table of the README, and draws the
training logs that lie beside them as results/JOB/epochs.csv.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import platform
from dataclasses import dataclass, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

import utils
from data_load import DATA_SETS
from utils import InputError

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

LOCAL, GLOBAL, ATTACK, INK = "#1f6feb", "#8b949e", "#d1542b", "#24292f"

# The curves over the radius: multiples of epsilon for the certificate, and for PGD between 0 and epsilon and beyond.
CERTIFIED_MULTIPLES = np.linspace(0, 2, 9)
PGD_MULTIPLES = np.array([0.5, 1.5, 2.0])


@dataclass
class Outcome:
    """What an evaluation found for N images: every field is an array with one row per image."""

    label: np.ndarray  # (N,) int
    prediction: np.ndarray  # (N,) int
    clean: np.ndarray  # (N,) bool: classified right
    pgd: np.ndarray  # (N,) bool: still right at the point that PGD found
    certified: np.ndarray  # (N,) bool: right in the whole ball, by the bound
    margin: np.ndarray  # (N,) label's logit minus the largest other one, at x
    worst_margin: np.ndarray  # (N,) the same, bounded over the ball
    local_bound: np.ndarray  # (N,) Lipschitz bound up to the last hidden layer, in the ball
    global_bound: np.ndarray  # (N,) the same, everywhere
    global_radius: np.ndarray  # (N,) radius that the global bound certifies, 0 where x is misclassified
    eliminated_rows: (
        np.ndarray
    )  # (N, L) share of the rows of every linear layer but the last that the ball switches off
    eliminated_columns: np.ndarray  # (N, L) the same of its columns
    pgd_over_radius: np.ndarray  # (N, R) 0 or 1 at PGD_MULTIPLES, NaN where it was not asked
    certified_over_radius: np.ndarray  # (N, R) the same at CERTIFIED_MULTIPLES

    @staticmethod
    def concatenate(parts: list[Outcome]) -> Outcome:
        """The outcome of a whole set from those of its batches."""
        return Outcome(**{f.name: np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(Outcome)})

    def take(self, order: np.ndarray) -> Outcome:
        """The images at these places."""
        return Outcome(**{f.name: getattr(self, f.name)[order] for f in fields(Outcome)})


# --- summary ---------------------------------------------------------------------------------------------------------


def summarize(
    outcome: Outcome,
    args: argparse.Namespace,
    checkpoint: Path,
    training: dict | None,
    certificate: dict,
    seconds: float,
) -> dict:
    """The evaluation in numbers, ready for JSON.

    checkpoint: the evaluated file. training: the arguments it was trained with, if it knows. certificate: its `kind`,
    `proven` or `estimate`, and what belongs to it. seconds: wall time.
    """
    return {
        "arguments": vars(args),
        "checkpoint": {"sha256": hashlib.sha256(checkpoint.read_bytes()).hexdigest(), "training": training},
        "images": len(outcome.label),
        "epsilon": args.epsilon,
        "certificate": certificate,
        "accuracy": {
            "clean": _accuracy(outcome.clean),
            "pgd": _accuracy(outcome.pgd),
            "certified": _accuracy(outcome.certified),
            "certified_globally": _accuracy(outcome.global_radius > args.epsilon),
        },
        "lipschitz": {
            "images_with_local": int(np.isfinite(_ratio(outcome)).sum()),
            "local_median": _median(outcome.local_bound[np.isfinite(_ratio(outcome))]),
            "global": _median(outcome.global_bound),
            "local_over_global_median": _median(_ratio(outcome)),
        },
        "not_a_number": int(np.isnan(outcome.worst_margin).sum()),
        "certified_but_broken_by_pgd": int((outcome.certified & ~outcome.pgd).sum()),
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "hardware": _hardware(args.device),
    }


_PACKAGES = ("torch", "torchvision", "numpy", "advertorch")


def _ratio(outcome: Outcome) -> np.ndarray:
    """(N,) local over global Lipschitz bound; NaN where it is not smaller, or one of them not finite."""
    usable = np.isfinite(outcome.global_bound) & (outcome.local_bound < outcome.global_bound)
    return np.divide(outcome.local_bound, outcome.global_bound, out=np.full(len(usable), np.nan), where=usable)


def _median(values: np.ndarray) -> float | None:
    """The median of the finite values; None, which JSON knows, if there is none."""
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _hardware(device: str) -> str:
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads ({platform.machine()})"


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
        "pgd": ("PGD", "100 steps of epsilon/4 inside [0, 1]"),
        "certified": ("certified", f"local bound, {how_certified}"),
        "certified_globally": ("", "global bound alone, rounding not allowed for"),
    }
    lines = [
        f"{arguments['data']}: {summary['images']} test images, epsilon {summary['epsilon']:.6g} (L2, pixel space)"
    ]
    for name, accuracy in summary["accuracy"].items():
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


# --- files -----------------------------------------------------------------------------------------------------------


def refuse_existing(file: Path, overwrite: bool) -> None:
    """Refuse to replace a report of which this is a file, unless asked to.

    Raises:
        InputError: if it exists and `overwrite` is False.
    """
    if not overwrite and utils.exists(file):
        raise InputError(f"{file.parent} has a report already; choose another --out, or --overwrite")


def write(folder: Path, outcome: Outcome, summary: dict) -> list[Path]:
    """Write the report on an evaluation; returns the paths written.

    images.csv has one row per image, summary.json the numbers of `summarize`. certified_over_radius.png shows clean,
    PGD and certified accuracy over the radius, local_over_global.png the histogram of the two Lipschitz bounds' ratio,
    eliminated.png the share of rows and columns that the ball switches off, layer by layer.
    """
    utils.write_csv(folder / "images.csv", _image_rows(outcome))
    text = json.dumps(summary, indent=2) + "\n"
    utils.write_atomically(folder / "summary.json", lambda temporary: temporary.write_text(text))
    epsilon = summary["epsilon"]
    pictures = {
        "certified_over_radius.png": _certified_over_radius(outcome, epsilon),
        "local_over_global.png": _local_over_global(outcome, epsilon),
        "eliminated.png": _eliminated(outcome, epsilon),
    }
    for name, figure in pictures.items():
        _save(figure, folder / name)
    return [folder / name for name in ("images.csv", "summary.json", *pictures)]


def _image_rows(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "index": i,
            "label": outcome.label[i],
            "prediction": outcome.prediction[i],
            "pgd_correct": int(outcome.pgd[i]),
            "certified": int(outcome.certified[i]),
            "margin": f"{outcome.margin[i]:.6g}",
            "worst_margin": f"{outcome.worst_margin[i]:.6g}",
            "local_bound": f"{outcome.local_bound[i]:.6g}",
            "global_bound": f"{outcome.global_bound[i]:.6g}",
            "global_radius": f"{outcome.global_radius[i]:.6g}",
        }
        for i in range(len(outcome.label))
    ]


def _certified_over_radius(outcome: Outcome, epsilon: float) -> Figure:
    outcome = outcome.take(~np.isnan(outcome.certified_over_radius).any(axis=1))
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    end = CERTIFIED_MULTIPLES[-1] * epsilon or 1.0
    fine = np.linspace(0, end, 400)
    by_global = 100 * (outcome.global_radius[None, :] > fine[:, None]).mean(axis=1)
    attacked = {0.0: outcome.clean, 1.0: outcome.pgd} | dict(zip(PGD_MULTIPLES, outcome.pgd_over_radius.T))
    multiples = sorted(attacked)
    clean = 100 * outcome.clean.mean()
    axes.axhline(clean, color=INK, linewidth=1.2, linestyle=":", label="clean")
    axes.plot(
        [m * epsilon for m in multiples],
        [100 * attacked[m].mean() for m in multiples],
        color=ATTACK,
        marker="v",
        label="under PGD",
    )
    axes.plot(
        CERTIFIED_MULTIPLES * epsilon,
        100 * outcome.certified_over_radius.mean(axis=0),
        color=LOCAL,
        linewidth=2.4,
        label="certified, local bound",
    )
    axes.plot(fine, by_global, color=GLOBAL, linewidth=1.8, linestyle="--", label="certified, global bound")
    axes.axvline(epsilon, color=INK, linewidth=0.8, alpha=0.4)
    axes.annotate(f"ε = {epsilon:.4g}", (epsilon, 1), xytext=(5, 2), textcoords="offset points", color=INK, fontsize=9)
    axes.set(xlim=(0, end), ylim=(0, 100), xlabel="L2 radius (pixels in [0, 1])", ylabel="accuracy (%)")
    axes.set_title(f"Accuracy over radius, {len(outcome.label):,} test images", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    return figure


def bounds_and_slopes(everywhere: np.ndarray, local: np.ndarray, slope: np.ndarray, epsilon: float, path: Path) -> None:
    """Draw both Lipschitz bounds and the steepest slope that an attack found, image by image.

    everywhere, local, slope: (N,), sorted by `local` for the picture. path: of the PNG.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    order, places = np.argsort(local), np.arange(len(local))
    axes.plot(places, everywhere[order], color=GLOBAL, linewidth=1.8, linestyle="--", label="global bound")
    axes.plot(places, local[order], color=LOCAL, linewidth=2.4, label="local bound")
    axes.plot(places, slope[order], "v", color=ATTACK, markersize=3.5, label="steepest slope found")
    axes.set(xlim=(0, max(len(local) - 1, 1)), ylim=(0, None), xlabel="image", ylabel="Lipschitz constant")
    axes.set_title(f"How tight the bound is in the ball, ε = {epsilon:.4g}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)
    _save(figure, path)


def _local_over_global(outcome: Outcome, epsilon: float) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    ratio = _ratio(outcome)
    ratio = ratio[np.isfinite(ratio)]
    axes.hist(ratio, bins=np.linspace(0, max(1.0, ratio.max(initial=0)), 51), color=LOCAL)
    median = float(np.median(ratio)) if len(ratio) else 0.0
    axes.axvline(median, color=INK, linewidth=1)
    axes.annotate(
        f"median {median:.3f}",
        (median, 1),
        xycoords=("data", "axes fraction"),
        xytext=(-6, -12),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=INK,
    )
    axes.set(xlim=(0, None), xlabel="local / global Lipschitz bound", ylabel="test images")
    axes.set_title(f"How much smaller the local bound is at ε = {epsilon:.4g}", loc="left", fontsize=11)
    _tidy(axes)
    return figure


def _eliminated(outcome: Outcome, epsilon: float) -> Figure:
    layers = outcome.eliminated_rows.shape[1]
    figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
    places = np.arange(layers)
    axes.bar(places - 0.2, 100 * outcome.eliminated_rows.mean(axis=0), 0.38, color=LOCAL, label="rows")
    axes.bar(places + 0.2, 100 * outcome.eliminated_columns.mean(axis=0), 0.38, color=GLOBAL, label="columns")
    axes.set(ylim=(0, 100), xlabel="linear layer", ylabel="switched off (%)")
    axes.set_xticks(places, [str(place + 1) for place in places])
    axes.set_title(f"Rows and columns that cannot matter in the ball, ε = {epsilon:.4g}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, ncols=2)
    _tidy(axes)
    return figure


def _tidy(axes: plt.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    utils.write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    plt.close(figure)


# --- table of all summaries ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        job: name of the training job; its evaluation is evaluate-JOB.
        title: what it trains.
        epsilon: L2 radius of the evaluation, pixel space.
        epochs: of the whole schedule.
        paper: published clean / PGD / certified accuracy in percent; None: a recipe that is not the paper's.
        batch_size: of the recipe, in each process.
    """

    job: str
    title: str
    epsilon: float
    epochs: int
    paper: tuple[float, float, float] | None
    batch_size: int


def _row(run: utils.Run) -> Row:
    epsilon = DATA_SETS[run.data].epsilon
    title = f"{run.recipe.title}, ε = {utils.radius_text(epsilon)}, {run.title}"
    return Row(run.job, title, epsilon, run.epochs, run.paper, run.batch_size)


ROWS = tuple(map(_row, utils.RUNS))
BEGIN, END = "<!-- table: bash run_job.sh table -->", "<!-- end of table -->"


def table(results: Path) -> str:
    """All rows as Markdown: the paper's values, and what results/JOB/{proven,estimate}/summary.json found."""
    lines = [
        "| job | | paper: clean / PGD / certified (estimate) | here: clean / PGD | certified, proven "
        "| certified, estimate | remarks |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        paths = [results / row.job / kind / "summary.json" for kind in ("proven", "estimate")]
        try:
            summaries = [json.loads(path.read_text()) for path in paths if path.is_file()]
            found = _table_cells(row, summaries, read_epochs(results / row.job))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"a summary.json below {results / row.job} is damaged: {error!r}") from None
        paper = "not of the paper" if row.paper is None else " / ".join(f"{p:.1f}" for p in row.paper)
        cells = [f"`{row.job}`", row.title, paper, *found]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _table_cells(row: Row, summaries: list[dict], epochs: list[dict[str, float]]) -> list[str]:
    if not summaries:
        return ["not run", "", "", ""]
    clean, pgd = (_percent(summaries[0], name) for name in ("clean", "pgd"))
    certified = {summary["certificate"]["kind"]: _percent(summary, "certified") for summary in summaries}
    remarks = dict.fromkeys(remark for summary in summaries for remark in _remarks(row, summary))
    if len({summary["checkpoint"]["sha256"] for summary in summaries}) > 1:
        remarks["the columns are of different checkpoints"] = None
    if epochs:
        seconds = [epoch["seconds"] for epoch in epochs]
        remarks[f"trained in {sum(seconds) / 3600:.1f} h, {np.median(seconds):.0f} s an epoch"] = None
    return [
        f"{clean} / {pgd}",
        *(certified.get(kind, "not run") for kind in ("proven", "estimate")),
        "; ".join(remarks),
    ]


def _percent(summary: dict, name: str) -> str:
    return f"{summary['accuracy'][name]['percent']:.1f}"


def _remarks(row: Row, summary: dict) -> list[str]:
    """What a reader has to know before comparing with the paper."""
    training, certificate = summary["checkpoint"]["training"] or {}, summary["certificate"]
    width, epochs = summary["arguments"]["width"], training.get("epochs")
    remarks = [f"{epochs or 'unknown number of'} epochs, evaluated on {summary['hardware']}"]
    if epochs not in (None, row.epochs):
        remarks.append(f"a scaled run: {epochs} of {row.epochs} epochs")
    if training.get("batch_size", row.batch_size) != row.batch_size:
        remarks.append(f"batches of {training['batch_size']} instead of {row.batch_size}")
    if training.get("bfloat16"):
        remarks.append("convolutions of the training in bfloat16")
    if training.get("val_split"):
        remarks.append(f"the epoch picked on {training['val_split']:,} held-out training images")
    if summary["epsilon"] != row.epsilon:
        remarks.append(f"{certificate['kind']} at ε = {summary['epsilon']:g}")
    if width != 1:
        remarks.append(f"{width:g} of the width")
    if summary["images"] != 10000:
        remarks.append(f"first {summary['images']} images")
    if certificate["kind"] == "estimate" and certificate["power_iterations"] != 2000:
        remarks.append(f"estimate by {certificate['power_iterations']} power iterations")
    if certificate["clip"]:
        remarks.append("valid images only")
    if certificate.get("deployed", "exact") != "exact":
        remarks.append(f"for the {certificate['deployed']} network")
    return remarks


# Columns of a training log that are read here.
_ERRORS = ("clean_error", "certified_error", "validation_clean_error", "validation_certified_error")
_LOGGED = ("epoch", "epsilon", "seconds", *_ERRORS)


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """The rows of a training log that was copied to folder/epochs.csv; none if it was not.

    Raises:
        InputError: if it is no training log.
    """
    path = folder / "epochs.csv"
    if not path.is_file():
        return []
    try:
        with path.open(newline="") as file:
            return [{name: float(row[name]) for name in _LOGGED} for row in csv.DictReader(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no training log: {error!r}") from None


def draw_training(epochs: list[dict[str, float]], row: Row, path: Path) -> None:
    """Draw a training: accuracies on the training and the validation images by epoch, and epsilon's rise.

    epochs: rows of a training log. path: of the PNG.
    """
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    numbers = [epoch["epoch"] for epoch in epochs]
    for name, label, color in (("clean", "clean", INK), ("certified", "certified, estimate", LOCAL)):
        for prefix, style, images in (("validation_", "-", f"at ε = {row.epsilon:.4g}"), ("", ":", "in training")):
            accuracy = [100 * (1 - epoch[f"{prefix}{name}_error"]) for epoch in epochs]
            where = images if name == "certified" or prefix == "" else "validation"
            axes.plot(numbers, accuracy, style, color=color, linewidth=2 if prefix else 1.4, label=f"{label}, {where}")
    if row.paper is not None:
        for accuracy, color in ((row.paper[0], INK), (row.paper[2], LOCAL)):
            axes.axhline(accuracy, color=color, linewidth=0.8, linestyle="--", alpha=0.6)
            axes.annotate(
                f"paper {accuracy:.1f}",
                (1, accuracy),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3),
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=color,
            )
    full = next((epoch["epoch"] for epoch in epochs if epoch["epsilon"] == epochs[-1]["epsilon"]), numbers[-1])
    axes.axvspan(numbers[0], full, color=GLOBAL, alpha=0.1, linewidth=0, label="ε rises")
    axes.set(xlim=(numbers[0], numbers[-1]), ylim=(0, 100), xlabel="epoch", ylabel="accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_title(f"{row.title}\n{len(epochs)} of {row.epochs} epochs", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
    _tidy(axes)
    _save(figure, path)


def main() -> None:
    """Print the table, put it into the README between its two marks, and draw the trainings."""
    text = "Put all summaries below results/ into the table of the README, and draw results/JOB/epochs.csv."
    utils.ArgumentParser(text).parse_args()
    here = Path(__file__).resolve().parent
    readme = here / "README.md"
    text = readme.read_text()
    if BEGIN not in text or END not in text:
        raise InputError(f"{readme} has no lines '{BEGIN}' and '{END}'")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = table(here / "results")
    for row in ROWS:
        epochs = read_epochs(here / "results" / row.job)
        if epochs:
            draw_training(epochs, row, here / "results" / row.job / "training.png")
    utils.write_atomically(readme, lambda temporary: temporary.write_text(f"{before}{BEGIN}\n{new}\n{END}{after}"))
    print(new)


if __name__ == "__main__":
    utils.run_script(main)
