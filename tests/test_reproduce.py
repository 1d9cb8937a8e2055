"""A row of the table from end to end: what is planned, what is done, what is refused."""

import copy
import json
import os
import signal
import sys
import time

import pytest
from conftest import TINY, spawn
from forks import Fork

import reproduce
import runs
import utils
from locallip.files import InputError
from locallip.training.pace import seconds_per_epoch

JOB = "mnist-4c3f-maxmin"
# 10 s an epoch, 0.1 s a test image.
FULL = reproduce.Reproduction(300, 300, 1.0, 3000.0, 1000.0, 10_000, 2000)


def test_a_plan_that_fits_keeps_schedule_and_test_set():
    plan = FULL.within(minutes=200)
    assert (plan.epochs, plan.scale, plan.images) == (300, 1.0, 10_000)
    assert (plan.training_seconds, plan.evaluation_seconds) == (3000, 1000)


def test_a_quarter_of_the_minutes_goes_to_the_evaluation_and_the_rest_to_whole_epochs():
    plan = FULL.within(minutes=21)  # one of them starts programs
    assert (plan.evaluation_seconds, plan.images) == (300, 3000)
    assert (plan.epochs, plan.training_seconds, plan.scale) == (90, 900, 0.3)
    assert plan.power_iterations == 100


@pytest.mark.parametrize("minutes", [3, 10, 47.3, 66])
def test_no_plan_takes_longer_than_it_may(minutes):
    plan = FULL.within(minutes)
    assert 60 + plan.training_seconds + plan.evaluation_seconds <= 60 * minutes
    assert round(300 * plan.scale) == plan.epochs
    assert plan.images >= 500


def test_a_plan_scales_what_was_scaled():
    assert reproduce.Reproduction(30, 30, 0.1, 300.0, 1000.0, 10_000, 2000).within(minutes=5).scale == pytest.approx(
        0.06
    )


def test_too_little_time_is_refused_with_how_much_it_takes():
    with pytest.raises(InputError, match="two epochs and their evaluation take 2 minutes here"):
        FULL.within(minutes=1.5)


@pytest.mark.parametrize("box", [False, True])
@pytest.mark.parametrize("schedule", [[], ["--lr_scheduler", "linear", "--lr_warmup", "3"]], ids=["usual", "warm"])
def test_measuring_an_epoch_leaves_the_network_as_it_is(digits, tiny_net, tmp_path, box, schedule):
    flags = [*map(str, TINY), "--batch_size", "16", "--test_sniter", "2", "--output_dir", str(tmp_path / "runs")]
    flags += schedule
    args = utils.training_arguments("", utils.data_sets("mnist"), utils.RECIPES["mnist"].defaults, flags)
    before = copy.deepcopy(tiny_net.state_dict())
    seconds = seconds_per_epoch(tiny_net, digits[True][:960], digits[False][:160], args, box)
    assert seconds > 0
    assert all((before[name] == value).all() for name, value in tiny_net.state_dict().items())
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def two_epochs(monkeypatch):
    """Plans two epochs and four test images, whatever is measured."""
    plan = reproduce.Reproduction(2, 300, 2 / 300, 2.0, 1.0, 4, 5)
    monkeypatch.setattr(reproduce, "plan_of", lambda run, args: plan)


def test_a_row_is_trained_evaluated_and_set_beside_the_papers(call, two_epochs, tmp_path):
    flags = [JOB, *TINY, "--output_dir", tmp_path, "--epsilon", 0.3, "--batch_size", 256, "--test_batch_size", 4]
    answer = call("reproduce", *flags)
    shown = answer.out
    assert answer.code == 0, answer.err
    assert "2 of 300 epochs" in shown
    assert f"| `{JOB}` |" in shown.splitlines()[-1]
    assert "first 4 images" in shown.splitlines()[-1]
    report = tmp_path / "results" / JOB
    summaries = [json.loads((report / kind / "summary.json").read_text()) for kind in ("proven", "estimate")]
    assert [summary["images"] for summary in summaries] == [4, 4]
    assert summaries[0]["checkpoint"]["training"]["epochs"] == 2
    assert [(summary["epsilon"], summary["arguments"]["test_batch_size"]) for summary in summaries] == [(0.3, 4)] * 2
    assert (tmp_path / "maxmin" / "mnist_4C3F_maxmin_best.pth").is_file()

    again = call("reproduce", *flags)  # refused before anything is measured
    assert again.code == 2
    assert "exists; choose another --prefix, or --resume, or --overwrite" in again.err
    assert call("reproduce", *flags, "--resume").code == 0


@pytest.mark.parametrize(("given", "evaluated"), [([], "1.58"), (["--epsilon", 0.3], "0.3"), (["--epsilon=1"], "1.0")])
def test_a_row_is_evaluated_at_its_own_radius_whatever_its_training_validates_at(
    call, two_epochs, monkeypatch, tmp_path, given, evaluated
):
    commands = []
    monkeypatch.setattr(reproduce, "_run", lambda run, words: commands.append(words))
    monkeypatch.setattr(reproduce, "as_table", lambda rows, folder: f"at {rows[0].epsilon}")
    answer = call("reproduce", "mnist-fast-relu", "--output_dir", tmp_path, *given)
    assert answer.out.splitlines()[-1] == f"at {evaluated}"
    training, evaluation = commands
    assert training[training.index("--epsilon") :][:2] == ["--epsilon", "0.8"]
    assert ["--epsilon", evaluated] == evaluation[evaluation.index("--epsilon") :][:2]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--resume"], "there is nothing to resume"),
        (["--resume", "--overwrite"], "exclude each other"),
        (["--resume", "--minutes", 5], "drop --minutes"),
        (["--minutes", 0], "must be greater than 0"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--prefix", "foo"], "stays maxmin/mnist_4C3F_maxmin; --output_dir puts its files elsewhere"),
        (["--model", "relux"], "stays c4f3_clmaxmin; name another JOB"),
    ],
)
def test_what_cannot_be_done_is_refused_before_any_work(call, monkeypatch, tmp_path, flags, said):
    monkeypatch.setattr(reproduce, "plan_of", lambda run, args: pytest.fail("it was measured"))
    answer = call("reproduce", JOB, *TINY, "--output_dir", tmp_path, *flags)
    assert (answer.code, said in answer.err, answer.err.count("\n")) == (2, True, 1)
    assert list(tmp_path.iterdir()) == []


def test_the_plan_is_measured_for_real(tmp_path):
    answer = spawn("reproduce.py", JOB, *TINY, "--minutes", 0.01, "--output_dir", tmp_path)
    assert answer.code == 2
    assert "two epochs and their evaluation take" in answer.err


def test_a_flag_that_is_given_again_counts_once():
    words = ["evaluate.py", "--data", "mnist", "--clip", "--out", "a", "--data", "digits", "--out", "b"]
    assert reproduce._once(words) == ["evaluate.py", "--clip", "--data", "digits", "--out", "b"]
    assert reproduce._once(["a.py", "--seed", "1", "--seed=2", "--seed", "3"]) == ["a.py", "--seed", "3"]
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py", "--images", "5"]
    assert reproduce._once(several) == several


def run_a_script():
    reproduce._run(runs.RUNS[0], sys.argv[1:])


def test_whoever_stops_it_stops_the_training_too(tmp_path):
    script, pid = tmp_path / "script.py", tmp_path / "pid"
    script.write_text(
        f"import os, pathlib, time\npathlib.Path({str(pid)!r}).write_text(str(os.getpid()))\ntime.sleep(600)"
    )
    process = Fork(run_a_script, script)
    while not (pid.exists() and pid.read_text()) and process.is_alive():
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    assert process.end().code == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
