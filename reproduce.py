"""Do a row of the table from end to end: data, training, evaluation, and the paper's figures beside those found.

With --minutes the schedule is shortened to what fits that time here, which a few steps tell first. Flags that are not
in the list go to the training script.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import runs
import table
import utils
from data_load import DATA_SETS, count_classes, load_data
from locallip import devices, distributed, flags
from locallip.evaluation.table import table as as_table
from locallip.files import InputError, check_writable, exists, run_script, write_atomically
from locallip.images import hold_out
from locallip.training.files import RunFiles
from locallip.training.pace import seconds_per_epoch

ROOT = Path(__file__).resolve().parent
# What an evaluation costs per image, in forward and backward passes of its attack: with global norms, and where masks
# make every image's norms its own. From the reports below results/.
_PASSES = {"global": 250, "masked": 700}
# Of the minutes, at most this share goes to the evaluation, and so many images are evaluated at least.
_EVALUATION_SHARE = 0.25
_FEWEST_IMAGES = 500
# Power iterations of the estimate where time is short; the published protocol has 2,000, which hours go by with.
_SHORT_ESTIMATE = 100
# What imports, loading and writing reports take, in seconds.
_OVERHEAD = 60


@dataclass(frozen=True)
class Reproduction:
    """What is done, and how long it takes.

    Attributes:
        epochs: of the training.
        of_epochs: of the whole schedule.
        scale: what the published schedule is multiplied with.
        training_seconds, evaluation_seconds: estimated.
        images: test images that are evaluated.
        power_iterations: of the estimate.
    """

    epochs: int
    of_epochs: int
    scale: float
    training_seconds: float
    evaluation_seconds: float
    images: int
    power_iterations: int

    def within(self, minutes: float) -> Reproduction:
        """The part of this plan that fits.

        Raises:
            InputError: if not even two epochs do.
        """
        seconds = 60 * minutes - _OVERHEAD
        most = _EVALUATION_SHARE * seconds
        share = min(1.0, max(most / self.evaluation_seconds, _FEWEST_IMAGES / self.images))
        evaluation = share * self.evaluation_seconds
        per_epoch = self.training_seconds / self.of_epochs
        epochs = min(self.of_epochs, math.floor((seconds - evaluation) / per_epoch))
        if epochs < min(2, self.of_epochs):
            fewest = (_OVERHEAD + evaluation + 2 * per_epoch) / 60
            raise InputError(f"two epochs and their evaluation take {fewest:.0f} minutes here; give --minutes more")
        return replace(
            self,
            epochs=epochs,
            scale=self.scale * epochs / self.of_epochs,
            training_seconds=epochs * per_epoch,
            evaluation_seconds=evaluation,
            images=math.ceil(share * self.images),
            power_iterations=min(self.power_iterations, _SHORT_ESTIMATE),
        )


def plan_of(run: utils.Run, args: argparse.Namespace) -> Reproduction:
    """The whole schedule and the whole test set, measured on this machine."""
    device = devices.select_device(args.device)
    training_set, test_set = (load_data(args.data, args.data_dir, train=train).to(device) for train in (True, False))
    validation_set = test_set
    if args.val_split:
        training_set, validation_set = hold_out(training_set, args.val_split, args.seed)
    torch.manual_seed(args.seed)
    classes = count_classes(args.data, args.data_dir)
    model = utils.select_model(args.data, args.model, args.init, args.width, classes, args.orthogonal)
    model = model.to(device, memory_format=torch.channels_last)
    alone = min(args.global_epochs, args.epochs)
    lengths = {False: alone, True: args.epochs - alone}
    # On a CPU the processes share the cores.
    processes = min(run.recipe.processes, torch.cuda.device_count()) if device.type == "cuda" else 1
    # Several do not record their steps.
    measured = argparse.Namespace(**vars(args) | ({} if processes == 1 else {"cuda_graph": "no"}))
    training = sum(
        length * seconds_per_epoch(model, training_set, validation_set, measured, box) / processes
        for box, length in lengths.items()
        if length
    )
    x, y, _ = next(test_set[: args.test_batch_size].batches(args.test_batch_size))
    passes = _PASSES["masked" if alone < args.epochs else "global"]
    evaluation = passes * len(test_set) * seconds_per_pass(model, x, y) / processes
    return Reproduction(args.epochs, args.epochs, args.scale, training, evaluation, len(test_set), 2000)


def seconds_per_pass(model: nn.Sequential, x: Tensor, y: Tensor) -> float:
    """Seconds of an image's forward and backward pass, in a batch x (N, C, H, W) with labels y (N,)."""
    x, found = x.clone().requires_grad_(), []
    for _ in range(4):
        started = time.perf_counter()
        torch.autograd.grad(F.cross_entropy(model(x), y), x)
        if x.is_cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - started)
    return min(found[1:]) / len(x)


def describe(run: utils.Run, plan: Reproduction, full: Reproduction, folder: Path) -> str:
    """What is going to be done, for people."""
    total = plan.training_seconds + plan.evaluation_seconds + _OVERHEAD
    whole = full.training_seconds / full.of_epochs
    lines = {
        "the recipe": f"{full.of_epochs} epochs of {whole:.0f} s here, {_duration(full.training_seconds)}",
        "training": f"{plan.epochs} of {plan.of_epochs} epochs, about {_duration(plan.training_seconds)}",
        "evaluation": f"{plan.images:,} test images, about {_duration(plan.evaluation_seconds)}",
        "in all": f"about {_duration(total)}; what is stopped goes on with --resume",
        "report": f"{folder}",
    }
    title = f"{run.job}: {table.row(run).title}"
    return "\n".join([title, *(f"  {name:<12}{line}" for name, line in lines.items())])


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{max(1, round(seconds / 60))} min"


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The flags of this script, and those for the training."""
    parser = flags.ArgumentParser(__doc__)
    flag = parser.add_argument
    flag("job", choices=[run.job for run in runs.RUNS], metavar="JOB", help="a training job of run_job.sh")
    flag("--minutes", type=flags.positive_float, help="time that all of it may take; default: the whole schedule")
    flag("--output_dir", type=flags.path, default="runs/reproduced", help="folder for checkpoints, logs and reports")
    flag("--resume", action="store_true", help="go on with what was stopped, as it was planned then")
    flag("--overwrite", action="store_true", help="start afresh even if the row was begun already")
    args, others = parser.parse_known_args()
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    if args.resume and args.minutes:
        raise InputError("--resume goes on as it was planned; drop --minutes")
    return args, others


def main() -> None:
    args, others = arguments()
    distributed.refuse_several()
    run = next(run for run in runs.RUNS if run.job == args.job)
    place = ["--output_dir", args.output_dir]
    wanted = utils.training_arguments(
        "", utils.data_sets(run.data), run.recipe.defaults, [*run.training(), *others, *place]
    )
    _refuse_other_rows(run, wanted)
    # A job may validate at another radius than its row is evaluated at.
    is_given = any(word.partition("=")[0] == "--epsilon" for word in others)
    epsilon = wanted.epsilon if is_given else DATA_SETS[wanted.data].epsilon
    files = RunFiles(Path(args.output_dir), run.prefix)
    report, planned = Path(args.output_dir) / "results" / run.job, files.best.with_name(f"{files.best.stem}_plan.json")
    plan = _planned(planned) if args.resume else _new_plan(args, run, wanted, files, report, planned)
    _run(run, runs.command(run.job, [*others, *place, "--scale", repr(plan.scale), *_again(args, files.checkpoint)]))
    what = ["--data", wanted.data, "--width", str(wanted.width), "--data_dir", wanted.data_dir]
    what += ["--device", wanted.device, "--seed", str(wanted.seed)]
    what += ["--epsilon", repr(epsilon), "--test_batch_size", str(wanted.test_batch_size)]
    how = ["--certificate", "both", "--images", str(plan.images), "--test_sniter", str(plan.power_iterations)]
    where = ["--saved_model", str(Path(args.output_dir) / run.prefix), "--out", str(report)]
    where += _again(args, report / "unfinished" / "run.json")
    _run(run, runs.command(f"evaluate-{run.job}", [*what, *how, *where]))
    print(as_table([replace(table.row(run), epsilon=epsilon)], report.parent))


def _refuse_other_rows(run: utils.Run, wanted: argparse.Namespace) -> None:
    """Refuse flags that make a training another job's, whose files the evaluation would look for in vain."""
    for name in ("prefix", "model"):
        if getattr(wanted, name) != getattr(run, name):
            way_out = "--output_dir puts its files elsewhere" if name == "prefix" else "name another JOB"
            raise InputError(f"--{name} is what makes the row {run.job}, so it stays {getattr(run, name)}; {way_out}")


def _new_plan(
    args: argparse.Namespace,
    run: utils.Run,
    wanted: argparse.Namespace,
    files: RunFiles,
    report: Path,
    planned: Path,
) -> Reproduction:
    check_writable(files.best.parent)
    if not args.overwrite:
        files.refuse_existing()
        if exists(report):
            raise InputError(f"{report} exists; choose another --output_dir, or --resume, or --overwrite")
    full = plan_of(run, wanted)
    plan = full.within(args.minutes) if args.minutes else full
    print(describe(run, plan, full, report), flush=True)
    write_atomically(planned, lambda temporary: temporary.write_text(json.dumps(asdict(plan), indent=2) + "\n"))
    return plan


def _planned(path: Path) -> Reproduction:
    """The plan that a stopped run had."""
    if not exists(path):
        raise InputError(f"there is nothing to resume: {path} is absent")
    try:
        return Reproduction(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from None


def _again(args: argparse.Namespace, begun: Path) -> list[str]:
    """The flag for something that may have been begun."""
    return ["--resume"] if args.resume and exists(begun) else ["--overwrite"] if args.resume or args.overwrite else []


def _once(words: list[str]) -> list[str]:
    """A command line with every flag once, as it is given last."""
    flags_with_values: dict[str, list[str]] = {}
    for word in words:
        if word.startswith("--") or not flags_with_values:
            name, given = word.partition("=")[0], []
            flags_with_values.pop(name, None)
            flags_with_values[name] = given
        given.append(word)
    return [word for given in flags_with_values.values() for word in given]


def _run(run: utils.Run, words: list[str]) -> None:
    """Run a script, whose output goes where this one's goes, and end as it ends if it fails."""
    words = _once(words)
    print(f"\n$ python {shlex.join(words)}", flush=True)
    here = [str(ROOT / word) if word in (run.recipe.train, run.recipe.evaluate) else word for word in words]
    # Where processes are several, the package starts them, from whatever folder.
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    with subprocess.Popen([sys.executable, *here], env=os.environ | {"PYTHONPATH": paths}) as script:
        # Whoever stops this process means the script.
        before = signal.signal(signal.SIGTERM, lambda *_: script.terminate())
        code = script.wait()
        signal.signal(signal.SIGTERM, before)
    if code:
        sys.exit(code if code > 0 else 128 - code)


if __name__ == "__main__":
    run_script(main)
