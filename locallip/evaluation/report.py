"""The files of a report: a CSV row per image, the summary, pictures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from locallip.evaluation import pictures
from locallip.evaluation.outcome import Outcome
from locallip.files import InputError, exists, write_atomically, write_csv

# How each is drawn, and its height in inches.
_PICTURES = {
    "certified_over_radius.png": (pictures.certified_over_radius, 4.2),
    "local_over_global.png": (pictures.local_over_global, 3.6),
    "eliminated.png": (pictures.eliminated, 3.6),
}


def refuse_existing(file: Path, overwrite: bool) -> None:
    """Refuse to replace a report of which this is a file, unless asked to.

    Raises:
        InputError: if it exists and `overwrite` is False.
    """
    if not overwrite and exists(file):
        raise InputError(f"{file.parent} has a report already; choose another --out, or --overwrite")


def write(folder: Path, outcome: Outcome, summary: dict) -> list[Path]:
    """Write the report on an evaluation; returns the paths written.

    images.csv has one row per image, summary.json the numbers of `summarize`. certified_over_radius.png shows clean,
    PGD and certified accuracy over the radius, local_over_global.png the histogram of the two Lipschitz bounds' ratio,
    eliminated.png the share of rows and columns that the ball switches off, layer by layer.
    """
    write_csv(folder / "images.csv", _image_rows(outcome))
    text = json.dumps(summary, indent=2) + "\n"
    write_atomically(folder / "summary.json", lambda temporary: temporary.write_text(text, encoding="utf-8"))
    for name, (picture, height) in _PICTURES.items():
        with pictures.drawing(folder / name, height) as axes:
            picture(axes, outcome, summary["epsilon"])
    return [folder / name for name in ("images.csv", "summary.json", *_PICTURES)]


def _image_rows(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {
            "index": i,
            "label": outcome.label[i],
            "prediction": outcome.prediction[i],
            "pgd_correct": int(outcome.pgd[i]),
            "certified": int(outcome.certified[i]),
            "decided_by": outcome.decided_by[i],
            "margin": f"{outcome.margin[i]:.6g}",
            "worst_margin": f"{outcome.worst_margin[i]:.6g}",
            "local_bound": f"{outcome.local_bound[i]:.6g}",
            "global_bound": f"{outcome.global_bound[i]:.6g}",
            "global_radius": f"{outcome.global_radius[i]:.6g}",
        }
        for i in range(len(outcome.label))
    ]
