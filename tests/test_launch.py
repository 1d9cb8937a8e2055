"""Several processes without torchrun: their environment says enough for one run, or is refused in one line."""

import functools
import re
import subprocess
import sys
from datetime import timedelta

import pytest
from conftest import ROOT, TINY, read_csv
from forks import environment_with, meeting_place, run_at_once

import train_mnist
import utils
from locallip import distributed, files, launch
from locallip.launch import Launch

MEETING = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
LAUNCHERS = {
    "torchrun or a loop": {"RANK": "1", "WORLD_SIZE": "3"},
    "Open MPI": {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "3"},
    "MPICH": {"PMI_RANK": "1", "PMI_SIZE": "3"},
    "srun": {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "SLURM_NTASKS": "3"},
    "srun with the size exported": {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "3", "WORLD_SIZE": "3"},
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_understood(launcher):
    assert launch.read(LAUNCHERS[launcher] | MEETING) == Launch(1, 3, None, None)


def test_the_place_on_the_machine_is_taken_where_it_is_told():
    local = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    assert launch.read(LAUNCHERS["torchrun or a loop"] | MEETING | local) == Launch(1, 3, 0, 2)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": ""},
        {"SLURM_NTASKS": "4", "SLURM_NPROCS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # sbatch, salloc
        {"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"},  # srun --pty bash
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "WORLD_SIZE": "1"},  # separate runs, asked for
    ],
)
def test_one_process_is_alone(environment):
    assert launch.read(environment) == Launch() == Launch(0, 1, 0, 1)


def test_torchrun_inside_srun_and_mpirun_by_way_of_srun_are_the_ones_that_count():
    srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    assert launch.read(srun | {"RANK": "5", "WORLD_SIZE": "8"} | MEETING).rank == 5
    assert launch.read(srun | {"OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8"} | MEETING).rank == 5


REFUSED = {
    "no rank": ({"WORLD_SIZE": "2"} | MEETING, "not both"),
    "no size": ({"RANK": "0"} | MEETING, "not both"),
    "rank too large": ({"RANK": "2", "WORLD_SIZE": "2"} | MEETING, "no process 2 of 2"),
    "negative rank": ({"RANK": "-1", "WORLD_SIZE": "2"} | MEETING, "no process -1 of 2"),
    "no processes": ({"RANK": "0", "WORLD_SIZE": "0"} | MEETING, "no process 0 of 0"),
    "no number": ({"RANK": "first", "WORLD_SIZE": "2"} | MEETING, "RANK is no whole number: 'first'"),
    "no address": ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "29500"}, "set MASTER_ADDR for all"),
    "no meeting place": (LAUNCHERS["srun"], "set MASTER_ADDR and MASTER_PORT for all"),
    "no port": ({"RANK": "0", "WORLD_SIZE": "2"} | MEETING | {"MASTER_PORT": "70000"}, "no port"),
    "another size": ({"WORLD_SIZE": "2"} | LAUNCHERS["srun"] | MEETING, "1 of 2, its launcher 1 of 3"),
    "another rank": ({"RANK": "0"} | LAUNCHERS["Open MPI"] | MEETING, "0 of 3, its launcher 1 of 3"),
    "local rank too large": (
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"} | MEETING,
        "LOCAL_RANK 2 and LOCAL_WORLD_SIZE 2",
    ),
    "more here than there are": ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "4"} | MEETING, "SIZE 4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_joined_is_refused_with_a_way_out(case):
    environment, complaint = REFUSED[case]
    with pytest.raises(ValueError, match=complaint) as error:
        launch.read(environment)
    assert len(str(error.value).splitlines()) == 1


# --- for real

SHORT = ["--epochs", 1, "--rampup", 0, "--epsilon", 0.1, "--epsilon_train", 0.1, "--sniter", 1, "--test_sniter", 1]


def train_on_few_digits(seconds):
    """What a process of the loop runs; it waits so long for the others."""
    load_data = utils.load_data
    utils.load_data = lambda data, data_dir, train: load_data(data, data_dir, train)[: 66 if train else 21]
    distributed._MEETING = timedelta(seconds=seconds)
    distributed._SECONDS_FOR_TORCHRUN = files._SECONDS_FOR_RANK_0 = 0
    train_mnist.main()
    # A connection that still stands while an interpreter shuts down aborts the process at times.
    assert not distributed.dist.is_initialized()


def start_loop(folder, environments, *flags, seconds=60):
    """What a hand-written loop does: one process for each environment; how they ended."""
    main = functools.partial(train_on_few_digits, seconds)
    words = [*TINY, *SHORT, "--output_dir", folder, "--prefix", "few", *flags]
    return run_at_once([environment_with(**given) for given in environments], main, *words)


@pytest.fixture
def meeting():
    return meeting_place()


def names(rank):
    return {"RANK": str(rank), "WORLD_SIZE": "2"}


def errors(answer):
    return [line for line in answer.err.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    "of_rank", [names, lambda rank: {"SLURM_PROCID": str(rank), "SLURM_STEP_NUM_TASKS": "2"}], ids=["loop", "srun"]
)
def test_two_processes_of_a_loop_train_one_run_and_write_one_set_of_files(tmp_path, meeting, of_rank):
    first, second = start_loop(tmp_path, [of_rank(rank) | meeting for rank in range(2)], "--batch_size", 9)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "66 training images, 21 test images" in first.out
    assert "in each of 2 processes" in first.out
    # Some versions of gloo print what they are connected to.
    assert [line for line in second.out.splitlines() if not line.startswith("[Gloo]")] == []
    assert {path.name for path in tmp_path.glob("few*")} == {"few_best.pth", "few_checkpoint.pth", "few_epochs.csv"}
    assert len(read_csv(tmp_path / "few_epochs.csv")) == 1


def test_what_one_process_of_a_loop_refuses_ends_all(tmp_path, meeting):
    (tmp_path / "few_best.pth").write_text("mine")
    answers = start_loop(tmp_path, [names(rank) | meeting for rank in range(2)])
    assert [answer.code for answer in answers] == [2, 2]
    assert re.match("error: rank 0: .*few_best.pth exists", answers[0].err)
    assert re.match("error: rank 1: process 0: .*few_best.pth exists", answers[1].err)
    assert (tmp_path / "few_best.pth").read_text() == "mine"


def test_processes_without_a_meeting_place_write_nothing(tmp_path):
    for answer in start_loop(tmp_path, [names(0), names(1)]):
        assert (answer.code, answer.out, len(answer.err.splitlines())) == (2, "", 1)
        assert "set MASTER_ADDR and MASTER_PORT" in answer.err
    assert not list(tmp_path.glob("few*"))


@pytest.mark.parametrize("started", [[0], [1], [0, 0]], ids=["only 0", "only 1", "0 twice"])
def test_processes_that_do_not_meet_write_nothing(tmp_path, meeting, started):
    for answer in start_loop(tmp_path, [names(rank) | meeting for rank in started], seconds=1):
        assert (answer.code, answer.out, len(errors(answer))) == (2, "", 1)
        assert "did not meet" in answer.err or "two processes are number 0" in answer.err
    assert not list(tmp_path.glob("few*"))


def test_of_two_processes_of_one_rank_one_is_refused_and_the_run_is_whole(tmp_path, meeting):
    answers = start_loop(tmp_path, [names(rank) | meeting for rank in (1, 1, 0)], "--batch_size", 9, seconds=20)
    assert sorted(answer.code for answer in answers[:2]) == [0, 2], [answer.err for answer in answers]
    assert answers[2].code == 0, answers[2].err
    (refused,) = (answer for answer in answers if answer.code)
    assert (refused.out, len(errors(refused))) == ("", 1)
    # The latter where it comes so late that the run is over.
    assert "two processes are number 1 of 2" in refused.err or "did not meet" in refused.err
    assert {path.name for path in tmp_path.glob("few*")} == {"few_best.pth", "few_checkpoint.pth", "few_epochs.csv"}
    assert len(read_csv(tmp_path / "few_epochs.csv")) == 1


@pytest.mark.parametrize(
    "command",
    [
        ["falsify.py", "--saved_model", "nowhere.pth"],
        ["benchmarks/training_step.py"],
        ["benchmarks/certification.py", "--saved_model", "nowhere.pth"],
        ["table.py"],
    ],
    ids=lambda command: command[0],
)
def test_scripts_of_one_process_refuse_to_be_one_of_several(command):
    environment = environment_with(**names(0), **MEETING)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr
    assert "process 0 of 2" in done.stderr
    assert "WORLD_SIZE=1" in done.stderr
