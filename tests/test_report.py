import argparse
import hashlib
import json
import shutil
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from conftest import ROOT, read_csv
from hypothesis import given, settings
from hypothesis import strategies as st

import table as table_script
import utils
from locallip.evaluation import pictures, report, table
from locallip.evaluation.outcome import MULTIPLES, Outcome
from locallip.evaluation.summary import as_text, summarize, wilson_interval
from locallip.files import InputError

ROWS = [table_script.row(run) for run in utils.RUNS]

examples = settings(max_examples=100, deadline=None, derandomize=True, database=None)

PICTURES = ("certified_over_radius.png", "local_over_global.png", "eliminated.png")

# --- intervals


@pytest.mark.parametrize(
    ("count", "total", "expected"),
    [(0, 10, (0, 0.2775)), (5, 10, (0.2366, 0.7634)), (10, 10, (0.7225, 1)), (0, 1, (0, 0.7935))],
)
def test_wilson_intervals_are_the_known_ones(count, total, expected):
    assert wilson_interval(count, total) == pytest.approx(expected, abs=5e-5)


@st.composite
def shares(draw):
    total = draw(st.integers(1, 20_000))
    return draw(st.integers(0, total)), total


@examples
@given(shares())
def test_the_interval_holds_the_share_and_lies_between_0_and_1(share):
    count, total = share
    low, high = wilson_interval(count, total)
    assert 0 <= low <= count / total + 1e-12
    assert count / total - 1e-12 <= high <= 1


@examples
@given(shares())
def test_more_successes_move_the_interval_up_and_more_images_narrow_it(share):
    count, total = share
    low, high = wilson_interval(count, total)
    higher_low, higher_high = wilson_interval(count + 1, total + 1)
    assert higher_low > low
    assert higher_high >= high - 1e-12
    narrow_low, narrow_high = wilson_interval(4 * count, 4 * total)
    assert narrow_high - narrow_low < high - low


# --- summary and files

ESTIMATE = {"kind": "estimate", "power_iterations": 70, "clip": False}
PROVEN = {"kind": "proven", "failure_probability": 1e-6, "seed": 5, "deployed": "exact", "clip": False}


def outcome_of(images, certified=1):
    """A made-up evaluation: all images right, the first half kept under PGD, the first few certified."""
    row = np.arange(images)
    pgd = row < max(certified, images / 2)
    flags, kept = (np.column_stack([column] * len(MULTIPLES)) for column in (row < certified, pgd))
    return Outcome(
        label=row % 10,
        prediction=row % 10,
        clean=np.ones(images, bool),
        pgd=pgd,
        certified=row < certified,
        decided_by=np.where(row < certified, "global", "open"),
        margin=1.0 + row,
        worst_margin=np.where(row < certified, 0.25, -0.5),
        local_bound=1.0 + row / images,
        global_bound=np.full(images, 2.0),
        global_radius=0.1 + 0.0 * row,
        eliminated_rows=np.full((images, 3), 0.25),
        eliminated_columns=np.full((images, 3), 0.5),
        pgd_over_radius=kept,
        certified_over_radius=flags,
        product_over_radius=flags,
    )


@pytest.fixture
def outcome():
    return outcome_of(4)


@pytest.fixture
def summary_of():
    """The summary of an outcome on a checkpoint that is four bytes long."""
    checkpoint = hashlib.sha256(b"abcd").hexdigest()

    def summary_of(outcome, epsilon=0.3, training=None, certificate=ESTIMATE):
        args = argparse.Namespace(data="digits", epsilon=epsilon, device="cpu", out="results")
        return summarize(outcome, args, 10, checkpoint, training, None, "an abacus", certificate, 12.345)

    return summary_of


def refuse(token):
    raise ValueError(f"{token} is no JSON")


def read_json(path):
    return json.loads(path.read_text(), parse_constant=refuse)


def test_the_summary_names_how_and_on_what_the_numbers_came_about(outcome, summary_of):
    summary = summary_of(outcome, training={"epochs": 300})
    sha256 = "88d4266fd4e6338d13b845fcf289579d209c897823b9217da3e161936f031589"
    assert summary["checkpoint"] == {"sha256": sha256, "training": {"epochs": 300}, "hardware": None}
    assert summary["arguments"]["data"] == "digits"
    assert summary["certificate"] == ESTIMATE
    assert (summary["images"], summary["classes"], summary["epsilon"], summary["seconds"]) == (4, 10, 0.3, 12.3)
    assert summary["versions"].keys() >= {"python", "torch", "torchvision", "numpy", "advertorch"}
    assert summary["versions"]["numpy"] == np.__version__
    assert summary["hardware"] == "an abacus"


def test_the_summary_has_accuracies_with_counts_and_intervals(outcome, summary_of):
    accuracy = summary_of(outcome)["accuracy"]
    assert [accuracy[name]["count"] for name in ("clean", "pgd", "certified")] == [4, 2, 1]
    assert accuracy["certified"]["percent"] == 25
    assert accuracy["certified"]["interval_95"] == pytest.approx([100 * end for end in wilson_interval(1, 4)])


def test_the_summary_compares_the_two_bounds(outcome, summary_of):
    expected = {"images_with_local": 4, "local_median": 1.375, "global": 2, "local_over_global_median": 0.6875}
    assert summary_of(outcome)["lipschitz"] == expected


def test_images_whose_local_bound_is_the_global_one_do_not_count_in_the_comparison(outcome, summary_of):
    outcome.local_bound[[0, 3]] = outcome.global_bound[[0, 3]]
    expected = {"images_with_local": 2, "local_median": 1.375, "global": 2, "local_over_global_median": 0.6875}
    assert summary_of(outcome)["lipschitz"] == expected
    outcome.local_bound[:] = outcome.global_bound
    expected = {"images_with_local": 0, "local_median": None, "global": 2, "local_over_global_median": None}
    summary = summary_of(outcome)
    assert summary["lipschitz"] == expected
    assert "local / global" not in as_text(summary)


def test_the_summary_counts_broken_certificates_and_nan(outcome, summary_of):
    assert summary_of(outcome)["certified_but_broken_by_pgd"] == 0
    spoilt = replace(outcome, pgd=np.zeros(4, bool), worst_margin=np.array([1, np.nan, np.nan, -1]))
    assert summary_of(spoilt)["certified_but_broken_by_pgd"] == 1
    assert summary_of(spoilt)["not_a_number"] == 2


def test_the_text_says_everything_with_its_counts_and_that_certificates_are_estimates(outcome, summary_of):
    lines = as_text(summary_of(outcome)).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["clean", "PGD", "certified"]
    assert [line.split("(")[1].split(")")[0] for line in lines[1:4]] == ["4/4", "2/4", "1/4"]
    assert "digits: 4 test images, epsilon 0.3" in lines[0]
    assert "estimate" in lines[3]
    assert "70 power iterations" in lines[3]
    assert not any("NaN" in line for line in lines)


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        (PROVEN, "proven for the exact function, but for a probability of 1e-06"),
        (PROVEN | {"deployed": "float32"}, "proven for the float32 network"),
        (PROVEN | {"clip": True}, "proven against valid images for"),
        (ESTIMATE | {"clip": True}, "estimate against valid images: norms by 70 power iterations"),
    ],
)
def test_the_text_names_what_the_certificate_is_for(outcome, summary_of, certificate, said):
    certified = as_text(summary_of(outcome, certificate=certificate)).splitlines()[3]
    assert certified.split()[0] == "certified"
    assert said in certified


@pytest.mark.parametrize(
    ("certificate", "named"),
    [
        (PROVEN | {"stages": ["25 Lanczos steps", "dual"]}, True),
        (PROVEN | {"stages": ["25 Lanczos steps"]}, False),
        (ESTIMATE, False),
    ],
)
def test_the_text_tells_the_product_from_the_whole_where_the_dual_was_asked(outcome, summary_of, certificate, named):
    assert ("before the dual was asked" in as_text(summary_of(outcome, certificate=certificate))) == named


def test_the_text_mentions_nan_where_there_is_any(outcome, summary_of):
    outcome.worst_margin[2] = np.nan
    assert "1 images have a NaN" in as_text(summary_of(outcome))


def test_the_rows_of_the_csv_are_the_images(tmp_path, outcome, summary_of):
    report.write(tmp_path, outcome, summary_of(outcome))
    rows = read_csv(tmp_path / "images.csv")
    assert len(rows) == 4
    expected = {
        "index": "3",
        "label": "3",
        "prediction": "3",
        "pgd_correct": "0",
        "certified": "0",
        "margin": "4",
        "worst_margin": "-0.5",
        "local_bound": "1.75",
        "global_bound": "2",
    }
    assert rows[3] | expected == rows[3]


def nan_bounds(outcome):
    return replace(
        outcome,
        worst_margin=np.full_like(outcome.margin, np.nan),
        local_bound=np.full_like(outcome.margin, np.nan),
        certified=np.zeros(len(outcome.margin), bool),
    )


def with_bound(outcome, image, value):
    outcome.local_bound[image] = value
    return outcome


OUTCOMES = {
    "ordinary": (outcome_of(4), 0.3),
    "many images": (outcome_of(10_000, certified=6000), 36 / 255),
    "epsilon 0": (outcome_of(4, certified=4), 0.0),
    "all certified": (outcome_of(4, certified=4), 0.3),
    "none certified": (outcome_of(4, certified=0), 0.3),
    "one image": (outcome_of(1), 0.3),
    "a NaN": (with_bound(outcome_of(4), 1, np.nan), 0.3),
    "an infinity": (with_bound(outcome_of(4), 1, np.inf), 0.3),
    "nothing but NaN": (nan_bounds(outcome_of(4)), 0.3),
    "a dead network": (replace(outcome_of(4), local_bound=np.zeros(4), global_bound=np.zeros(4)), 0.3),
    "one layer": (replace(outcome_of(4), eliminated_rows=np.zeros((4, 1)), eliminated_columns=np.zeros((4, 1))), 0.3),
}


@pytest.fixture(params=OUTCOMES)
def written(request, tmp_path, summary_of):
    """A folder with the report of an outcome, the summary, and what `write` returned."""
    outcome, epsilon = OUTCOMES[request.param]
    summary = summary_of(outcome, epsilon)
    folder = tmp_path / "results" / "job"
    return folder, summary, report.write(folder, outcome, summary)


def test_a_report_is_five_files_and_no_more(written):
    folder, _, paths = written
    names = {"images.csv", "summary.json", *PICTURES}
    assert {path.name for path in folder.iterdir()} == {path.name for path in paths} == names


def test_the_summary_is_valid_json_for_every_reader(written):
    folder, summary, _ = written
    assert read_json(folder / "summary.json")["accuracy"] == summary["accuracy"]


def test_the_pictures_are_pictures(written):
    for name in PICTURES:
        height, width, _ = matplotlib.image.imread(written[0] / name).shape
        assert 400 < height < width < 2000


def test_the_text_of_every_outcome_has_a_line_for_each_accuracy(written):
    lines = as_text(written[1]).splitlines()
    assert [line.split()[0] for line in lines[1:4]] == ["clean", "PGD", "certified"]


@pytest.fixture
def axes(outcome, tmp_path):
    with pictures.drawing(tmp_path / "picture.png") as axes:
        pictures.certified_over_radius(axes, outcome, epsilon=0.3)
        yield axes


def test_the_curves_pass_through_the_reported_accuracies(axes):
    curves = {line.get_label(): line for line in axes.lines}
    clean, attacked, certified = (curves[name] for name in ("clean", "under PGD", "certified"))
    assert set(clean.get_ydata()) == {100}
    assert np.interp(0.3, attacked.get_xdata(), attacked.get_ydata()) == pytest.approx(50)
    assert np.interp(0.3, certified.get_xdata(), certified.get_ydata()) == pytest.approx(25)
    assert max(certified.get_xdata()) == pytest.approx(0.6)


def test_the_curve_of_the_global_bound_falls_at_its_radius(axes):
    (curve,) = (line for line in axes.lines if line.get_label() == "by the global bound")
    radius, accuracy = curve.get_xdata(), curve.get_ydata()
    assert (accuracy[radius < 0.0999] == 100).all()
    assert (accuracy[radius > 0.1001] == 0).all()


# --- table


@pytest.fixture
def repository(tmp_path, monkeypatch, command_line):
    """A copy of README.md and results/README.md, beside which `table`, called without flags, believes to stand."""
    command_line()
    shutil.copy(ROOT / "README.md", tmp_path)
    (tmp_path / "results").mkdir()
    shutil.copy(ROOT / "results" / "README.md", tmp_path / "results")
    monkeypatch.setattr(table_script, "ROOT", tmp_path)
    return tmp_path


@pytest.fixture
def finish(repository):
    """Puts a summary where the job of that name would."""

    def finish(
        job="cifar10-6c2f",
        images=10_000,
        epochs=800,
        training=True,
        kind="proven",
        report=None,
        certified=54.56,
        certificate=None,
        trained=None,
        trained_on=None,
        classes=None,
        decided_by=None,
        **arguments,
    ):
        found = {"clean": 71.23, "pgd": 65.0, "certified": certified, "certified_by_product": certified - 4}
        accuracy = {name: {"percent": percent} for name, percent in found.items()}
        arguments = {"data": "cifar10", "model": "c6f2_relux", "width": 1.0, "epsilon": 0.141} | arguments
        summary = {
            "arguments": arguments,
            "accuracy": accuracy,
            "images": images,
            "epsilon": arguments["epsilon"],
            "certificate": {"kind": kind, "power_iterations": 2000, "clip": False} | (certificate or {}),
            "checkpoint": {
                "sha256": "0",
                "training": {"epochs": epochs} | (trained or {}) if training else None,
                **({} if trained_on is None else {"hardware": trained_on}),
            },
            "hardware": "an abacus",
            "decided_by": decided_by or {},
            **({} if classes is None else {"classes": classes}),
        }
        path = repository / "results" / job / (report or kind) / "summary.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(summary))

    return finish


def row(repository, job="cifar10-6c2f"):
    (line,) = (
        line for line in table.table(ROWS, repository / "results").splitlines() if line.startswith(f"| `{job}` |")
    )
    return line


def test_a_row_of_the_paper_that_was_never_run_says_so_and_one_of_our_own_is_left_out(repository, finish):
    finish("cifar10-6c2f")
    finish("mnist-fast")
    shown = table.table(ROWS, repository / "results")
    for line in ROWS:
        assert (f"| `{line.job}` |" in shown) == (line.paper is not None or line.job == "mnist-fast")
        if line.paper is not None:
            assert ("| not run |  |  |  |  |" in row(repository, line.job)) == (line.job != "cifar10-6c2f")


def remarks(repository):
    return table.remarks(ROWS, repository / "results")


def cells(repository):
    return [cell.strip() for cell in row(repository).strip("|").split("|")]


def test_a_row_has_the_papers_values_beside_those_found(repository, finish):
    finish()
    *_, paper, here, estimate, product, proven, trained = cells(repository)
    assert (paper, here) == ("70.7 / 64.8 / 54.3", "71.2 / 65.0")
    assert (estimate, product, proven) == ("not run", "50.6", "**54.6**")
    assert trained == "800 epochs, proven at ε = 0.141"
    assert remarks(repository) == "* `cifar10-6c2f`: evaluated on an abacus"


def test_proven_and_estimated_certificates_stand_side_by_side(repository, finish):
    finish(kind="proven", certified=54.56)
    finish(kind="estimate", certified=55.01)
    *_, estimate, product, proven, _ = cells(repository)
    assert (estimate, product, proven) == ("55.0", "50.6", "**54.6**")
    assert remarks(repository).count("an abacus") == 1


@pytest.mark.parametrize(
    ("stages", "shown"),
    [(["global", "dual"], "50.6"), (["local, 25 Lanczos steps", "dual, 25 Lanczos steps"], "≥ 50.6")],
)
def test_what_the_product_proves_is_a_lower_end_where_the_dual_came_before_better_norms(
    repository, finish, stages, shown
):
    finish(decided_by=dict.fromkeys(stages, 7))
    *_, product, _, _ = cells(repository)
    assert product == shown


def test_a_report_on_the_product_alone_says_what_the_product_proves(repository, finish):
    finish(certified=40.0, report="product", certificate={"effort": "product"})
    *_, product, proven, _ = cells(repository)
    assert (product, proven) == ("40.0", "**not run**")
    finish(certified=54.56)
    *_, product, proven, _ = cells(repository)
    assert (product, proven) == ("40.0", "**54.6**")


@pytest.mark.parametrize(("epsilon", "said"), [(36 / 255, False), (0.141, True)])
def test_a_radius_below_the_one_of_the_row_is_named(repository, finish, epsilon, said):
    finish(epsilon=epsilon)
    finish(kind="estimate", epsilon=36 / 255)
    assert ("proven at ε = 0.141" in row(repository)) == said
    assert "estimate at" not in row(repository)


def test_an_estimate_of_less_effort_and_a_certificate_for_valid_images_only_are_called_so(repository, finish):
    finish(kind="proven", certificate={"clip": True})
    finish(kind="estimate", certificate={"power_iterations": 100})
    assert "valid images only" in row(repository)
    assert "estimate by 100 power iterations" in remarks(repository)


def test_a_recipe_that_is_not_the_papers_has_no_published_values(repository, finish):
    finish("mnist-4c3f-maxmin")
    assert "| not of the paper | 71.2 / 65.0 |" in row(repository, "mnist-4c3f-maxmin")


EPOCHS = """\
epoch,epsilon,lr,loss,clean_error,certified_error,validation_clean_error,validation_certified_error,seconds
1,0.79,0.001,0.6,0.07,0.2,0.04,1.0,1800
2,1.58,0.001,1.1,0.08,0.5,0.08,0.6,3600
3,1.58,0.001,1.0,0.07,0.4,0.07,0.5,1800
"""


def test_a_training_log_beside_the_reports_gives_the_time_and_a_picture(repository, finish, capsys):
    finish("mnist-4c3f")
    folder = repository / "results" / "mnist-4c3f"
    (folder / "epochs.csv").write_text(EPOCHS)
    table_script.main()
    assert "2.0 h" in row(repository, "mnist-4c3f")
    assert "1800 s an epoch" in remarks(repository)
    assert (folder / "training.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in (repository / "results").rglob("*.png")] == ["training.png"]


@pytest.mark.parametrize(
    ("recorded", "hardware", "says"),
    [("yes", None, True), ("no", None, False), ("auto", "NVIDIA H200", True), ("auto", "CPU, 2 threads (x)", False)],
)
def test_a_training_on_a_gpu_says_so_beside_its_time(repository, finish, recorded, hardware, says, monkeypatch):
    for job in ("mnist-4c3f", "mnist-fast"):
        is_first = job == "mnist-4c3f"
        finish(job, trained={"cuda_graph": recorded if is_first else "no"}, trained_on=hardware if is_first else None)
        (repository / "results" / job / "epochs.csv").write_text(EPOCHS)
    places = {}
    monkeypatch.setattr(
        pictures, "over_minutes", lambda axes, trainings: places.update({t.row.job: t.place for t in trainings})
    )
    table_script.main()
    assert ("2.0 h on a GPU |" in row(repository, "mnist-4c3f")) == says
    (repository / "results" / "mnist-4c3f" / "epochs.csv").write_text(EPOCHS.replace("00\n", "\n"))
    assert ("1 min on a GPU |" in row(repository, "mnist-4c3f")) == says
    assert places == {"mnist-4c3f": " on a GPU" if says else "", "mnist-fast": ""}


@pytest.mark.parametrize(("epochs", "said"), [(3, False), (4, True)])
def test_a_training_whose_log_ends_early_says_where(repository, finish, epochs, said):
    finish("mnist-4c3f", epochs=epochs)
    (repository / "results" / "mnist-4c3f" / "epochs.csv").write_text(EPOCHS)
    assert ("stopped after 3" in row(repository, "mnist-4c3f")) == said


def test_the_drawn_training_shows_the_logged_accuracies_and_the_papers(repository, tmp_path):
    (tmp_path / "epochs.csv").write_text(EPOCHS)
    (row,) = (row for row in ROWS if row.job == "mnist-4c3f")
    with pictures.drawing(tmp_path / "training.png") as axes:
        pictures.training(axes, table.read_epochs(tmp_path), row)
    curves = [curve.get_ydata() for curve in axes.lines]
    for accuracies in ([96, 92, 93], [0, 40, 50], [93, 92, 93], [80, 50, 60]):
        assert any(len(curve) == 3 and curve == pytest.approx(accuracies) for curve in curves)
    assert {text.get_text() for text in axes.texts} == {"paper 96.3", "paper 55.8"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.job)
def test_the_title_of_a_training_fits_its_picture(row, tmp_path):
    (tmp_path / "epochs.csv").write_text(EPOCHS)
    with pictures.drawing(tmp_path / "training.png") as axes:
        pictures.training(axes, table.read_epochs(tmp_path), row)
    axes.figure.draw_without_rendering()  # at the figure's own resolution again
    extent, picture = axes._left_title.get_window_extent(), axes.figure.bbox
    assert picture.x0 <= extent.x0 < extent.x1 <= picture.x1
    assert extent.y1 <= picture.y1


def test_trainings_on_one_data_set_are_drawn_beside_each_other(repository, finish, tmp_path):
    for job in ("mnist-4c3f", "mnist-fast", "cifar10-4c3f"):
        finish(job)
        (repository / "results" / job / "epochs.csv").write_text(EPOCHS)
    table_script.main()
    assert [path.name for path in (repository / "results").glob("*.png")] == ["mnist-over-minutes.png"]
    (row,) = (row for row in ROWS if row.job == "mnist-4c3f")
    with pictures.drawing(tmp_path / "minutes.png") as axes:
        pictures.over_minutes(axes, [table.Training(row, table.read_epochs(repository / "results" / row.job))])
    curve, paper = axes.lines
    assert curve.get_xdata() == pytest.approx([30, 90, 120])
    assert curve.get_ydata() == pytest.approx([0, 40, 50])
    assert paper.get_ydata() == pytest.approx([55.8, 55.8])


def test_what_a_training_keeps_is_drawn_the_weights_or_their_average(tmp_path):
    header, *lines = EPOCHS.splitlines()
    averages = ["averaged_clean_error,averaged_certified_error", "0.03,0.9", "0.09,0.7", "0.06,0.4"]
    (tmp_path / "epochs.csv").write_text("\n".join(map(",".join, zip([header, *lines], averages))))
    epochs = table.read_epochs(tmp_path)
    assert [epoch["validation_certified_error"] for epoch in epochs] == [0.9, 0.6, 0.4]
    assert [epoch["validation_clean_error"] for epoch in epochs] == [0.03, 0.08, 0.06]


def test_a_training_that_validates_at_another_radius_says_so_and_is_not_drawn_beside_others(
    repository, finish, monkeypatch, tmp_path
):
    jobs = ("mnist-4c3f", "mnist-fast", "mnist-fast-relu")
    for job in jobs:
        finish(job)
        (repository / "results" / job / "epochs.csv").write_text(EPOCHS)
    drawn = []
    monkeypatch.setattr(pictures, "over_minutes", lambda axes, trainings: drawn.extend(t.row.job for t in trainings))
    table_script.main()
    assert drawn == ["mnist-4c3f", "mnist-fast"]
    for job, radius in zip(jobs, ("1.58", "1.58", "0.8")):
        (row,) = (row for row in ROWS if row.job == job)
        with pictures.drawing(tmp_path / "training.png") as axes:
            pictures.training(axes, table.read_epochs(repository / "results" / job), row)
            assert f"certified, estimate, at ε = {radius}" in [line.get_label() for line in axes.lines]


def test_a_training_after_another_is_drawn_behind_it_and_ends_in_what_is_proven(repository, finish, monkeypatch):
    jobs = {"cifar10-muon": None, "cifar10-best": "cifar10-muon"}
    assert {row.job: row.after for row in ROWS if row.job in jobs} == jobs
    for job in jobs:
        finish(job)
        (repository / "results" / job / "epochs.csv").write_text(EPOCHS)
    lines = {}
    draw = pictures.over_minutes

    def drawn(axes, trainings):
        draw(axes, trainings)
        lines.update(
            {training.row.job: axes.lines[2 * place : 2 * place + 2] for place, training in enumerate(trainings)}
        )

    monkeypatch.setattr(pictures, "over_minutes", drawn)
    table_script.main()
    percent = json.loads((repository / "results/cifar10-best/proven/summary.json").read_text())["accuracy"]["certified"]
    for job, minutes in {"cifar10-muon": [30, 90, 120], "cifar10-best": [150, 210, 240]}.items():
        curve, end = lines[job]
        assert curve.get_xdata() == pytest.approx(minutes)
        assert end.get_xdata() == pytest.approx([minutes[-1]] * 2)
        assert end.get_ydata() == pytest.approx([50, percent["percent"]])


def test_a_mere_beginning_of_another_training_is_not_drawn_beside_it(repository, finish, monkeypatch):
    finish("cifar10-fast")
    for job in ("cifar10-fast-muon", "cifar10-fast", "cifar10-muon"):
        (repository / "results" / job).mkdir(parents=True, exist_ok=True)
        (repository / "results" / job / "epochs.csv").write_text(EPOCHS)
    drawn = []
    monkeypatch.setattr(pictures, "over_minutes", lambda axes, trainings: drawn.extend(t.row.job for t in trainings))
    table_script.main()
    assert drawn == ["cifar10-fast", "cifar10-muon"]


def test_a_training_whose_beginning_left_no_log_is_not_drawn(repository, finish):
    finish("cifar10-best")
    (repository / "results" / "cifar10-best" / "epochs.csv").write_text(EPOCHS)
    table_script.main()
    assert not (repository / "results" / "cifar10-best" / "training.png").exists()


@pytest.mark.parametrize("damage", [("0.79", "much"), ("epsilon", "radius"), (",1800", "")])
def test_a_damaged_training_log_is_refused(repository, finish, damage):
    folder = repository / "results" / "mnist-4c3f"
    folder.mkdir(parents=True)
    (folder / "epochs.csv").write_text(EPOCHS.replace(*damage))
    with pytest.raises(InputError, match=r"epochs\.csv is no training log"):
        table_script.main()


def test_figures_of_held_out_images_are_called_so(repository, finish):
    said = "of held-out training images, not of the test set"
    finish(held_out=0)
    assert said not in row(repository)
    finish(held_out=500)
    assert said in row(repository)


def test_a_scaled_run_is_called_so(repository, finish):
    finish(epochs=40)
    assert "40 of 800 epochs" in row(repository)


@pytest.mark.parametrize(
    ("trained", "said"),
    [
        ({"batch_size": 64}, "batches of 64 instead of 256"),
        ({"bfloat16": True}, "convolutions of the training in bfloat16"),
        ({"val_split": 2000}, "the epoch picked on 2,000 held-out training images"),
    ],
)
def test_a_run_with_other_flags_than_the_recipes_says_so(repository, finish, trained, said):
    finish(trained={"batch_size": 256, "bfloat16": False, "val_split": 0})
    assert said not in remarks(repository)
    finish(trained=trained)
    assert said in remarks(repository)


def test_a_run_that_began_from_other_weights_says_from_which(repository, finish):
    finish(trained={"start_from": "runs/maxmin/first_best.pth"})
    assert "| 800 epochs from first_best.pth, " in row(repository)
    finish("cifar10-best", trained={"start_from": "pretrained/maxmin/cifar_muon_best.pth"}, epochs=20)
    assert "| 20 epochs after `cifar10-muon`, " in row(repository, "cifar10-best")


def test_a_run_on_fewer_images_says_so(repository, finish):
    finish(images=500)
    assert "evaluated on the first 500 images" in row(repository)


def test_a_run_on_a_part_of_the_classes_says_so(repository, finish):
    finish("tinyimagenet-8c2f", images=1000, epochs=250, classes=20)
    assert "| 250 epochs, proven at ε = 0.141, 20 of 200 classes |" in row(repository, "tinyimagenet-8c2f")
    finish("tinyimagenet-8c2f", images=500, epochs=250, classes=20)
    assert "20 of 200 classes, evaluated on the first 500 images" in row(repository, "tinyimagenet-8c2f")
    finish("tinyimagenet-8c2f", epochs=250, classes=200)
    assert "classes" not in row(repository, "tinyimagenet-8c2f")


def test_a_checkpoint_that_does_not_know_its_epochs_is_no_scaled_run(repository, finish):
    finish(training=False)
    assert "unknown number of epochs" in row(repository)


@pytest.mark.parametrize("other", [{"epsilon": 0.05}, {"width": 0.25}], ids=["epsilon", "width"])
def test_a_run_with_another_radius_or_width_does_not_pass_for_the_papers(repository, finish, other):
    finish()
    published = row(repository)
    finish(**other)
    assert row(repository) != published


def test_every_line_of_the_table_has_the_same_columns(repository, finish):
    finish("cifar10-6c2f-maxmin", images=500, epochs=40)
    lines = table.table(ROWS, repository / "results").splitlines()
    assert len(lines) == 2 + sum(line.paper is not None for line in ROWS)
    assert len({line.count("|") for line in lines}) == 1


def test_the_table_refreshes_its_blocks_and_nothing_else(repository, finish, capsys):
    blocks = {
        repository / "README.md": (table.table, table.BEGIN, table.END),
        repository / "results" / "README.md": (table.remarks, table.BEGIN_REMARKS, table.END_REMARKS),
    }
    around = {}
    for path, (_, begin, end) in blocks.items():
        before, _, rest = path.read_text().partition(begin)
        around[path] = before, rest.partition(end)[2]
    for job in ("mnist-4c3f", "cifar10-6c2f"):  # the second time over the first table
        finish(job)
        table_script.main()
        for path, (text, begin, end) in blocks.items():
            before, after = around[path]
            assert path.read_text() == f"{before}{begin}\n{text(ROWS, repository / 'results')}\n{end}{after}"
    text = table.table(ROWS, repository / "results")
    assert text in capsys.readouterr().out
    assert row(repository, "cifar10-4c3f") in text


@pytest.mark.parametrize("mark", [table.BEGIN, table.END, table.BEGIN_REMARKS, table.END_REMARKS])
def test_a_readme_without_the_marks_is_refused_and_nothing_is_changed(repository, mark):
    texts = [repository / "README.md", repository / "results" / "README.md"]
    for text in texts:
        text.write_text(text.read_text().replace(mark, ""))
    before = [text.read_bytes() for text in texts]
    with pytest.raises(InputError, match="has no lines"):
        table_script.main()
    assert [text.read_bytes() for text in texts] == before
