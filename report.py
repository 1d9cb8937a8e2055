"""What an evaluation leaves behind: one CSV row per image, and pictures."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np

import utils

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from evaluate import Outcome

LOCAL, GLOBAL, ATTACK, INK = "#1f6feb", "#8b949e", "#d1542b", "#24292f"


def write(folder: Path, outcome: Outcome, epsilon: float, radii: np.ndarray) -> list[Path]:
    """Write the report on an evaluation; returns the paths written.

    images.csv: one row per image. certified_over_radius.png: the share of images certified at least to a radius.

    radii: (R,) of `outcome.certified_over_radius` (N, R), pixel space.
    """
    table, picture = folder / "images.csv", folder / "certified_over_radius.png"
    utils.write_atomically(table, lambda temporary: temporary.write_text(_images_csv(outcome)))
    _save(_certified_over_radius(outcome, epsilon, radii), picture)
    return [table, picture]


def _images_csv(outcome: Outcome) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(
        [
            "index",
            "label",
            "prediction",
            "pgd_correct",
            "certified",
            "margin",
            "worst_margin",
            "local_bound",
            "global_bound",
        ]
    )
    for i in range(len(outcome.label)):
        writer.writerow(
            [i, outcome.label[i], outcome.prediction[i], int(outcome.pgd[i]), int(outcome.certified[i])]
            + [f"{column[i]:.6g}" for column in (outcome.margin, outcome.worst_margin, outcome.local_bound, outcome.global_bound)]
        )  # fmt: skip
    return text.getvalue()


def _certified_over_radius(outcome: Outcome, epsilon: float, radii: np.ndarray) -> Figure:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    by_local = 100 * outcome.certified_over_radius.mean(axis=0)
    fine = np.linspace(0, radii[-1], 400)
    by_global = 100 * (outcome.global_radius[None, :] > fine[:, None]).mean(axis=1)
    axes.plot(radii, by_local, color=LOCAL, linewidth=2.2, marker="o", markersize=3.5, label="certified, local bound")
    axes.plot(fine, by_global, color=GLOBAL, linewidth=1.8, linestyle="--", label="certified, global bound")
    axes.plot([0], [100 * outcome.clean.mean()], "s", color=INK, label="clean", clip_on=False, zorder=5)
    axes.plot([epsilon], [100 * outcome.pgd.mean()], "v", color=ATTACK, markersize=8, label="under PGD", zorder=5)
    axes.axvline(epsilon, color=INK, linewidth=0.8, alpha=0.4)
    axes.annotate(f"ε = {epsilon:.4g}", (epsilon, 2), xytext=(5, 0), textcoords="offset points", color=INK, fontsize=9)
    axes.set(xlim=(0, radii[-1] or 1), ylim=(0, 100), xlabel="L2 radius (pixels in [0, 1])", ylabel="accuracy (%)")
    axes.set_title(f"Certified accuracy over radius, {len(outcome.label):,} test images", loc="left", fontsize=11)
    _tidy(axes)
    axes.legend(frameon=False, loc="upper right", fontsize=9)
    return figure


def _tidy(axes: plt.Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.set_axisbelow(True)


def _save(figure: Figure, path: Path) -> None:
    utils.write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
    plt.close(figure)
