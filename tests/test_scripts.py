import argparse
import os
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Answer, read_csv, spawn

import evaluate
import runs
import train_mnist
import utils
from locallip.evaluation import attacks, certificates, evaluation
from locallip.files import InputError, run_script

SCRIPTS = ["train_mnist", "train_cifar10", "train_tinyimagenet", "evaluate", "evaluate_tinyimagenet"]

# --- command lines


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_flag_with_a_text(script, call, monkeypatch):
    parsers, parse_args = [], argparse.ArgumentParser.parse_args

    def record(parser, *arguments):
        parsers.append(parser)
        return parse_args(parser, *arguments)

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", record)
    answer = call(script, "--help")
    assert (answer.code, answer.err) == (0, "")
    for action in parsers[0]._actions:
        assert action.help
        assert all(name in answer.out for name in action.option_strings)


def test_the_published_training_command_parses_with_the_papers_defaults(command_line):
    command_line(
        *shlex.split(
            "--model relux --sniter 5 --init 2.0 --epsilon_train 1.75 --gloro --no_augmentation "
            "--opt_iter 10 --prefix 'relu/mnist_4C3F'"
        )
    )
    args = utils.training_arguments("", ["mnist", "digits"], train_mnist.DEFAULTS)
    given = {
        "model": "relux",
        "sniter": 5,
        "init": 2.0,
        "epsilon_train": 1.75,
        "loss": "gloro",
        "no_augmentation": True,
    }
    given |= {"opt_iter": 10, "prefix": "relu/mnist_4C3F"}
    defaults = {"data": "mnist", "epochs": 300, "warmup": 0, "rampup": 150, "lr": 1e-3, "end_lr": 5e-6, "more": 25}
    defaults |= {"lr_scheduler": "exp", "batch_size": 256, "seed": 2019, "epsilon": 1.58, "width": 1.0, "resume": False}
    assert vars(args) | given | defaults == vars(args)


def test_training_without_flags_is_the_papers_default_job(command_line):
    command_line()
    args = utils.training_arguments("", ["mnist", "digits"], train_mnist.DEFAULTS)
    expected = {"epsilon_train": 1.58, "loss": "bcp", "opt_iter": 1, "init": 1.0, "model": "relux", "sniter": 5}
    assert vars(args) | expected == vars(args)


def test_the_published_evaluation_command_parses(command_line):
    command_line(
        *shlex.split(
            "--data 'mnist' --model 'relux' --epsilon 1.58 --test_batch_size 256 --test_sniter 2000 "
            "--saved_model 'pretrained/relu/mnist_4C3F'"
        )
    )
    args = evaluate.arguments()
    assert (args.data, args.model, args.epsilon, args.test_sniter) == ("mnist", "relux", 1.58, 2000)
    assert args.saved_model == "pretrained/relu/mnist_4C3F"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("no such thing"), 2),
        (KeyboardInterrupt(), 130),
        (torch.OutOfMemoryError("CUDA out of memory"), 1),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nfurther lines"), 1),
        (MemoryError(), 1),
    ],
)
def test_scripts_end_with_the_code_of_what_went_wrong(error, code, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as exit:
        run_script(main)
    assert exit.value.code == code
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_an_error_of_the_program_keeps_its_traceback():
    def main():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_script(main)


# --- jobs

TRAININGS = {run.job: f"evaluate-{run.job}" for run in runs.RUNS}
JOBS = {"demo", "test", "test-oldest", "bench", "bench-rivals", "table", "tinyimagenet-data"}


@pytest.fixture
def run_job(tmp_path):
    """Runs run_job.sh with a Python that does nothing but print its arguments, one a line."""
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    stub.chmod(0o755)

    def run(*arguments):
        command = ["bash", ROOT / "run_job.sh", *arguments]
        environment = os.environ | {"PYTHON": str(stub)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return Answer(done.returncode, done.stdout, done.stderr)

    return run


@pytest.mark.parametrize("job", [["table"], ["test"], ["reproduce", "mnist-4c3f"], ["mnist-4c3f"], ["falsify", "net"]])
def test_a_job_is_the_script_so_that_whoever_stops_one_stops_the_other(job, tmp_path):
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\necho $$\n")
    stub.chmod(0o755)
    command, environment = ["bash", ROOT / "run_job.sh", *job], os.environ | {"PYTHON": str(stub)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.communicate()[0].splitlines()[-1] == str(process.pid)


@pytest.mark.parametrize("arguments", [[], ["help"], ["--help"]])
def test_without_a_job_all_jobs_are_listed(run_job, arguments):
    answer = run_job(*arguments)
    assert (answer.code, answer.err) == (0, "")
    listed = re.findall(r"^  ([a-z][a-z0-9-]+) {2,}(evaluate-\S+)?", answer.out, re.M)
    assert {job: evaluation for job, evaluation in listed if evaluation} == TRAININGS
    assert {job for job, evaluation in listed if not evaluation} == JOBS


@pytest.mark.parametrize("arguments", [["bake"], ["mnist"], ["--epochs", "2"]])
def test_an_unknown_job_is_refused_with_one_line(run_job, arguments):
    answer = run_job(*arguments)
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) == 1
    assert arguments[0] in answer.err


@pytest.mark.parametrize(
    ("job", "script"),
    [("demo", "train_mnist.py"), ("test", "-m"), ("table", "table.py"), ("bench-rivals", "benchmarks/rivals.py")],
)
def test_the_other_jobs_start_their_scripts(run_job, job, script):
    assert run_job(job).out.splitlines()[0] == script


def test_falsification_starts_with_the_prefix_of_a_checkpoint_and_is_refused_without(run_job):
    words = ["falsify.py", "--out", "results/falsify", "--saved_model", "runs/net", "--device", "cpu"]
    assert run_job("falsify", "runs/net", "--device", "cpu").out.splitlines() == words
    for nothing in ([], ["--images", "5"]):
        answer = run_job("falsify", *nothing)
        assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)


def test_the_benchmark_of_proofs_takes_prefixes_or_flags_alone(run_job):
    script, *words = run_job("bench-proof", "runs/net", "runs/other", "--images", "8").out.splitlines()
    assert script == "benchmarks/certification.py"
    assert words == ["--saved_model", "runs/net", "runs/other", "--images", "8"]
    assert run_job("bench-proof", "--images", "8").out.splitlines() == [script, "--images", "8"]
    assert run_job("bench-proof").out.splitlines() == [script]


def test_a_python_that_does_not_suit_is_refused_before_anything_is_made(tmp_path):
    for name in ("run_job.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    old = tmp_path / "bin" / "python3"
    old.parent.mkdir()
    old.write_text('#!/bin/sh\nif [ "$1" = --version ]; then echo Python 3.9.18; else exit 1; fi\n')
    old.chmod(0o755)
    environment = {**os.environ, "PATH": f"{old.parent}:{os.environ['PATH']}"}
    environment.pop("PYTHON", None)
    command = ["bash", tmp_path / "run_job.sh", "test"]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert answer.stderr == "error: needs Python 3.10 to 3.12 as python3, not Python 3.9.18\n"
    assert not (tmp_path / ".venv").exists()


def test_the_tests_take_further_arguments(run_job):
    assert "-k\nnorms\n" in run_job("test", "-k", "norms").out


def test_the_demo_takes_none(run_job):
    answer = run_job("demo", "--width", "0.5")
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)


# --- for real, on the digits

EVALUATE = [*TINY, "--epsilon", 0.1, "--images", 64, "--curve_images", 8, "--test_sniter", 20]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """How a short training ended, and the prefix of its files."""
    folder = tmp_path_factory.mktemp("runs")
    schedule = ["--epochs", 1, "--rampup", 0, "--epsilon", 0.1, "--epsilon_train", 0.1, "--lr", 0.01]
    effort = ["--batch_size", 100, "--sniter", 1, "--test_sniter", 2]
    answer = spawn("train_mnist.py", *TINY, *schedule, *effort, "--output_dir", folder, "--prefix", "relu/tiny")
    return answer, folder / "relu" / "tiny"


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """How an evaluation ended, and the folder of its report."""
    out = tmp_path_factory.mktemp("report")
    return spawn("evaluate.py", *EVALUATE, "--saved_model", trained[1], "--out", out), out


def counts(out):
    """Right images by the name of the line, after a check of the line's form."""
    found = {}
    for line in out.splitlines():
        name, _, rest = line.partition(" ")
        if name in ("clean", "PGD", "certified"):
            percentage, sign, fraction = rest.split()[:3]
            count, total = map(int, fraction.strip("()").split("/"))
            assert (percentage, sign) == (f"{100 * count / total:.2f}", "%")
            found[name] = count
    return found


def test_training_ends_well_and_leaves_its_files(trained):
    answer, prefix = trained
    assert answer.code == 0, answer.err
    assert "certified" in answer.out
    assert {path.name for path in prefix.parent.iterdir()} == {
        "tiny_best.pth",
        "tiny_checkpoint.pth",
        "tiny_epochs.csv",
    }


def test_the_progress_bar_is_quiet_where_there_is_no_terminal(trained, evaluated):
    assert trained[0].err == evaluated[0].err == ""


def test_evaluation_prints_the_three_accuracies_in_order(evaluated):
    answer, _ = evaluated
    assert answer.code == 0, answer.err
    found = counts(answer.out)
    assert list(found) == ["clean", "PGD", "certified"]
    assert 0 < found["certified"] <= found["PGD"] <= found["clean"] <= 64
    assert "local / global" in answer.out


def test_the_report_has_one_row_per_image_that_agrees_with_the_printed_counts(evaluated, digits):
    answer, out = evaluated
    rows = read_csv(out / "images.csv")
    assert [int(row["index"]) for row in rows] == list(range(64))
    assert [int(row["label"]) for row in rows] == digits[False].labels[:64].tolist()
    assert counts(answer.out) == {
        "clean": sum(row["label"] == row["prediction"] for row in rows),
        "PGD": sum(int(row["pgd_correct"]) for row in rows),
        "certified": sum(int(row["certified"]) for row in rows),
    }


def test_the_report_is_consistent_row_by_row(evaluated):
    for row in read_csv(evaluated[1] / "images.csv"):
        margin, worst_margin, local, whole = (
            float(row[name]) for name in ("margin", "worst_margin", "local_bound", "global_bound")
        )
        assert (margin > 0) == (row["label"] == row["prediction"])
        assert (worst_margin > 0) == (row["certified"] == "1")
        assert worst_margin <= margin
        assert 0 < local <= whole


def test_the_report_has_pictures(evaluated):
    answer, out = evaluated
    pictures = list(out.glob("*.png"))
    assert out / "certified_over_radius.png" in pictures
    assert all(path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n") for path in pictures)
    assert all(str(path) in answer.out for path in out.iterdir())


def test_a_file_evaluates_like_the_prefix_it_belongs_to(trained, evaluated, call):
    answer = call("evaluate", *EVALUATE, "--saved_model", f"{trained[1]}_best.pth")
    assert counts(answer.out) == counts(evaluated[0].out)


def test_at_epsilon_zero_attack_and_certificate_are_the_clean_accuracy(trained, call):
    answer = call("evaluate", *EVALUATE, "--epsilon", 0, "--saved_model", trained[1])
    assert len(set(counts(answer.out).values())) == 1


def test_a_broken_certificate_is_shouted(trained, evaluated, call, monkeypatch):
    # Every image is "attacked" by putting its neighbour, mostly of another class, in its place.
    monkeypatch.setattr(evaluation, "pgd", lambda model, x, y, epsilon, steps: x.roll(1, dims=0))
    answer = call("evaluate", *EVALUATE, "--saved_model", trained[1])
    assert answer.code == 1
    assert "BROKEN CERTIFICATE" in answer.err
    # The dual is not asked about what is known to fall; what the product certifies stays certified, and is shouted.
    assert 0 < counts(answer.out)["certified"] <= counts(evaluated[0].out)["certified"]


def test_nan_counts_as_not_certified_and_is_reported(trained, call, monkeypatch, tmp_path):
    worst_logits = certificates.worst_logits

    def spoil_the_first_two(bound, y, rounds):
        monkeypatch.setattr(certificates, "worst_logits", worst_logits)  # later questions are about other images
        return worst_logits(bound, y, rounds).index_fill(0, torch.tensor([0, 1]), torch.nan)

    monkeypatch.setattr(certificates, "worst_logits", spoil_the_first_two)
    answer = call("evaluate", *EVALUATE, "--certificate", "estimate", "--saved_model", trained[1], "--out", tmp_path)
    assert answer.code == 0
    assert "2 images have a NaN" in answer.out
    certified = [int(row["certified"]) for row in read_csv(tmp_path / "images.csv")]
    assert certified[:2] == [0, 0]
    assert counts(answer.out)["certified"] == sum(certified)


def test_a_nan_among_the_logits_is_not_right():
    logits = torch.tensor([[2.0, 1.0], [2.0, np.nan], [np.nan, 1.0]])
    assert attacks.right(logits, torch.tensor([0, 0, 0])).tolist() == [True, False, False]
