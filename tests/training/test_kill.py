"""Runs that are killed with -9: at most an epoch is lost, and what the three files say is one thing."""

import functools
import os
import random
import shutil
import signal

import pytest
import torch
from conftest import RUN, losses, read_csv
from forks import Fork

import train_mnist
from locallip import checkpoints
from locallip.files import InputError
from locallip.training.files import RunFiles, best_row


def train_and_die(write):
    """A run that is killed instead of writing its file of this number."""
    replace, written = os.replace, []

    def replace_or_die(*paths):
        written.append(paths)
        if len(written) == write:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*paths)

    os.replace = replace_or_die
    train_mnist.main()


# At this radius the error falls in the second epoch too.
EASY = [
    "--epochs",
    2,
    "--rampup",
    0,
    "--epsilon_train",
    0.001,
    "--epsilon",
    0.001,
    "--batch_size",
    8,
    "--lr_scheduler",
    "constant",
    "--sniter",
    1,
]


def assert_consistent(files, epochs):
    """The three files are of one run of so many epochs."""
    checkpoint, best = checkpoints.load_checkpoint(files.checkpoint), checkpoints.load_checkpoint(files.best)
    rows = read_csv(files.log)
    assert [int(row["epoch"]) for row in rows] == list(range(1, epochs + 1))
    assert rows == [{name: str(value) for name, value in row.items()} for row in checkpoint["rows"]]
    assert checkpoint["epoch"] == epochs
    errors = [tuple(float(row[f"validation_{kind}_error"]) for kind in ("certified", "clean")) for row in rows]
    assert checkpoint["err"] == errors[-1][0]
    assert best["err"] == min(errors)[0]
    assert best["epoch"] == 1 + errors.index(min(errors))
    assert best.keys() == {"state_dict", "err", "epoch", "arguments", "hardware"}
    assert best["hardware"].startswith("CPU, ")
    if best["epoch"] == epochs:
        assert all(torch.equal(best["state_dict"][name], w) for name, w in checkpoint["state_dict"].items())


def kill_at_writes(folder, writes, *flags):
    """Leaves in folder/N what a run does that is killed instead of writing its Nth file, for each of these N."""
    for write in writes:
        words = [*RUN, "--output_dir", folder / str(write), "--prefix", "tiny", *EASY, *flags]
        answer = Fork(functools.partial(train_and_die, write), *words).end()
        assert answer.code == -signal.SIGKILL, answer.err


# Six writes: checkpoint, best and log of the first epoch, then of the second.
@pytest.mark.parametrize("write", range(1, 7))
def test_a_run_killed_before_a_write_lost_an_epoch_at_most_and_is_consistent_when_resumed(runs, capsys, write):
    whole = runs.train(*EASY)
    errors = [float(row["validation_certified_error"]) for row in read_csv(whole.log)]
    assert errors[1] < errors[0], "the second epoch has to be the best for it to have three writes"
    kill_at_writes(runs.folder, [write])
    killed, saved = str(write), (write > 1) + (write > 4)  # epochs whose checkpoint is there
    files = runs.files(killed)
    assert files.checkpoint.exists() == (saved > 0)
    if saved:
        runs.train(*EASY, "--resume", name=killed)
        assert f"resuming after epoch {saved} of 2" in capsys.readouterr().out
        assert_consistent(files, 2)
        assert losses(files.log)[:saved] == losses(whole.log)[:saved]


def test_a_run_that_replaces_another_and_is_killed_does_not_go_on_with_its_files(runs):
    other = ["--seed", 1, "--lr", 1e-6]  # learns nothing, so that the files that are there look better than its own
    runs.train(*EASY)
    before = runs.contents()
    for write in (2, 3):
        shutil.copytree(runs.folder / "run", runs.folder / str(write))
    kill_at_writes(runs.folder, (2, 3), *other, "--overwrite")
    for name in ("2", "3"):
        assert runs.contents(name)["tiny_checkpoint.pth"] != before["tiny_checkpoint.pth"]
        assert runs.contents(name)["tiny_epochs.csv"] == before["tiny_epochs.csv"]
        runs.train(*EASY, *other, "--resume", name=name)
        assert_consistent(runs.files(name), 2)
        assert checkpoints.load_checkpoint(runs.files(name).best)["arguments"]["seed"] == 1


def written_at(path):
    return path.stat().st_mtime_ns if path.exists() else None


def test_killed_at_random_moments_a_run_is_consistent_whenever_it_is_resumed(runs):
    rng, files, epochs, reached = random.Random(0), runs.files(), 12, 0
    flags = [*EASY, "--epochs", epochs]
    for start in range(3):
        before = written_at(files.log)
        run = Fork(train_mnist.main, *runs.flags(), *flags, *(["--resume"] if start else []))
        run.kill_behind(lambda before=before: written_at(files.log) != before, rng.uniform(0, 0.4))
        epoch = checkpoints.load_checkpoint(files.checkpoint)["epoch"]
        assert epoch > 0
        assert epoch >= reached
        reached = epoch
    runs.train(*flags, "--resume")
    assert_consistent(files, epochs)


def test_a_finished_run_whose_best_and_log_are_gone_or_damaged_has_them_again(runs):
    files = runs.train(*EASY)
    best = files.best.read_bytes()
    files.best.unlink()
    files.log.write_text("epoch\n")
    runs.train(*EASY, "--resume")
    assert_consistent(files, 2)
    files.best.write_bytes(best[:1000])
    files.log.unlink()
    runs.train(*EASY, "--resume")
    assert_consistent(files, 2)


# --- in detail


def checkpoint_of(*errors, weight=0.0, clean=(0.1,) * 4):
    names = "epoch", "validation_certified_error", "validation_clean_error"
    rows = [dict(zip(names, row)) for row in zip(range(1, len(errors) + 1), errors, clean)]
    state = {"weight": torch.full((2,), weight)}
    return {"state_dict": state, "err": errors[-1], "epoch": len(errors), "arguments": {}, "rows": rows}


def test_only_the_first_of_the_best_epochs_is_the_best(tmp_path):
    files = RunFiles(tmp_path, "run")
    for weight, errors in enumerate([(0.5,), (0.5, 0.3), (0.5, 0.3, 0.3), (0.5, 0.3, 0.3, 0.4)]):
        files.save(checkpoint_of(*errors, weight=float(weight)))
    assert checkpoints.load_checkpoint(files.best)["state_dict"]["weight"].tolist() == [1, 1]
    assert best_row(checkpoint_of(0.5, 0.3, 0.3)["rows"])["epoch"] == 2


def test_of_epochs_that_certify_as_much_the_one_with_the_smallest_clean_error_is_the_best():
    """As where nothing is certified: the first one is the least trained."""
    clean = [0.5, 0.3, 0.3, 0.1]
    assert best_row(checkpoint_of(1.0, 1.0, 1.0, clean=clean)["rows"])["epoch"] == 2
    assert best_row(checkpoint_of(1.0, 0.9, 0.9, 1.0, clean=clean)["rows"])["epoch"] == 2


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
def test_resume_refuses_a_checkpoint_whose_rows_are_no_log(runs, rows):
    runs.train(*EASY)
    path = runs.files().checkpoint
    checkpoints.save_checkpoint(path, checkpoints.load_checkpoint(path) | {"rows": rows})
    before = runs.contents()
    with pytest.raises(InputError, match="cannot be resumed"):
        runs.train(*EASY, "--resume")
    assert runs.contents() == before
