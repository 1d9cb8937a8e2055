"""What the tests of the scripts share: command lines in process and for real, tiny nets, a few digits."""

import csv
import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import training
import utils
from data_load import load_data

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
            utils.run_script(importlib.import_module(script).main)
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
    monkeypatch.setattr(training, "load_data", lambda data, data_dir, train: few[train])
    return few


@pytest.fixture
def tiny_net():
    torch.manual_seed(0)
    return utils.select_model("digits", "relux", width=WIDTH)


@pytest.fixture
def saved_net(tmp_path, tiny_net):
    """The file of an untrained tiny net."""
    path = tmp_path / "net_best.pth"
    utils.save_checkpoint(path, {"state_dict": tiny_net.state_dict(), "err": 1.0, "epoch": 0})
    return path
