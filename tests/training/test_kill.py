"""Runs that are killed with -9: at most an epoch is lost, and what the three files say is one thing."""

import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, losses, read_csv, spawn

from locallip import checkpoints
from locallip.files import InputError
from locallip.training.files import RunFiles, best_epoch

# Trains on the few digits of the fixture; ends itself when it is about to rename for the Nth time, or just behind that.
TRAIN_FEW = """
import os, signal, sys
import train_mnist, utils

moment, number = sys.argv.pop(1), int(sys.argv.pop(1))
replace, load_data, renamed = os.replace, utils.load_data, 0

def replace_and_die(*paths):
    global renamed
    renamed += 1
    if renamed == number and moment == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    replace(*paths)
    if renamed == number and moment == "behind":
        os.kill(os.getpid(), signal.SIGKILL)

os.replace = replace_and_die
utils.load_data = lambda data, data_dir, train: load_data(data, data_dir, train)[: 128 if train else 64]
utils.run_script(train_mnist.main)
"""
NEVER = ["behind", 0]
# At this radius the error falls in the second epoch too.
EASY = ["--epsilon_train", 0.001, "--epsilon", 0.001, "--batch_size", 8, "--lr_scheduler", "constant", "--sniter", 1]


def assert_consistent(files, epochs):
    """The three files are of one run of so many epochs."""
    checkpoint, best = checkpoints.load_checkpoint(files.checkpoint), checkpoints.load_checkpoint(files.best)
    rows = read_csv(files.log)
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    assert rows == [{name: str(value) for name, value in row.items()} for row in checkpoint["rows"]]
    assert checkpoint["epoch"] == epochs
    errors = [float(row["validation_certified_error"]) for row in rows]
    assert checkpoint["err"] == errors[-1]
    assert best["err"] == checkpoint["best_error"] == min(errors)
    assert best["epoch"] == 1 + errors.index(min(errors))
    assert best.keys() == {"state_dict", "err", "epoch", "arguments"}
    if best["epoch"] == epochs:
        assert all(torch.equal(best["state_dict"][name], w) for name, w in checkpoint["state_dict"].items())


@pytest.fixture
def flags(runs, monkeypatch):
    """Of a run whose error falls in each of its two epochs, so that every epoch has three writes."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return [*runs.flags(), "--epochs", 2, "--rampup", 0, *EASY]


@pytest.fixture
def whole(runs, flags):
    """The log of that run where nothing stops it."""
    log = runs.train(*flags[len(runs.flags()) :], name="whole").log
    errors = [float(row["validation_certified_error"]) for row in read_csv(log)]
    assert errors[1] < errors[0]
    return log


# Six writes: checkpoint, best and log of the first epoch, then of the second.
@pytest.mark.parametrize("moment", ["before", "behind"])
@pytest.mark.parametrize("write", range(1, 7))
def test_killed_around_a_write_and_resumed_a_run_is_consistent_and_lost_an_epoch_at_most(
    runs, flags, whole, moment, write
):
    files = runs.files()
    assert spawn("-c", TRAIN_FEW, moment, write, *flags).code == -signal.SIGKILL
    written = write - (moment == "before")
    saved = (written > 0) + (written > 3)  # epochs whose checkpoint is there
    if not saved:
        assert not files.checkpoint.exists()
        return
    answer = spawn("-c", TRAIN_FEW, *NEVER, *flags, "--resume")
    assert answer.code == 0, answer.err
    assert f"resuming after epoch {saved} of 2" in answer.out
    assert_consistent(files, 2)
    assert losses(files.log)[:saved] == losses(whole)[:saved]


@pytest.mark.parametrize("write", [1, 2])
def test_a_run_that_replaces_another_and_is_killed_does_not_go_on_with_its_files(runs, flags, write):
    # The other has a better epoch and more of them, none of which may stay.
    assert spawn("-c", TRAIN_FEW, *NEVER, *flags).code == 0
    before = runs.contents()
    again = [*flags, "--seed", 1, "--lr", 1e-6]
    assert spawn("-c", TRAIN_FEW, "behind", write, *again, "--overwrite").code == -signal.SIGKILL
    assert runs.contents()["tiny_checkpoint.pth"] != before["tiny_checkpoint.pth"]
    assert runs.contents()["tiny_epochs.csv"] == before["tiny_epochs.csv"]
    assert spawn("-c", TRAIN_FEW, *NEVER, *again, "--resume").code == 0
    files = runs.files()
    assert_consistent(files, 2)
    assert checkpoints.load_checkpoint(files.best)["arguments"]["seed"] == 1


def kill_at_random(rng, flags, log):
    """Start a run, kill it with -9 some time behind its next epoch; returns whether it was still running."""
    before = log.stat().st_mtime_ns if log.exists() else None
    command = [sys.executable, "-c", TRAIN_FEW, *NEVER, *flags]
    with subprocess.Popen(
        [str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as running:
        deadline = time.monotonic() + 60
        while running.poll() is None and (log.stat().st_mtime_ns if log.exists() else None) == before:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.4))
        running.send_signal(signal.SIGKILL)
        running.communicate()
    return running.returncode == -signal.SIGKILL


def test_killed_at_random_moments_a_run_is_consistent_whenever_it_is_resumed(runs, flags):
    rng, files, epochs = random.Random(0), runs.files(), 12
    flags, reached = [*flags, "--epochs", epochs], 0
    for start in range(4):
        kill_at_random(rng, [*flags, *(["--resume"] if start else [])], files.log)
        epoch = checkpoints.load_checkpoint(files.checkpoint)["epoch"]
        assert epoch >= reached
        reached = epoch
    assert reached > 0
    assert spawn("-c", TRAIN_FEW, *NEVER, *flags, "--resume").code == 0
    assert_consistent(files, epochs)


def test_a_finished_run_whose_best_and_log_are_gone_or_damaged_has_them_again(runs, flags):
    assert spawn("-c", TRAIN_FEW, *NEVER, *flags).code == 0
    files, contents = runs.files(), runs.contents()
    files.best.unlink()
    files.log.write_text("epoch\n")
    assert spawn("-c", TRAIN_FEW, *NEVER, *flags, "--resume").code == 0
    assert_consistent(files, 2)
    files.best.write_bytes(contents["tiny_best.pth"][:1000])
    files.log.unlink()
    assert spawn("-c", TRAIN_FEW, *NEVER, *flags, "--resume").code == 0
    assert_consistent(files, 2)


# --- in detail


def checkpoint_of(*errors, weight=0.0):
    rows = [{"epoch": number, "validation_certified_error": error} for number, error in enumerate(errors, start=1)]
    state = {"weight": torch.full((2,), weight)}
    return {"state_dict": state, "err": errors[-1], "epoch": len(errors), "arguments": {}, "rows": rows}


def test_only_the_first_of_the_best_epochs_is_the_best(tmp_path):
    files = RunFiles(tmp_path, "run")
    for weight, errors in enumerate([(0.5,), (0.5, 0.3), (0.5, 0.3, 0.3), (0.5, 0.3, 0.3, 0.4)]):
        files.save(checkpoint_of(*errors, weight=float(weight)))
    assert checkpoints.load_checkpoint(files.best)["state_dict"]["weight"].tolist() == [1, 1]
    assert best_epoch(checkpoint_of(0.5, 0.3, 0.3)["rows"]) == 2


@pytest.mark.parametrize(
    "other",
    [{"state_dict": {"weight": torch.ones(2)}}, {"state_dict": {"bias": torch.zeros(2)}}, {"err": 0.4}],
    ids=str,
)
def test_a_best_file_of_another_run_is_replaced_though_its_epoch_is_the_same(tmp_path, other):
    files, checkpoint = RunFiles(tmp_path, "run"), checkpoint_of(0.5, 0.3)
    checkpoints.save_checkpoint(files.best, checkpoint | other)
    files.make_good(checkpoint)
    best = checkpoints.load_checkpoint(files.best)
    assert (best["err"], best["state_dict"]["weight"].tolist()) == (0.3, [0, 0])


def test_what_is_good_is_not_written_again(tmp_path):
    files, checkpoint = RunFiles(tmp_path, "run"), checkpoint_of(0.5, 0.3)
    files.save(checkpoint)
    before = files.best.stat().st_ino
    files.make_good(checkpoint)
    assert files.best.stat().st_ino == before


@pytest.mark.parametrize("rows", [[], [{}], [{"epoch": 1}], [1], None, [{"epoch": 1}, {"loss": 2}]], ids=str)
def test_resume_refuses_a_checkpoint_whose_rows_are_no_log(runs, flags, rows):
    runs.train(*flags[len(runs.flags()) :])
    path = runs.files().checkpoint
    checkpoints.save_checkpoint(path, checkpoints.load_checkpoint(path) | {"rows": rows})
    before = runs.contents()
    with pytest.raises(InputError, match="cannot be resumed"):
        runs.train(*flags[len(runs.flags()) :], "--resume")
    assert runs.contents() == before
