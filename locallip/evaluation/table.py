"""The table of all summaries: what results/JOB/*/summary.json found, beside the paper's values."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from locallip.bound.stages import comes_before_better_norms
from locallip.evaluation import pictures
from locallip.files import InputError, write_atomically
from locallip.training.files import better, errors


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
        data: what the data set is called.
        classes: of the whole data set.
        start_from: the file with whose weights the training begins; None: it begins afresh.
        after: the job that made this file.
        validated_at: the L2 radius that the training validates at; None: that of the evaluation.
    """

    job: str
    title: str
    epsilon: float
    epochs: int
    paper: tuple[float, float, float] | None
    batch_size: int
    data: str
    classes: int
    start_from: str | None = None
    after: str | None = None
    validated_at: float | None = None


# The test images of every data set of the paper.
_TEST_IMAGES = 10000
# The marks in the README between which the table stands, and in the report on the results what is said of its rows.
BEGIN, END = "<!-- table: bash run_job.sh table -->", "<!-- end of table -->"
BEGIN_REMARKS, END_REMARKS = "<!-- remarks: bash run_job.sh table -->", "<!-- end of remarks -->"
_COLUMNS = (
    "job",
    "",
    "paper: clean / PGD / certified",
    "here: clean / PGD",
    "estimate, as the paper's",
    "proven by product",
    "**proven**",
    "trained",
)
# The folders of a job's reports: all stages of the proof, those before the dual alone, the paper's protocol.
_REPORTS = ("proven", "product", "estimate")


@dataclass(frozen=True)
class Training:
    """A training beside others.

    Attributes:
        row: what was trained.
        epochs: rows of its log.
        before: minutes that the training took with whose weights it begins.
        proven: percent of the test images that are certified with its weights; None: nothing tells.
        place: what it ran on, ` on a GPU`; empty: on a CPU, or nothing tells.
    """

    row: Row
    epochs: list[dict[str, float]]
    before: float = 0.0
    proven: float | None = None
    place: str = ""


@dataclass(frozen=True)
class Found:
    """What the summaries of a row found, ready for the table.

    Attributes:
        accuracies: clean and PGD, estimate, proven by the product of norms, proven in all.
        trained: how long, and whatever else forbids to compare a figure with the paper's as it stands.
        remarks: everything else in which the run differs from the recipe, and on what it was evaluated.
        proven: the last of the accuracies in percent; None: not run, or not on test images.
        place: see `Training`.
    """

    accuracies: tuple[str, str, str, str]
    trained: str
    remarks: str
    proven: float | None = None
    place: str = ""


_NOT_RUN = Found(("not run", "", "", ""), "", "")


def table(rows: Sequence[Row], results: Path) -> str:
    """Rows as Markdown: the paper's values, and what results/JOB/*/summary.json found.

    A row that is not of the paper is left out until it has results.

    Raises:
        InputError: if a summary or a training log is damaged.
    """
    lines = [_COLUMNS, ("---",) * len(_COLUMNS)]
    for row in rows:
        found = _found(row, results)
        if found is _NOT_RUN and row.paper is None:
            continue
        paper = "not of the paper" if row.paper is None else " / ".join(f"{p:.1f}" for p in row.paper)
        *others, proven = found.accuracies
        lines.append((f"`{row.job}`", row.title, paper, *others, proven and f"**{proven}**", found.trained))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def remarks(rows: Sequence[Row], results: Path) -> str:
    """A line for each row that was run: in what it differs from its recipe; errors as `table`."""
    found = {row.job: _found(row, results).remarks for row in rows}
    return "\n".join(f"* `{job}`: {remark}" for job, remark in found.items() if remark)


def _found(row: Row, results: Path) -> Found:
    paths = {report: results / row.job / report / "summary.json" for report in _REPORTS}
    epochs = read_epochs(results / row.job)
    try:
        summaries = {
            report: json.loads(path.read_text(encoding="utf-8")) for report, path in paths.items() if path.is_file()
        }
        return _compiled(row, summaries, epochs) if summaries else _NOT_RUN
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"a summary.json below {results / row.job} is damaged: {error!r}") from None


def _compiled(row: Row, by_report: dict[str, dict], epochs: list[dict[str, float]]) -> Found:
    summaries = list(by_report.values())
    attacked = " / ".join(_percent(summaries[0], name) for name in ("clean", "pgd"))
    estimate, proven, product = "not run", "not run", ""
    if "estimate" in by_report:
        estimate = _percent(by_report["estimate"], "certified")
    if "proven" in by_report:
        proven = _percent(by_report["proven"], "certified")
        product = _by_product(by_report["proven"])
    if "product" in by_report:  # the dual takes over where the product would go on with better norms
        product = _percent(by_report["product"], "certified")
    warnings = dict.fromkeys(warning for summary in summaries for warning in _warnings(row, summary))
    details = dict.fromkeys(detail for summary in summaries for detail in _details(row, summary))
    if len({summary["checkpoint"]["sha256"] for summary in summaries}) > 1:
        warnings["the columns are of different checkpoints"] = None
    training, place = summaries[0]["checkpoint"]["training"] or {}, _place(summaries[0]["checkpoint"])
    if epochs:
        if len(epochs) < training.get("epochs", 0):
            warnings[f"stopped after {len(epochs)}"] = None
        seconds = [epoch["seconds"] for epoch in epochs]
        warnings[f"{_duration(sum(seconds))}{place}"] = None
        details[f"{np.median(seconds):.0f} s an epoch"] = None
    tested = "proven" in by_report and not by_report["proven"]["arguments"].get("held_out")
    percent = by_report["proven"]["accuracy"]["certified"]["percent"] if tested else None
    return Found((attacked, estimate, product, proven), ", ".join(warnings), "; ".join(details), percent, place)


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds < 1800 else f"{seconds / 3600:.1f} h"


def _by_product(summary: dict) -> str:
    """Proven by the product in a report on all stages; a lower end if the dual was asked before better norms were."""
    by_dual = "certified_by_product" in summary["accuracy"]  # reports from before the dual lack it
    goes_on = any(comes_before_better_norms(stage) for stage in summary.get("decided_by", ()))
    return f"{'≥ ' if goes_on else ''}{_percent(summary, 'certified_by_product' if by_dual else 'certified')}"


def _place(checkpoint: dict) -> str:
    hardware = checkpoint.get("hardware")
    if hardware is None:  # what came before it was noted
        return " on a GPU" if (checkpoint["training"] or {}).get("cuda_graph") == "yes" else ""
    return "" if hardware.startswith("CPU") else " on a GPU"


def _percent(summary: dict, name: str) -> str:
    return f"{summary['accuracy'][name]['percent']:.1f}"


def _warnings(row: Row, summary: dict) -> list[str]:
    """What a reader has to know before comparing with the paper."""
    training, certificate = summary["checkpoint"]["training"] or {}, summary["certificate"]
    width, epochs = summary["arguments"]["width"], training.get("epochs")
    classes = summary.get("classes", row.classes)  # older reports are all of whole data sets
    of_all = "" if epochs in (None, row.epochs) else f" of {row.epochs}"
    warnings = [f"{epochs or 'unknown number of'}{of_all} epochs{_after(row, training.get('start_from'))}"]
    if summary["arguments"].get("held_out"):
        warnings.append("of held-out training images, not of the test set")
    if summary["epsilon"] != row.epsilon:
        warnings.append(f"{certificate['kind']} at ε = {summary['epsilon']:g}")
    if width != 1:
        warnings.append(f"{width:g} of the width")
    if classes != row.classes:
        warnings.append(f"{classes} of {row.classes} classes")
    if summary["images"] != _TEST_IMAGES * classes // row.classes:
        warnings.append(f"evaluated on the first {summary['images']:,} images")
    if certificate["clip"]:
        warnings.append("valid images only")
    if certificate.get("deployed", "exact") != "exact":
        warnings.append(f"for the {certificate['deployed']} network")
    return warnings


def _after(row: Row, start_from: str | None) -> str:
    """With which weights a training began, if it did not begin afresh."""
    if start_from is None:
        return ""
    return f" after `{row.after}`" if start_from == row.start_from else f" from {Path(start_from).name}"


def _details(row: Row, summary: dict) -> list[str]:
    """Further differences from the recipe, and the hardware."""
    training, certificate = summary["checkpoint"]["training"] or {}, summary["certificate"]
    details = [f"evaluated on {summary['hardware']}"]
    if training.get("batch_size", row.batch_size) != row.batch_size:
        details.append(f"batches of {training['batch_size']} instead of {row.batch_size}")
    if training.get("bfloat16"):
        details.append("convolutions of the training in bfloat16")
    if training.get("val_split"):
        details.append(f"the epoch picked on {training['val_split']:,} held-out training images")
    if certificate["kind"] == "estimate" and certificate["power_iterations"] != 2000:
        details.append(f"estimate by {certificate['power_iterations']} power iterations")
    return details


# Columns of a training log that are read here.
_ERRORS = ("clean_error", "certified_error", "validation_clean_error", "validation_certified_error")
_LOGGED = ("epoch", "epsilon", "seconds", *_ERRORS)


def read_epochs(folder: Path) -> list[dict[str, float]]:
    """The rows of a training log that was copied to folder/epochs.csv; none if it was not.

    The validation's errors are those of the weights or of their average, whichever the run would keep.

    Raises:
        InputError: if it is no training log.
    """
    path = folder / "epochs.csv"
    if not path.is_file():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [{name: float(number) for name, number in row.items()} for row in csv.DictReader(file)]
        return [{name: row[name] for name in _LOGGED} | _kept(row) for row in rows]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no training log: {error!r}") from None


def _kept(row: dict[str, float]) -> dict[str, float]:
    certified, clean = errors(row, better(row))
    return {"validation_certified_error": certified, "validation_clean_error": clean}


def refresh(root: Path, rows: Sequence[Row]) -> str:
    """Put the table into root/README.md, the remarks into root/results/README.md, draw the trainings; the table.

    Raises:
        InputError: if the marks are not there, or a summary or training log is damaged.
    """
    results = root / "results"
    new = table(rows, results)
    texts = {
        root / "README.md": (BEGIN, new, END),
        results / "README.md": (BEGIN_REMARKS, remarks(rows, results), END_REMARKS),
    }
    whole = {path: _with_block(path, *block) for path, block in texts.items()}
    _draw_trainings(rows, results)
    for path, text in whole.items():
        write_atomically(path, lambda temporary, text=text: temporary.write_text(text, encoding="utf-8"))
    return new


def _draw_trainings(rows: Sequence[Row], results: Path) -> None:
    """Every training by itself; those on one data set, validated alike, beside each other.

    Mere beginnings of others are left out there.
    """
    trainings = _trainings(rows, results)
    for training in trainings:
        with pictures.drawing(results / training.row.job / "training.png") as axes:
            pictures.training(axes, training.epochs, training.row)
    begun = {training.row.after for training in trainings}
    ended = [training for training in trainings if training.proven is not None or training.row.job not in begun]
    for data in {training.row.data for training in ended}:
        of_data = [training for training in ended if training.row.data == data and _is_validated_as_usual(training.row)]
        if len(of_data) > 1:
            with pictures.drawing(results / f"{data.lower().replace(' ', '-')}-over-minutes.png", 5.2) as axes:
                pictures.over_minutes(axes, of_data)


def _is_validated_as_usual(row: Row) -> bool:
    return row.validated_at in (None, row.epsilon)


def _trainings(rows: Sequence[Row], results: Path) -> list[Training]:
    """Those that left a log and, if they go on with the weights of another, can be placed after it."""
    logs = {row.job: (row, epochs) for row in rows if (epochs := read_epochs(results / row.job))}

    def minutes_before(row: Row) -> float:
        """NaN where a log is missing on the way."""
        if row.after is None:
            return 0.0
        if row.after not in logs:
            return np.nan
        before, epochs = logs[row.after]
        return minutes_before(before) + sum(epoch["seconds"] for epoch in epochs) / 60

    trainings = []
    for row, epochs in logs.values():
        found, before = _found(row, results), minutes_before(row)
        if not np.isnan(before):
            trainings.append(Training(row, epochs, before, found.proven, found.place))
    return trainings


def _with_block(path: Path, begin: str, block: str, end: str) -> str:
    """The text of a file with another block between two marks."""
    text = path.read_text(encoding="utf-8")
    if begin not in text or end not in text:
        raise InputError(f"{path} has no lines '{begin}' and '{end}'")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{block}\n{end}{after}"
