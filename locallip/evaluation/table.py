"""The table of all summaries: what results/JOB/{proven,estimate}/summary.json found, beside the paper's values."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from locallip.evaluation import pictures
from locallip.files import InputError, write_atomically


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


BEGIN, END = "<!-- table: bash run_job.sh table -->", "<!-- end of table -->"


def table(rows: Sequence[Row], results: Path) -> str:
    """Rows as Markdown: the paper's values, and what results/JOB/{proven,estimate}/summary.json found."""
    lines = [
        "| job | | paper: clean / PGD / certified (estimate) | here: clean / PGD | certified, proven "
        "| certified, estimate | remarks |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        paths = [results / row.job / kind / "summary.json" for kind in ("proven", "estimate")]
        try:
            summaries = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
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
    if summary["arguments"].get("held_out"):
        remarks.append("of held-out training images, not of the test set")
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
        with path.open(newline="", encoding="utf-8") as file:
            return [{name: float(row[name]) for name in _LOGGED} for row in csv.DictReader(file)]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no training log: {error!r}") from None


def refresh(readme: Path, rows: Sequence[Row], results: Path) -> str:
    """Put the table into the README between its two marks, draw the trainings, and return the table.

    Raises:
        InputError: if the marks are not there, or a summary or training log is damaged.
    """
    text = readme.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise InputError(f"{readme} has no lines '{BEGIN}' and '{END}'")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    new = table(rows, results)
    for row in rows:
        epochs = read_epochs(results / row.job)
        if epochs:
            with pictures.drawing(results / row.job / "training.png") as axes:
                pictures.training(axes, epochs, row)
    whole = f"{before}{BEGIN}\n{new}\n{END}{after}"
    write_atomically(readme, lambda temporary: temporary.write_text(whole, encoding="utf-8"))
    return new
