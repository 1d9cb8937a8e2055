"""Draws the pictures of dual.md: `python docs/draw_dual.py`, from this repository's folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from locallip.bound.dual.elementwise import ClippedLine  # noqa: E402
from locallip.bound.dual.maxima import Terms  # noqa: E402
from locallip.evaluation.pictures import ATTACK, GLOBAL, INK, LOCAL, drawing  # noqa: E402
from utils import radius_text  # noqa: E402

# Evaluated on all test images, and by the product to its end.
NETWORKS = (
    "mnist-4c3f-maxmin",
    "mnist-fast",
    "mnist-best",
    "cifar10-4c3f",
    "cifar10-6c2f-maxmin",
    "cifar10-fast",
    "cifar10-muon",
    "cifar10-best",
)


def draw_unit(path: Path) -> None:
    """Draw what one unit adds to the dual, over the step of its input, and the maximum in closed form."""
    activation = ClippedLine(0.0, 1.0)
    numbers = {"center": 0.35, "a": 1.2, "g": 0.35, "t": 0.15, "c": 0.2, "lo": -1.1, "hi": 1.5}
    values = {name: torch.tensor([[number]], dtype=torch.float64) for name, number in numbers.items()}
    mu, nu = torch.tensor([[1.3]]).double(), torch.tensor([[0.8]]).double()
    terms = Terms(**values, mu=mu, nu=nu)

    def value(step: torch.Tensor) -> torch.Tensor:
        change = activation.change(terms.center, step)
        away = nu / 2 * (change - terms.c) ** 2 - mu / 2 * (step - terms.t) ** 2
        return terms.a * change - terms.g * step + away

    bends = [numbers["lo"], -numbers["center"], 1 - numbers["center"], numbers["hi"]]
    top = activation.maximum(terms).step
    with drawing(path) as axes:
        names = ("below the lower threshold", "between the thresholds", "above the upper one")
        for first, last, name, color in zip(bends, bends[1:], names, (GLOBAL, LOCAL, INK)):
            steps = torch.linspace(first, last, 200, dtype=torch.float64).reshape(-1, 1)
            axes.plot(steps, value(steps), color=color, linewidth=2.5, label=name)
        axes.axhline(value(top).item(), color=ATTACK, linewidth=1, linestyle="--")
        axes.plot(top.flatten(), value(top).flatten(), "o", color=ATTACK, label="the maximum, in closed form")
        axes.set_xlabel("step d of the unit's input, from one end of its box to the other")
        axes.set_ylabel("what the unit adds to the bound")
        axes.legend(frameon=False, loc="lower center")


def draw_gains(path: Path) -> None:
    """Draw what product and dual certify of all test images, and what the attack leaves, network by network."""
    summaries = [_summary(job, "proven") for job in NETWORKS]
    bars = (("certified_by_product", "by the product", GLOBAL), ("certified", "and by the dual", LOCAL))
    with drawing(path) as axes:
        for place, summary in enumerate(summaries):
            percent = {name: found["percent"] for name, found in summary["accuracy"].items()}
            alone = _summary(NETWORKS[place], "product")
            if alone is not None:
                percent["certified_by_product"] = alone["accuracy"]["certified"]["percent"]
            lower = 0.0
            for name, label, color in bars:
                upper = percent[name]
                axes.bar(place, upper - lower, 0.5, lower, color=color, label=None if place else label)
                axes.text(place, upper - 1, f"{upper:.1f}", color="white", ha="center", va="top")
                lower = upper
            axes.hlines(percent["pgd"], place - 0.3, place + 0.3, ATTACK, label=None if place else "left by the attack")
            axes.text(place, percent["pgd"] + 1, f"{percent['pgd']:.1f}", color=ATTACK, ha="center")
        names = [job.replace("-", "\n", 1) for job in NETWORKS]
        labels = [f"{name}\nat {radius_text(summary['epsilon'])}" for name, summary in zip(names, summaries)]
        axes.set_xticks(range(len(NETWORKS)), labels, fontsize=8.5)
        axes.set_ylim(0, 100)
        axes.set_ylabel("percent of all test images")
        axes.legend(frameon=False, loc="upper left", ncols=3)


def _summary(job: str, report: str) -> dict | None:
    path = ROOT / "results" / job / report / "summary.json"
    return json.loads(path.read_text()) if path.is_file() else None


if __name__ == "__main__":
    draw_unit(ROOT / "docs" / "dual_unit.png")
    draw_gains(ROOT / "docs" / "dual_gains.png")
