"""The records of the runs: the command line of every job, and what is read off the records elsewhere."""

import hashlib
import json
import os
import shlex
import subprocess
import sys

import pytest
import train_tinyimagenet
from conftest import ROOT

import runs
import table
import train_cifar10
import train_mnist
import utils
from benchmarks import training_step
from data_load import DATA_SETS

# The published lines, word by word; the 4C3F nets start at 1.0 as the authors' runs did. And our own.
PRETRAINED = ROOT / "pretrained" / "README.md"
GOLDEN = ROOT / "tests" / "golden" / "command_lines.txt"
LINES = dict(line.split(": ") for line in GOLDEN.read_text().splitlines())
SCRIPTS = {"mnist": train_mnist, "cifar10": train_cifar10, "tinyimagenet": train_tinyimagenet}


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.delenv("PROCESSES", raising=False)
    return monkeypatch


@pytest.mark.parametrize("job", LINES)
def test_the_command_line_of_a_job_is_the_published_one(environment, job):
    environment.setenv("PYTHON", "echo")
    shown = subprocess.run(["bash", ROOT / "run_job.sh", job], capture_output=True, text=True, check=True)
    assert (shown.stdout, shown.stderr) == (LINES[job] + "\n", "")


def test_every_run_has_a_training_and_an_evaluation():
    assert {*LINES} == {job for run in runs.RUNS for job in (run.job, f"evaluate-{run.job}")}


@pytest.mark.parametrize("run", runs.RUNS, ids=lambda run: run.job)
def test_the_flags_of_a_run_are_flags_of_its_script(run):
    script = SCRIPTS[run.data]
    words = shlex.split(LINES[run.job].partition(run.recipe.train)[2])
    args = utils.training_arguments("", script.DATA_SETS, script.DEFAULTS, words)
    expected = {name: value for name, value in vars(args).items() if name != "data_dir"}
    assert vars(utils.run_arguments(run)) | expected == vars(utils.run_arguments(run))
    assert (args.epochs, args.batch_size) == (run.epochs, run.batch_size)
    assert (args.data, args.model) == (run.data, run.model)
    assert (args.epsilon == DATA_SETS[run.data].epsilon) != ("--epsilon" in words)


@pytest.mark.parametrize("run", runs.RUNS, ids=lambda run: run.job)
def test_a_run_trains_a_network_that_its_data_set_has(run):
    assert run.model in utils.MODELS[run.data]


COMMITTED = [run for run in runs.RUNS if (ROOT / "pretrained" / f"{run.prefix}_best.pth").exists()]


@pytest.mark.parametrize("run", COMMITTED, ids=lambda run: run.job)
def test_the_reports_of_a_run_are_about_the_checkpoint_that_is_here(run):
    checkpoint = hashlib.sha256((ROOT / "pretrained" / f"{run.prefix}_best.pth").read_bytes()).hexdigest()
    reports = [ROOT / "results" / run.job / name / "summary.json" for name in ("proven", "product", "estimate")]
    of = {json.loads(path.read_text())["checkpoint"]["sha256"] for path in reports if path.exists()}
    begins_another = run.job in {other.after for other in runs.RUNS}
    assert of == {checkpoint} or (begins_another and not of)
    (row,) = (line for line in PRETRAINED.read_text().splitlines() if f"`{run.prefix}_best.pth`" in line)
    assert f"`{checkpoint[:12]}…`" in row


def test_no_two_runs_write_the_same_files():
    assert len({run.prefix for run in runs.RUNS}) == len({run.job for run in runs.RUNS}) == len(runs.RUNS)


@pytest.mark.parametrize(
    ("arguments", "folder"),
    [
        ([], "proven"),
        (["--certificate", "proven"], "proven"),
        (["--images", "9", "--certificate", "estimate", "--clip"], "estimate"),
        (["--certificate=estimate"], "estimate"),
        (["--certificate", "both"], ""),
        (["--certificate=both"], ""),
        (["--certificate", "estimate", "--certificate", "proven"], "proven"),
        (["--certificate"], "proven"),
        (["--certificate", "nonsense"], "proven"),
        (["--data_dir", "estimate"], "proven"),
        (["--effort", "product"], "product"),
        (["--effort=product", "--effort", "dual"], "proven"),
        (["--effort", "product", "--certificate", "estimate"], "estimate"),
        (["--effort=product", "--certificate=both"], ""),
        (["--held_out", "500"], "held-out/proven"),
        (["--held_out=500", "--certificate", "both"], "held-out/"),
    ],
)
def test_every_certificate_has_a_report_of_its_own(arguments, folder):
    words = runs.command("evaluate-mnist-4c3f", arguments)
    assert words[words.index("--out") + 1] == f"results/mnist-4c3f/{folder}"
    assert words[len(words) - len(arguments) :] == arguments


def test_arguments_reach_the_script_as_they_were_given(environment, tmp_path):
    strange = ["--data_dir", "my data", "--prefix", 'it\'s $HOME; `ls` "x" \\ *', ""]
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    stub.chmod(0o755)
    environment.setenv("PYTHON", str(stub))
    command = ["bash", ROOT / "run_job.sh", "mnist-4c3f", *strange]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert shown.stdout.split("\0")[:-1] == runs.command("mnist-4c3f", strange)


def test_a_python_in_the_home_folder_is_found(environment, tmp_path):
    (tmp_path / "python").symlink_to("/bin/echo")
    environment.setenv("HOME", str(tmp_path))
    environment.setenv("PYTHON", "~/python")
    shown = subprocess.run(["bash", ROOT / "run_job.sh", "table"], capture_output=True, text=True, check=True)
    assert shown.stdout == "table.py\n"


@pytest.mark.parametrize("job", ["table", "mnist-4c3f"])
def test_a_python_that_is_none_is_refused(environment, tmp_path, job):
    environment.setenv("PYTHON", str(tmp_path / "nothing here"))
    answer = subprocess.run(["bash", ROOT / "run_job.sh", job], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == f"error: PYTHON={tmp_path}/nothing here is no program\n"


@pytest.mark.parametrize(("processes", "expected"), [("2", "2"), ("", "4")])
def test_the_number_of_processes_is_the_environments(environment, processes, expected):
    environment.setenv("PROCESSES", processes)
    assert f"--nproc_per_node={expected}" in runs.command("tinyimagenet-8c2f", [])
    assert not any("nproc" in word for word in runs.command("cifar10-6c2f", []))


@pytest.mark.parametrize("processes", ["0", "-1", "two", "1.5"])
def test_a_number_of_processes_that_is_none_is_refused(environment, processes):
    environment.setenv("PROCESSES", processes)
    environment.setenv("PYTHON", "echo")
    answer = subprocess.run(["bash", ROOT / "run_job.sh", "tinyimagenet-8c2f"], capture_output=True, text=True)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == f"error: PROCESSES must be a number of processes, not '{processes}'\n"


def test_jobs_are_listed_and_unknown_ones_refused_by_a_python_without_packages(tmp_path):
    """Isolated and without site-packages, as a python3 before anything is installed."""
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PYTHONPATH")}
    environment["PATH"] = f"{tmp_path}:{environment['PATH']}"

    def run_job(*words):
        command = ["bash", ROOT / "run_job.sh", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

    listed = run_job()
    assert (listed.returncode, listed.stderr) == (0, "")
    assert all(f"  {run.job} " in listed.stdout and f" evaluate-{run.job} " in listed.stdout for run in runs.RUNS)
    unknown = run_job("bake")
    assert (unknown.returncode, unknown.stdout) == (2, "")
    assert unknown.stderr == "error: 'bake' is no training or evaluation; 'bash run_job.sh' lists all jobs\n"


def test_the_rows_of_the_table_are_the_runs():
    rows = {
        row.job: (row.title, row.epsilon, row.epochs, row.batch_size, row.paper) for row in map(table.row, utils.RUNS)
    }
    assert list(rows) == [run.job for run in runs.RUNS]
    assert rows["mnist-4c3f"] == ("MNIST, ε = 1.58, 4C3F, GloRo loss", 1.58, 300, 256, (96.3, 78.2, 55.8))
    own = "MNIST, ε = 1.58, 4C3F, clipped MaxMin, trained with global norms"
    assert rows["mnist-4c3f-maxmin"] == (own, 1.58, 300, 64, None)
    largest = "Tiny ImageNet, ε = 36/255, 8C2F, clipped MaxMin"
    assert rows["tinyimagenet-8c2f-maxmin"] == (largest, 36 / 255, 250, 32, (36.9, 33.3, 23.4))


def test_the_benchmark_times_one_run_of_the_paper_for_every_network():
    maxmin = ["cifar10-6c2f-maxmin", "tinyimagenet-8c2f", "tinyimagenet-8c2f-maxmin"]
    assert list(training_step.RECIPES) == ["mnist-4c3f", "cifar10-4c3f", "cifar10-6c2f", *maxmin]


def test_a_data_set_belongs_to_a_recipe_and_every_recipe_to_its_own():
    assert {record.recipe for record in DATA_SETS.values()} == {*runs.RECIPES}
    assert all(DATA_SETS[recipe].recipe == recipe == utils.data_sets(recipe)[0] for recipe in runs.RECIPES)


@pytest.mark.parametrize(("epsilon", "text"), [(1.58, "1.58"), (36 / 255, "36/255"), (0.0, "0"), (1.0, "1")])
def test_a_radius_is_written_as_papers_do(epsilon, text):
    assert utils.radius_text(epsilon) == text
