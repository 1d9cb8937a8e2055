"""What the tests of the scripts share: command lines in process and for real, tiny nets, a few digits."""

import csv
import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import pytest
import torch

import train_mnist
import utils
from data_load import load_data
from locallip.checkpoints import save_checkpoint
from locallip.dependencies import torchvision_datasets
from locallip.files import run_script
from locallip.training import run as training_run
from locallip.training.files import RunFiles

# Tiny networks gain nothing from a second thread, and the suite runs a process on every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# The tests' own imports of matplotlib would fail by a notebook's, where it is unknown; those that ask for one set it.
os.environ.pop("MPLBACKEND", None)

pytest.register_assert_rewrite("oracles", "contracts_of_layers", "contracts_of_operators")

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 0.05
TINY = ["--data", "digits", "--width", WIDTH, "--device", "cpu"]


@dataclass
class Answer:
    """How a script ended."""

    code: int
    out: str
    err: str


def spawn(*command, **environment):
    """Run Python on `command` as a process of its own in the repository's folder, with these variables added."""
    line, environment = [sys.executable, *map(str, command)], os.environ | environment
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    return Answer(done.returncode, done.stdout, done.stderr)


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def command_line(monkeypatch):
    """Sets the command line that the code under test will parse."""

    def set_flags(*flags):
        monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])

    return set_flags


@pytest.fixture
def call(command_line, capsys):
    """Runs a script by its module's name within this process, as its last lines would."""

    def run(script, *flags):
        command_line(*flags)
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit:
            run_script(importlib.import_module(script).main)
        return Answer(exit.value.code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def digits():
    """The training and the test set, as load_data gives them, by its `train`."""
    return {train: load_data("digits", "unused", train) for train in (True, False)}


@pytest.fixture
def few_digits(monkeypatch, digits):
    """Lets the training scripts see 128 training images and 64 test images only."""
    few = {True: digits[True][:128], False: digits[False][:64]}
    monkeypatch.setattr(utils, "load_data", lambda data, data_dir, train: few[train])
    return few


@pytest.fixture
def no_network(monkeypatch):
    """Lets no download of torchvision's succeed."""

    def fail(*arguments, **named):
        raise URLError("no network")

    for module in (torchvision_datasets().mnist, torchvision_datasets().cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)


@pytest.fixture
def tiny_net():
    torch.manual_seed(0)
    return utils.select_model("digits", "relux", width=WIDTH)


@pytest.fixture
def saved_net(tmp_path, tiny_net):
    """The file of an untrained tiny net."""
    path = tmp_path / "net_best.pth"
    save_checkpoint(path, {"state_dict": tiny_net.state_dict(), "err": 1.0, "epoch": 0})
    return path


# --- training runs

RUN = [*TINY, "--epochs", 4, "--rampup", 2, "--batch_size", 32, "--epsilon", 0.2, "--epsilon_train", 0.3]
RUN += ["--lr", 5e-3, "--test_sniter", 5]


class Runs:
    """Training runs with tiny nets below one folder, one subfolder each."""

    def __init__(self, folder, command_line, monkeypatch):
        self.folder, self.command_line, self.monkeypatch = folder, command_line, monkeypatch

    def files(self, name="run"):
        return RunFiles(self.folder / name, "tiny")

    def contents(self, name="run"):
        return {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}

    def flags(self, name="run"):
        return [*RUN, "--output_dir", self.folder / name, "--prefix", "tiny"]

    def train(self, *flags, name="run"):
        self.command_line(*self.flags(name), *flags)
        train_mnist.main()
        return self.files(name)

    def train_until(self, epoch, *flags, name="run"):
        """As if somebody pressed Ctrl-C just after an epoch was saved."""
        finish_epoch = training_run._Run._finish_epoch

        def finish_epoch_and_stop(run, finished, row):
            finish_epoch(run, finished, row)
            if finished + 1 == epoch:
                raise KeyboardInterrupt

        with self.monkeypatch.context() as patch:
            patch.setattr(training_run._Run, "_finish_epoch", finish_epoch_and_stop)
            with pytest.raises(KeyboardInterrupt):
                self.train(*flags, name=name)

    def train_in_two_parts(self, *flags, name="run"):
        self.train_until(2, *flags, name=name)
        return self.train("--resume", *flags, name=name)


@pytest.fixture
def runs(tmp_path, command_line, monkeypatch, few_digits):
    return Runs(tmp_path, command_line, monkeypatch)


def without_seconds(log):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_csv(log)]


def losses(log):
    return [float(row["loss"]) for row in read_csv(log)]
