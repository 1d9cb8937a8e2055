"""Every training run of the paper and our own, once: its flags, its checkpoint, its evaluation, the paper's figures.

The training scripts take their defaults from here, the table and the benchmarks their rows, and `run_job.sh` its jobs:

    python runs.py                            lists the jobs
    python runs.py command JOB [ARGUMENTS]    prints what a job runs, for a shell, behind the name of a Python

Needs nothing but Python, so that jobs can be listed before anything is installed. `utils` passes the records on.
"""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from typing import Any, NoReturn


@dataclass(frozen=True)
class Recipe:
    """What the runs on a published data set have in common.

    Attributes:
        title: of the data set.
        train, evaluate: the scripts.
        defaults: of the flags of the training script, by name.
        stated: those of them that the command line of a job names all the same, as the authors' does.
        processes: how many share the batch, one per GPU.
    """

    title: str
    train: str
    evaluate: str
    defaults: dict[str, Any]
    stated: tuple[str, ...] = ()
    processes: int = 1


RECIPES = {
    "mnist": Recipe(
        "MNIST",
        "train_mnist.py",
        "evaluate.py",
        defaults={
            "epochs": 300,
            "warmup": 0,
            "rampup": 150,
            "epsilon_train": 1.58,
            "sniter": 5,
            "init": 1.0,
            "lr": 1e-3,
            "end_lr": 5e-6,
            "batch_size": 256,
            "test_batch_size": 256,
        },
    ),
    "cifar10": Recipe(
        "CIFAR-10",
        "train_cifar10.py",
        "evaluate.py",
        defaults={
            "epochs": 800,
            "warmup": 20,
            "rampup": 400,
            "epsilon_train": 0.1551,
            "sniter": 2,
            "init": 2.0,
            "lr": 1e-3,
            "end_lr": 1e-6,
            "batch_size": 256,
            "test_batch_size": 256,
        },
    ),
    "tinyimagenet": Recipe(
        "Tiny ImageNet",
        "TinyImagenet/train_tinyimagenet.py",
        "TinyImagenet/evaluate_tinyimagenet.py",
        defaults={
            "data": "tinyimagenet",
            "model": "tinyimagenet_relux",
            "epochs": 250,
            "warmup": 0,
            "rampup": 125,
            "epsilon_train": 0.16,
            "sniter": 1,
            "init": 1.0,
            "lr": 2.5e-4,
            "end_lr": 5e-7,
            "lr_scheduler": "exp",
            "sparse": 0.01,
            "indices": "0,6,12,14,17",
            "batch_size": 32,
            "test_batch_size": 32,
        },
        stated=(
            *("warmup", "batch_size", "rampup", "epochs", "sparse", "indices", "data", "test_batch_size"),
            *("epsilon_train", "lr_scheduler"),
        ),
        processes=4,
    ),
}


@dataclass(frozen=True)
class Run:
    """A training run and its evaluation, whose job is called evaluate-JOB.

    Attributes:
        job: name of the training job.
        data: the data set, whose recipe and radius it has.
        title: what it trains.
        model: name of the network.
        flags: what else its command line says.
        prefix: of its checkpoints, below runs/ and pretrained/.
        paper: published clean / PGD / certified accuracy in percent; None: a run that is not the paper's.
        took: how long it took where; None: not run in full.
    """

    job: str
    data: str
    title: str
    model: str
    flags: str
    prefix: str
    paper: tuple[float, float, float] | None = None
    took: str | None = None

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.data]

    @property
    def epochs(self) -> int:
        """Length of the whole schedule."""
        return self._number("epochs")

    @property
    def batch_size(self) -> int:
        """Images per training step, in each process."""
        return self._number("batch_size")

    @property
    def start_from(self) -> str | None:
        """The file with whose weights it begins; None: it begins afresh."""
        return self._given("start_from")

    @property
    def after(self) -> str | None:
        """The job with whose weights it begins; None: it begins afresh."""
        return next((run.job for run in RUNS if self.start_from == f"pretrained/{run.prefix}_best.pth"), None)

    def _number(self, name: str) -> int:
        given = self._given(name)
        return self.recipe.defaults[name] if given is None else int(given)

    def _given(self, name: str) -> str | None:
        words = self.flags.split()
        flag = f"--{name}"
        return words[words.index(flag) + 1] if flag in words else None

    def training(self) -> list[str]:
        """The flags of the training, as words."""
        stated = [word for name in self.recipe.stated for word in (f"--{name}", str(self.recipe.defaults[name]))]
        return [*stated, "--model", self.model, *self.flags.split(), "--prefix", self.prefix]

    def evaluation(self, arguments: list[str]) -> list[str]:
        """The flags of the evaluation, as words; arguments: further ones, which say where the report goes."""
        batch, report = self.recipe.defaults["test_batch_size"], f"results/{self.job}/{_report(arguments)}"
        effort = ["--test_batch_size", str(batch), "--test_sniter", "2000"]
        files = ["--saved_model", f"pretrained/{self.prefix}", "--out", report]
        return ["--data", self.data, "--model", self.model, *effort, *files, *arguments]


RUNS = (
    # The 4C3F nets start with thresholds at 1, as the authors did: their code ignored --init (docs/deviations.md, 7).
    Run(
        "mnist-4c3f",
        "mnist",
        "4C3F, GloRo loss",
        "relux",
        "--sniter 5 --init 1.0 --epsilon_train 1.75 --gloro --no_augmentation --opt_iter 10",
        "relu/mnist_4C3F",
        (96.3, 78.2, 55.8),
    ),
    Run(
        "mnist-4c3f-maxmin",
        "mnist",
        "4C3F, clipped MaxMin, trained with global norms",
        "c4f3_clmaxmin",
        "--orthogonal --global_epochs 300 --sniter 2 --batch_size 64 --epsilon_train 1.75 --gloro --no_augmentation",
        "maxmin/mnist_4C3F_maxmin",
    ),
    Run(
        "mnist-fast",
        "mnist",
        "4C3F, clipped MaxMin, global norms, falling rate, averaged weights",
        "c4f3_clmaxmin",
        "--epochs 40 --orthogonal --global_epochs 40 --rampup 20 --sniter 2 --batch_size 64 --epsilon_train 1.25 "
        "--gloro --no_augmentation --lr_scheduler linear --end_lr 1e-5 --ema 0.999",
        "maxmin/mnist_fast",
        took="0.8 h on one core",
    ),
    Run(
        "mnist-best",
        "mnist",
        "4C3F, clipped MaxMin, mnist-fast and 45 more epochs",
        "c4f3_clmaxmin",
        "--start_from pretrained/maxmin/mnist_fast_best.pth --epochs 45 --global_epochs 45 --rampup 0 --sniter 2 "
        "--batch_size 64 --epsilon_train 1.25 --gloro --no_augmentation --lr 5e-4 --lr_scheduler linear --end_lr 1e-5 "
        "--ema 0.999",
        "maxmin/mnist_best",
        took="1.7 h on one core after mnist-fast",
    ),
    Run(
        "mnist-fast-relu",
        "mnist",
        "4C3F, clipped ReLU, global norms, falling rate, averaged weights",
        "relux",
        "--epochs 40 --orthogonal --global_epochs 40 --rampup 20 --sniter 2 --init 1.0 --batch_size 64 "
        "--epsilon_train 0.8 --epsilon 0.8 --gloro --no_augmentation --lr_scheduler linear --end_lr 1e-5 --ema 0.999",
        "relu/mnist_fast",
        took="1.5 h on one core",
    ),
    Run(
        "cifar10-4c3f",
        "cifar10",
        "4C3F",
        "relux",
        "--sniter 2 --init 1.0 --end_lr 1e-6",
        "relu/cifar_4C3F",
        (70.1, 64.2, 53.5),
    ),
    Run(
        "cifar10-6c2f",
        "cifar10",
        "6C2F",
        "c6f2_relux",
        "--sniter 2 --init 2.0 --end_lr 1e-6",
        "relu/cifar_6C2F",
        (70.7, 64.8, 54.3),
    ),
    Run(
        "cifar10-6c2f-gloro",
        "cifar10",
        "6C2F, GloRo loss",
        "c6f2_relux",
        "--sniter 2 --init 2.0 --end_lr 1e-6 --gloro",
        "relu/cifar_6C2F_gloro",
        (76.4, 69.2, 51.3),
    ),
    Run(
        "cifar10-6c2f-maxmin",
        "cifar10",
        "6C2F, clipped MaxMin",
        "c6f2_clmaxmin",
        "--sniter 2 --end_lr 1e-6",
        "maxmin/cifar_6C2F_maxmin",
        (77.4, 70.4, 60.7),
    ),
    Run(
        "cifar10-fast-muon",
        "cifar10",
        "6C2F, MaxMin without thresholds, EMMA loss, Muon: what cifar10-fast begins with",
        "c6f2_maxmin",
        "--epochs 16 --orthogonal --global_epochs 16 --warmup 0 --rampup 13 --sniter 2 --batch_size 64 "
        "--epsilon_train 0.1551 --loss emma --optimizer muon --lr 1e-2 --lr_scheduler linear --end_lr 3.85e-3 "
        "--ema 0.999",
        "maxmin/cifar_fast_muon",
        took="1.0 h on one core",
    ),
    Run(
        "cifar10-fast",
        "cifar10",
        "6C2F, MaxMin without thresholds, cifar10-fast-muon and 8 epochs with Adam",
        "c6f2_maxmin",
        "--start_from pretrained/maxmin/cifar_fast_muon_best.pth --epochs 8 --global_epochs 8 --warmup 0 --rampup 0 "
        "--unaugmented_epochs 2 --sniter 2 --batch_size 64 --epsilon_train 0.1551 --loss emma --lr 5e-4 "
        "--lr_scheduler linear --end_lr 1e-5 --ema 0.998",
        "maxmin/cifar_fast",
        took="0.3 h on one core after cifar10-fast-muon",
    ),
    Run(
        "cifar10-muon",
        "cifar10",
        "6C2F, MaxMin without thresholds, EMMA loss, Muon",
        "c6f2_maxmin",
        "--epochs 26 --orthogonal --global_epochs 26 --warmup 0 --rampup 13 --unaugmented_epochs 3 --sniter 2 "
        "--batch_size 64 --epsilon_train 0.1551 --loss emma --optimizer muon --lr 1e-2 --lr_scheduler linear "
        "--end_lr 1e-5 --ema 0.999",
        "maxmin/cifar_muon",
        took="1.6 h on one core",
    ),
    Run(
        "cifar10-best",
        "cifar10",
        "6C2F, MaxMin without thresholds, cifar10-muon and 20 epochs with Adam",
        "c6f2_maxmin",
        "--start_from pretrained/maxmin/cifar_muon_best.pth --epochs 20 --global_epochs 20 --warmup 0 --rampup 0 "
        "--unaugmented_epochs 4 --sniter 2 --batch_size 64 --epsilon_train 0.1551 --loss emma --lr 5e-4 "
        "--lr_scheduler linear --end_lr 1e-5 --ema 0.998",
        "maxmin/cifar_best",
        took="0.7 h on one core after cifar10-muon",
    ),
    Run(
        "tinyimagenet-8c2f",
        "tinyimagenet",
        "8C2F",
        "tinyimagenet_relux",
        "--sniter 1 --init 1.0 --lr 2.5e-4",
        "relu/tiny_8C2F",
        (30.8, 28.4, 20.7),
    ),
    Run(
        "tinyimagenet-8c2f-maxmin",
        "tinyimagenet",
        "8C2F, clipped MaxMin",
        "tiny_clmaxmin",
        "--sniter 3 --lr 1e-4",
        "maxmin/tiny_8C2F_maxmin",
        (36.9, 33.3, 23.4),
    ),
)


def _report(arguments: list[str]) -> str:
    """The folder of an evaluation's report; where there are two certificates, that of theirs, which may be none.

    Held-out images have folders of their own, so that they never replace what was found on the test set.
    """
    given = {"--certificate": "proven", "--effort": "dual"}
    for flag, value in zip([*arguments, ""], [*arguments[1:], "", ""]):
        name, equals, rest = flag.partition("=")
        given[name] = rest if equals else value
    proven = "product" if given["--effort"] == "product" else "proven"
    report = {"estimate": "estimate", "both": ""}.get(given["--certificate"], proven)
    return f"held-out/{report}" if "--held_out" in given else report


def command(job: str, arguments: list[str]) -> list[str]:
    """What a job runs, behind the name of a Python, as words.

    Raises:
        ValueError: if there is no such job, or the environment's PROCESSES is no number.
    """
    run = next((run for run in RUNS if job in (run.job, f"evaluate-{run.job}")), None)
    if run is None:
        raise ValueError(f"'{job}' is no training or evaluation; 'bash run_job.sh' lists all jobs")
    if job == run.job:
        words = [run.recipe.train, *run.training(), *arguments]
    else:
        words = [run.recipe.evaluate, *run.evaluation(arguments)]
    if run.recipe.processes == 1:
        return words
    processes = os.environ.get("PROCESSES") or str(run.recipe.processes)
    if not processes.isdecimal() or int(processes) == 0:
        raise ValueError(f"PROCESSES must be a number of processes, not '{processes}'")
    return ["-m", "locallip.start", "--standalone", f"--nproc_per_node={processes}", *words]


def listing() -> str:
    """The jobs, a line each: training, evaluation, what it is."""
    width = max(len(run.job) for run in RUNS) + 2
    lines = {True: [], False: []}
    for run in RUNS:
        title = f"{run.recipe.title}, {run.title}, {run.epochs} epochs{f' ({run.took})' if run.took else ''}"
        lines[run.paper is not None].append(f"  {run.job:{width}}{'evaluate-' + run.job:{width + 9}}{title}")
    return "\n".join([*lines[True], "\n  Not of the paper, but on the same nets:\n", *lines[False]])


def main() -> None:
    words = sys.argv[1:]
    if words in ([], ["--help"], ["-h"]):
        print(listing())
    elif words[0] == "command" and len(words) > 1:
        try:
            print(shlex.join(command(words[1], words[2:])))
        except ValueError as error:
            _fail(str(error))
    else:
        _fail("python runs.py lists the jobs; python runs.py command JOB [ARGUMENTS] prints what one runs")


def _fail(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
