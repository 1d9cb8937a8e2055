"""The pictures: of an evaluation, of the attacks on a bound, of a training. Each draws on the axes that it is given.

Nothing of the caller's matplotlib takes part. Its backend, which notebooks export to the processes that they start,
would fail the very import where it is unknown; its style would change the pictures. Who draws nothing does not import
it.
"""

from __future__ import annotations

import itertools
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from locallip.dependencies import forget_parts
from locallip.evaluation.outcome import MULTIPLES, Outcome
from locallip.evaluation.summary import ratio
from locallip.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from locallip.evaluation.table import Row, Training

# Letters of a title that fit above a picture.
_TITLE = 78
LOCAL, GLOBAL, ATTACK, INK = "#1f6feb", "#8b949e", "#d1542b", "#24292f"


@contextmanager
def drawing(path: Path, height: float = 4.2) -> Iterator[Axes]:
    """Axes to draw on, which become a PNG when the context ends. height: in inches.

    Raises:
        InputError: if the file cannot be written.
    """
    matplotlib = _import_matplotlib()
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        figure = matplotlib.figure.Figure(figsize=(7, height), layout="constrained")
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)
        axes = figure.subplots()
        yield axes
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.set_axisbelow(True)
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))


def _import_matplotlib() -> ModuleType:
    forget_parts("matplotlib")  # somebody's import of it may have failed by its backend
    named = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib.backends.backend_agg
        import matplotlib.figure
    finally:
        if named is not None:
            os.environ["MPLBACKEND"] = named
    return matplotlib


def certified_over_radius(axes: Axes, outcome: Outcome, epsilon: float) -> None:
    """Draw clean, PGD and certified accuracy over the radius, of the images that were asked about at all radii."""
    outcome = outcome.take(~np.isnan(outcome.certified_over_radius).any(axis=1))
    end = MULTIPLES[-1] * epsilon or 1.0
    fine = np.linspace(0, end, 400)
    by_global = 100 * (outcome.global_radius[None, :] > fine[:, None]).mean(axis=1)
    clean = 100 * outcome.clean.mean()
    axes.axhline(clean, color=INK, linewidth=1.2, linestyle=":", label="clean")
    axes.plot(
        MULTIPLES * epsilon,
        100 * outcome.pgd_over_radius.mean(axis=0),
        color=ATTACK,
        marker="v",
        label="under PGD",
    )
    axes.plot(
        MULTIPLES * epsilon,
        100 * outcome.certified_over_radius.mean(axis=0),
        color=LOCAL,
        linewidth=2.4,
        marker="o",
        markersize=4,
        label="certified",
    )
    if not np.array_equal(outcome.certified_over_radius, outcome.product_over_radius):
        axes.plot(
            MULTIPLES * epsilon,
            100 * outcome.product_over_radius.mean(axis=0),
            color=LOCAL,
            linewidth=1.4,
            linestyle="-.",
            label="by the product of norms",
        )
    axes.plot(fine, by_global, color=GLOBAL, linewidth=1.8, linestyle="--", label="by the global bound")
    axes.axvline(epsilon, color=INK, linewidth=0.8, alpha=0.4)
    axes.annotate(f"ε = {epsilon:.4g}", (epsilon, 1), xytext=(5, 2), textcoords="offset points", color=INK, fontsize=9)
    axes.set(xlim=(0, end), ylim=(0, 100), xlabel="L2 radius (pixels in [0, 1])", ylabel="accuracy (%)")
    axes.set_title(f"Accuracy over radius, {len(outcome.label):,} images", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def local_over_global(axes: Axes, outcome: Outcome, epsilon: float) -> None:
    """Draw the histogram of the ratio of the two Lipschitz bounds, where the local one is smaller."""
    shares = ratio(outcome)
    shares = shares[np.isfinite(shares)]
    axes.hist(shares, bins=np.linspace(0, max(1.0, shares.max(initial=0)), 51), color=LOCAL)
    if len(shares):
        median = float(np.median(shares))
        axes.axvline(median, color=INK, linewidth=1)
        place = {"xycoords": ("data", "axes fraction"), "xytext": (-6, -12), "textcoords": "offset points"}
        axes.annotate(f"median {median:.3f}", (median, 1), **place, ha="right", fontsize=9, color=INK)
    else:
        _say_nothing_to_draw(axes, "no image's local bound is smaller than the global one")
    axes.set(xlim=(0, None), xlabel="local / global Lipschitz bound", ylabel="images")
    axes.set_title(f"How much smaller the local bound is at ε = {epsilon:.4g}", loc="left", fontsize=11)


def _say_nothing_to_draw(axes: Axes, why: str) -> None:
    axes.set(yticks=[])
    axes.text(0.5, 0.5, why, transform=axes.transAxes, ha="center", color=INK, fontsize=10)


def eliminated(axes: Axes, outcome: Outcome, epsilon: float) -> None:
    """Draw the share of rows and columns that the ball switches off, layer by layer."""
    layers = outcome.eliminated_rows.shape[1]
    places = np.arange(layers)
    axes.bar(places - 0.2, 100 * outcome.eliminated_rows.mean(axis=0), 0.38, color=LOCAL, label="rows")
    axes.bar(places + 0.2, 100 * outcome.eliminated_columns.mean(axis=0), 0.38, color=GLOBAL, label="columns")
    axes.set(ylim=(0, 100), xlabel="linear layer", ylabel="switched off (%)")
    axes.set_xticks(places, [str(place + 1) for place in places])
    axes.set_title(f"Rows and columns that cannot matter in the ball, ε = {epsilon:.4g}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9, ncols=2)


def bounds_and_slopes(
    axes: Axes, global_bound: np.ndarray, local_bound: np.ndarray, slope: np.ndarray, epsilon: float
) -> None:
    """Draw both Lipschitz bounds and the steepest slope that an attack found, image by image.

    global_bound, local_bound, slope: (N,), sorted by the local bound for the picture.
    """
    order, places = np.argsort(local_bound), np.arange(len(local_bound))
    axes.plot(places, global_bound[order], color=GLOBAL, linewidth=1.8, linestyle="--", label="global bound")
    axes.plot(places, local_bound[order], color=LOCAL, linewidth=2.4, label="local bound")
    axes.plot(places, slope[order], "v", color=ATTACK, markersize=3.5, label="steepest slope found")
    axes.set(xlim=(0, max(len(slope) - 1, 1)), ylim=(0, None), xlabel="image", ylabel="Lipschitz constant")
    axes.set_title(f"How tight the bound is in the ball, ε = {epsilon:.4g}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def bound_over_attained(axes: Axes, product: np.ndarray, dual: np.ndarray, epsilon: float) -> None:
    """Draw the share of images whose bound on the drop of the margin is so many times what an attack attained.

    product, dual: (N,) ratios; NaN, or infinite where nothing was attained, are left out.
    """
    for ratios, color, label in ((product, GLOBAL, "product of norms"), (dual, LOCAL, "dual")):
        ratios = np.sort(ratios[np.isfinite(ratios)])
        if len(ratios):
            shares = 100 * np.arange(1, len(ratios) + 1) / len(ratios)
            axes.step(ratios, shares, color=color, linewidth=2, where="post", label=label)
    if not axes.lines:
        _say_nothing_to_draw(axes, "no certified image whose margin an attack lowers")
    axes.axvline(1, color=ATTACK, linewidth=1.2, linestyle=":", label="attained by an attack")
    axes.set(
        xlim=(0.95, None), ylim=(0, 100), xlabel="bound on the drop / attained drop", ylabel="certified images (%)"
    )
    axes.set_title(f"How tight certificates are at ε = {epsilon:.4g}", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=9)


def over_minutes(axes: Axes, trainings: Sequence[Training]) -> None:
    """Draw what trainings on one data set certify over the time they took, what is proven, and the paper in the end."""
    looks = itertools.product(("-", "-.", ":"), (LOCAL, INK, ATTACK, GLOBAL))
    for training, (style, color) in zip(trainings, itertools.cycle(looks)):
        row, epochs = training.row, training.epochs
        minutes = training.before + np.cumsum([epoch["seconds"] for epoch in epochs]) / 60
        certified = [100 * (1 - epoch["validation_certified_error"]) for epoch in epochs]
        after = f" after {row.after}" if row.after else ""
        label = f"{row.job}, {len(epochs)} of {row.epochs} epochs{training.place}{after}"
        axes.plot(minutes, certified, style, color=color, label=label)
        if training.proven is not None:
            ends = [minutes[-1]] * 2, [certified[-1], training.proven]
            axes.plot(*ends, ":", color=color, linewidth=0.8, marker="o", markevery=[1])
            place = {"xytext": (5, -3), "textcoords": "offset points", "fontsize": 8, "color": color}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # lines of others may pass there
            axes.annotate(f"{training.proven:.1f}", (minutes[-1], training.proven), **place, bbox=box)
    if any(training.proven is not None for training in trainings):
        axes.plot([], [], "o", color=INK, label="proven of the test images, with the dual, in the end")
    papers = [training.row.paper[2] for training in trainings if training.row.paper is not None]
    for best in papers and [max(papers)]:
        axes.axhline(best, color=INK, linewidth=0.8, linestyle="--", label=f"the paper's best estimate, {best:.1f}")
    end = 1.06 * axes.dataLim.x1  # room for the last number
    top = 1.08 * axes.dataLim.y1
    axes.set(
        xlabel="minutes of training", ylabel="certified by the product, estimate (%)", xlim=(0, end), ylim=(0, top)
    )
    axes.set_title(f"{trainings[0].row.data}, validation images", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.12))


def training(axes: Axes, epochs: list[dict[str, float]], row: Row) -> None:
    """Draw a training: accuracies on the training and the validation images by epoch, and epsilon's rise.

    epochs: rows of a training log. row: what was trained.
    """
    numbers = [epoch["epoch"] for epoch in epochs]
    for name, label, color in (("clean", "clean", INK), ("certified", "certified, estimate", LOCAL)):
        radius = row.epsilon if row.validated_at is None else row.validated_at
        for prefix, style, images in (("validation_", "-", f"at ε = {radius:.4g}"), ("", ":", "in training")):
            accuracy = [100 * (1 - epoch[f"{prefix}{name}_error"]) for epoch in epochs]
            where = images if name == "certified" or prefix == "" else "validation"
            axes.plot(numbers, accuracy, style, color=color, linewidth=2 if prefix else 1.4, label=f"{label}, {where}")
    if row.paper is not None:
        for name, accuracy, color in (("clean", row.paper[0], INK), ("certified", row.paper[2], LOCAL)):
            axes.axhline(accuracy, color=color, linewidth=0.8, linestyle="--", alpha=0.6)
            is_below = 100 * (1 - epochs[-1][f"validation_{name}_error"]) < accuracy
            axes.annotate(
                f"paper {accuracy:.1f}",
                (1, accuracy),
                xycoords=("axes fraction", "data"),
                xytext=(-2, 3 if is_below else -11),  # on the side where the curve does not end
                textcoords="offset points",
                ha="right",
                fontsize=8,
                color=color,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},  # curves may pass there
            )
    full = next((epoch["epoch"] for epoch in epochs if epoch["epsilon"] == epochs[-1]["epsilon"]), numbers[-1])
    if full > numbers[0]:
        axes.axvspan(numbers[0], full, color=GLOBAL, alpha=0.1, linewidth=0, label="ε rises")
    axes.set(xlim=(numbers[0], numbers[-1]), ylim=(0, 100), xlabel="epoch", ylabel="accuracy (%)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    title = textwrap.fill(row.title, _TITLE)
    axes.set_title(f"{title}\n{len(epochs)} of {row.epochs} epochs", loc="left", fontsize=11)
    axes.legend(frameon=False, fontsize=8)
