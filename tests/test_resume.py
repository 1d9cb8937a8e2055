"""Evaluations that are stopped: what is done stays done, nothing counts twice, and the report is the same."""

import json
import os
import random
import shutil
import sys
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import TINY, WIDTH, spawn
from forks import Fork, environments_of, run_at_once

import evaluate
import utils
from locallip import files
from locallip.checkpoints import load_checkpoint, save_checkpoint
from locallip.evaluation import evaluation, unfinished
from locallip.evaluation.plan import Plan, seed_of

SMALL = ["--epsilon", 0.01, "--images", 14, "--test_batch_size", 4, "--curve_images", 3, "--test_sniter", 20]
SMALL += ["--certificate", "both", "--certificate_seed", 7]
BATCHES = 4


def contents(folder):
    """Every file by name; what may differ of a summary is left out."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for name in [name for name in found if name.endswith("summary.json")]:
        summary = json.loads(found[name])
        assert min([summary.pop("seconds"), *summary.pop("stage_seconds")]) >= 0
        del summary["hardware"], summary["arguments"]["out"]
        found[name] = summary
    return found


@pytest.fixture(scope="module")
def file_of_a_net(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("net") / "net_best.pth"
    state = utils.select_model("digits", "relux", width=WIDTH).state_dict()
    save_checkpoint(path, {"state_dict": state, "err": 1.0, "epoch": 0})
    return path


@pytest.fixture
def saved_net(file_of_a_net):
    """The one file of all tests here, so that one report will do; as it was behind each of them."""
    before = file_of_a_net.read_bytes()
    yield file_of_a_net
    file_of_a_net.write_bytes(before)


@pytest.fixture
def flags(saved_net):
    return [*TINY, *SMALL, "--saved_model", saved_net]


@pytest.fixture(scope="module")
def whole(file_of_a_net, tmp_path_factory):
    """The folder of an evaluation that nobody stops."""
    out = tmp_path_factory.mktemp("whole")
    answer = spawn("evaluate.py", *TINY, *SMALL, "--saved_model", file_of_a_net, "--out", out)
    assert (answer.code, answer.err) == (0, "")
    return out


@pytest.fixture
def report(whole):
    """What such an evaluation leaves."""
    found = contents(whole)
    assert len(found) == 10
    return found


class Killed(BaseException):
    """Stands for the end of the process; nothing may catch it."""


@contextmanager
def stopped_at_write(number):
    """Ends the code in its context behind so many writes."""
    written, replace = [], os.replace

    def replace_or_die(*paths):
        if len(written) == number:
            raise Killed
        written.append(paths)
        replace(*paths)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", replace_or_die)
        with pytest.raises(Killed):
            yield


@pytest.fixture
def asked(monkeypatch):
    """Places of the batches that are worked out."""
    places, batch = [], evaluation.evaluate_batch

    def record(*given):
        places.append(given[-2])
        return batch(*given)

    monkeypatch.setattr(evaluation, "evaluate_batch", record)
    return places


# Behind the record of the run, two batches, all batches, the first file of the report, all but its last one.
@pytest.mark.parametrize("writes", [1, 3, 1 + BATCHES, 2 + BATCHES, BATCHES + 10])
def test_stopped_at_a_write_and_resumed_it_reports_the_same(call, flags, report, asked, tmp_path, writes):
    out, done = tmp_path / "stopped", min(writes - 1, BATCHES)
    with stopped_at_write(writes):
        call("evaluate", *flags, "--out", out)
    assert len(list((out / "unfinished").glob("*.npz"))) == done
    asked.clear()
    answer = call("evaluate", *flags, "--out", out, "--resume")
    assert (answer.code, answer.err) == (0, "")
    assert asked == list(range(done, BATCHES))
    assert contents(out) == report


def kill_at_random(rng, flags, out):
    """Start an evaluation, kill it with -9 in the midst of its work; returns how many batches it left."""
    before = len(list(out.glob("unfinished/*.npz")))
    running = Fork(evaluate.main, *flags, "--out", out)
    running.kill_behind(lambda: len(list(out.glob("unfinished/*.npz"))) != before, rng.uniform(0, 0.2))
    return len(list(out.glob("unfinished/[0-9]*.npz")))


def test_killed_at_random_moments_and_resumed_by_one_or_two_processes_it_reports_the_same(
    call, flags, report, tmp_path
):
    rng, out = random.Random(0), tmp_path / "killed"
    done = kill_at_random(rng, flags, out)
    if (out / "unfinished").exists():
        assert kill_at_random(rng, [*flags, "--resume"], out) >= done or not (out / "unfinished").exists()
    shutil.copytree(out, tmp_path / "copy")
    if (out / "unfinished" / "run.json").exists():
        assert call("evaluate", *flags, "--out", out, "--resume").code == 0
        for answer in run_at_once(environments_of(2), evaluate.main, *flags, "--out", tmp_path / "copy", "--resume"):
            assert answer.code == 0, answer.err
    assert contents(out) == report
    assert contents(tmp_path / "copy") == report


def test_two_processes_report_what_one_does(flags, report, tmp_path):
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "evaluate.py", *flags]
    answer = spawn(*several, "--out", tmp_path / "two", OMP_NUM_THREADS="1")
    assert answer.code == 0, answer.err
    assert contents(tmp_path / "two") == report


@pytest.fixture(scope="module")
def first_two_batches(file_of_a_net, tmp_path_factory):
    """What an evaluation leaves that is stopped behind its second batch."""
    out = tmp_path_factory.mktemp("stopped")
    line = ["evaluate.py", *TINY, *SMALL, "--saved_model", file_of_a_net, "--out", out]
    with pytest.MonkeyPatch.context() as patch, stopped_at_write(3):
        patch.setattr(sys, "argv", [str(word) for word in line])
        evaluate.main()
    return out


@pytest.fixture
def stopped(first_two_batches, tmp_path):
    """The folder of an evaluation that was stopped behind its second batch."""
    return shutil.copytree(first_two_batches, tmp_path / "stopped")


def assert_refused(answer, *said):
    assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1), answer.err
    assert all(word in answer.err for word in said), answer.err


def test_an_unfinished_evaluation_is_neither_replaced_nor_continued_unasked(call, flags, stopped):
    before = contents(stopped)
    assert_refused(call("evaluate", *flags, "--out", stopped), "--resume", "--overwrite", "2 of 4 batches")
    assert contents(stopped) == before


def test_overwriting_an_unfinished_evaluation_starts_anew(call, flags, report, tmp_path):
    out = tmp_path / "stopped"
    with stopped_at_write(3):
        call("evaluate", *flags, "--epsilon", 0.02, "--out", out)
    assert call("evaluate", *flags, "--out", out, "--overwrite").code == 0
    assert contents(out) == report | {
        name: s | {"arguments": s["arguments"] | {"overwrite": True}} for name, s in report.items() if "json" in name
    }


@pytest.mark.parametrize(
    ("others", "said"),
    [
        (["--epsilon", 0.02], "--epsilon 0.01, not 0.02"),
        (["--test_batch_size", 9], "--test_batch_size 4, not 9"),
        (["--certificate", "proven"], "--certificate both, not proven"),
        (["--certificate_seed", 8], "--certificate_seed 7, not 8"),
        (["--seed", 1], "--seed 2019, not 1"),
        (["--images", 13], "--images 14, not 13"),
        (["--deployed", "float32"], "--deployed exact, not float32"),
    ],
    ids=str,
)
def test_other_flags_do_not_go_on_with_it(call, flags, stopped, others, said):
    before = contents(stopped)
    assert_refused(call("evaluate", *flags, *others, "--out", stopped, "--resume"), said, "--overwrite")
    assert contents(stopped) == before


def test_another_checkpoint_does_not_go_on_with_it(call, flags, stopped, saved_net):
    checkpoint = load_checkpoint(saved_net)
    save_checkpoint(saved_net, checkpoint | {"epoch": 1})
    assert_refused(call("evaluate", *flags, "--out", stopped, "--resume"), "other checkpoint")


def test_other_code_or_other_packages_do_not_go_on_with_it(call, flags, stopped, monkeypatch):
    for name, value in {"source_sha256": "0123", "versions": {"torch": "0.1"}, "images_sha256": "4567"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(f"evaluate.{name}", lambda *_, value=value: value)
            assert_refused(call("evaluate", *flags, "--out", stopped, "--resume"), "--overwrite")


def test_a_drawn_seed_is_kept_and_a_given_one_need_not_be_repeated(call, flags, stopped, report):
    unseeded = flags[: flags.index("--certificate_seed")] + flags[flags.index("--certificate_seed") + 2 :]
    assert call("evaluate", *unseeded, "--out", stopped, "--resume").code == 0
    assert contents(stopped) == report


@pytest.mark.parametrize("flag", [["--resume"], ["--resume", "--overwrite", "--out", "x"]], ids=str)
def test_flags_that_contradict_each_other_are_refused(call, flags, flag):
    assert_refused(call("evaluate", *flags, *flag), "--resume")


def test_there_is_nothing_to_resume_where_nothing_was_stopped(call, flags, report, whole):
    assert_refused(call("evaluate", *flags, "--out", whole, "--resume"), "no unfinished evaluation")
    assert contents(whole) == report


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"arguments": 1, "seed": 2}', b"\xff"])
def test_a_damaged_record_is_refused(call, flags, stopped, damage):
    (stopped / "unfinished" / "run.json").write_bytes(damage)
    assert_refused(call("evaluate", *flags, "--out", stopped, "--resume"), "damaged", "--overwrite")


@pytest.mark.parametrize("damage", ["empty", "cut", "of another run"])
def test_a_batch_that_is_damaged_or_of_another_run_is_done_again(call, flags, stopped, report, damage, tmp_path):
    batch = stopped / "unfinished" / "00001.npz"
    if damage == "of another run":
        with np.load(batch) as file:
            arrays = dict(file) | {"about.run": "another", "0.clean": np.zeros(4, bool)}
        np.savez(batch, **arrays)
    else:
        batch.write_bytes(batch.read_bytes()[: 0 if damage == "empty" else 1000])
    assert call("evaluate", *flags, "--out", stopped, "--resume").code == 0
    assert contents(stopped) == report


def test_leftovers_without_their_record_count_for_nothing(call, flags, stopped, report):
    (stopped / "unfinished" / "run.json").unlink()
    assert call("evaluate", *flags, "--out", stopped).code == 0
    assert contents(stopped) == report


def test_the_seconds_of_all_starts_add_up(monkeypatch, tmp_path):
    clock = iter([0.0, 5.0, 7.0, 100.0, 103.0, 103.0])
    monkeypatch.setattr(unfinished.time, "perf_counter", lambda: next(clock))
    run = {"seed": 1}
    first = unfinished.Unfinished(tmp_path, run, 1)  # at 0
    first.keep(0, [])  # at 5
    first.keep(1, [])  # at 7
    second = unfinished.Unfinished(tmp_path, run, 2)  # at 100
    assert sorted(second.read(0)) == [0, 1]
    assert second.seconds() == 7 + 3


def test_every_image_is_in_one_batch_and_every_question_planned():
    plan = Plan(images=14, batch_size=4, curve_images=6)
    assert len(plan) == BATCHES
    assert [plan.size(place) for place in range(len(plan))] == [4, 4, 4, 2]
    places = [i for place in range(len(plan)) for i in range(14)[plan.span(place)]]
    assert places == list(range(14))
    assert [plan.has_curve(place) for place in range(len(plan))] == [True, True, False, False]
    assert plan.questions() == 14 + 2 * 9 * 8


def test_batches_have_seeds_of_their_own():
    seeds = {seed_of(seed, place) for seed in range(20) for place in range(50)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(seed_of(2**63 - 1, 10**6))
