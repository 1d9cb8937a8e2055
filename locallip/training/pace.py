"""How long an epoch takes on this machine, from a few steps of the training itself."""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import io
import tempfile
from pathlib import Path

from torch import nn

from locallip.images import ImageSet
from locallip.training.run import train

# Steps of an epoch that is timed, and such epochs, the first of which warms up.
_STEPS = 6
_EPOCHS = 3


def seconds_per_epoch(
    model: nn.Sequential, training_set: ImageSet, validation_set: ImageSet, args: argparse.Namespace, box: bool
) -> float:
    """Measure an epoch at the training's largest radius, validation included, on a part of both sets.

    model, sets: on one device; the model stays as it is. args: flags of a training script. box: whether of an epoch
    with a box, or with the ball alone. What compiling would gain is left out.
    """
    share = min(1.0, _STEPS * args.batch_size / len(training_set))
    parts = (images[: max(1, round(share * len(images)))] for images in (training_set, validation_set))
    with tempfile.TemporaryDirectory() as folder:
        short = {"epochs": _EPOCHS, "warmup": 0, "rampup": 0, "lr_warmup": 0.0}
        short["global_epochs"] = 0 if box else _EPOCHS
        alone = {
            "output_dir": folder,
            "prefix": "pace",
            "resume": False,
            "start_from": None,
            "compile": "no",
            "keep_vectors": False,
        }
        probe = argparse.Namespace(**vars(args) | short | alone)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            train(copy.deepcopy(model), *parts, probe)
        with (Path(folder) / "pace_epochs.csv").open(newline="", encoding="utf-8") as log:
            seconds = [float(row["seconds"]) for row in csv.DictReader(log)]
    return min(seconds[1:]) / share
