"""Architectures, flags and hyper-parameters: what training and evaluation have to agree on."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from data_load import DATA_SETS, count_classes, load_data
from locallip import distributed
from locallip.bound.layers import ClampGroupSort, MaxMin, ReLU_x
from locallip.files import InputError
from locallip.flags import ArgumentParser, path, positive_float, positive_int, seed
from locallip.images import Augmentation, crop_and_flip, hold_out
from locallip.training import run as training_run
from locallip.training.flags import add_training_flags
from locallip.training.losses import choose_weight
from runs import RECIPES, RUNS, Run  # noqa: F401

# --- architectures ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Architecture:
    """A published network: its shape and what stands behind every hidden layer.

    Attributes:
        convolutions: (channels, kernel, stride, padding) of each.
        hidden: sizes of the hidden dense layers.
        activation: `relux`, `relu`, `clmaxmin` or `maxmin`.
        thresholds: for `clmaxmin` the start values (max, min) by layer.
    """

    convolutions: tuple[tuple[int, int, int, int], ...]
    hidden: tuple[int, ...]
    activation: str = "relux"
    thresholds: tuple[tuple[float, float], ...] = ()

    def make_activation(self, layer: int, shape: tuple[int, ...], init: float) -> nn.Module:
        """The activation behind hidden layer number `layer`, whose outputs have this shape."""
        if self.activation == "clmaxmin":
            return ClampGroupSort(shape, *self.thresholds[layer])
        if self.activation == "relux":
            return ReLU_x(shape, init)
        return MaxMin() if self.activation == "maxmin" else nn.ReLU()


_4C3F = Architecture(((32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 4, 2, 1)), (512, 512))
_6C2F = Architecture(((32, 3, 1, 1), (32, 3, 1, 1), (32, 4, 2, 1), (64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 1)), (512,))
_6C2F_THRESHOLDS = ((0.1, -0.1), (0.1, -0.15), (0.15, -0.15), (0.15, -0.15), (0.2, -0.2), (0.3, -0.3), (1.2, -1.2))
_8C2F = Architecture(
    (
        *((64, 3, 1, 1), (64, 3, 1, 1), (64, 4, 2, 0)),
        *((128, 3, 1, 1), (128, 3, 1, 1), (128, 4, 2, 0)),
        *((256, 3, 1, 1), (256, 4, 2, 0)),
    ),
    (256,),
)
_8C2F_THRESHOLDS = tuple((start, -start) for start in (0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6))
_ARCHITECTURES = {
    "mnist": {
        "relux": _4C3F,
        "standrelu": replace(_4C3F, activation="relu"),
        "c4f3_clmaxmin": replace(_4C3F, activation="clmaxmin", thresholds=((1.0, -1.0),) * 6),
        "c4f3_maxmin": replace(_4C3F, activation="maxmin"),
    },
    "cifar10": {
        "relux": _4C3F,
        "c6f2_relux": _6C2F,
        "c6f2_clmaxmin": replace(_6C2F, activation="clmaxmin", thresholds=_6C2F_THRESHOLDS),
        "c6f2_maxmin": replace(_6C2F, activation="maxmin"),
        "standrelu": replace(_6C2F, activation="relu"),
    },
    "tinyimagenet": {
        "tinyimagenet_relux": _8C2F,
        "tiny_clmaxmin": replace(_8C2F, activation="clmaxmin", thresholds=_8C2F_THRESHOLDS),
    },
}
MODELS = {data: _ARCHITECTURES[record.recipe] for data, record in DATA_SETS.items()}


def select_model(
    data: str,
    model: str,
    init: float = 1.0,
    width: float = 1.0,
    classes: int | None = None,
    orthogonal: bool = False,
) -> nn.Sequential:
    """The network of a published name for a data set, freshly initialised, on the CPU.

    Convolution weights are drawn from N(0, 2 / (kh kw c_out)) with zero bias; dense layers keep PyTorch's default.

    Args:
        data: `mnist`, `digits`, `cifar10` or `tinyimagenet`.
        model: `relux` (4C3F with clipped ReLU) or `standrelu` (plain ReLU, 4C3F or for CIFAR-10 6C2F); for MNIST also
            `c4f3_clmaxmin` (4C3F with clipped MaxMin, thresholds at +-1), which is no published one, and `c4f3_maxmin`;
            for CIFAR-10 also `c6f2_relux` (6C2F with clipped ReLU), `c6f2_clmaxmin` (6C2F with clipped MaxMin) and
            `c6f2_maxmin`; for Tiny ImageNet `tinyimagenet_relux` and `tiny_clmaxmin` (8C2F with either). Those with
            `maxmin` clip nothing.
        init: start value of the thresholds of clipped ReLU; those of clipped MaxMin are the published ones.
        width: fraction of the published number of channels and hidden units.
        classes: number of logits; default: the data set's.
        orthogonal: draw the hidden layers' weights orthogonal instead, the kernels of a convolution as a matrix, with
            spectral norms of about 1.

    Raises:
        InputError: for a name that does not exist or a width that leaves no channels.
    """
    if data not in MODELS:
        raise InputError(f"unknown data '{data}'; choose from {', '.join(MODELS)}")
    if model not in MODELS[data]:
        raise InputError(f"unknown model '{model}' for {data}; choose from {', '.join(MODELS[data])}")
    if not 0 < width <= 16:
        raise InputError(f"--width must lie in (0, 16], got {width}")
    architecture = MODELS[data][model]
    even = 2 if architecture.activation in ("clmaxmin", "maxmin") else 1

    def scaled(units: int) -> int:
        return max(1, round(units * width / even)) * even

    channels, *size = DATA_SETS[data].shape
    layers: list[nn.Module] = []
    for number, (out_channels, kernel, stride, padding) in enumerate(architecture.convolutions):
        out_channels = scaled(out_channels)
        conv = _convolution(channels, out_channels, kernel, stride, padding, orthogonal)
        channels = out_channels
        size = [(s + 2 * padding - kernel) // stride + 1 for s in size]
        layers += [conv, architecture.make_activation(number, (channels, *size), init)]
    layers.append(nn.Flatten())
    features = channels * math.prod(size)
    for number, units in enumerate(architecture.hidden, start=len(architecture.convolutions)):
        units = scaled(units)
        dense = nn.Linear(features, units)
        if orthogonal:
            nn.init.orthogonal_(dense.weight)
        layers += [dense, architecture.make_activation(number, (units,), init)]
        features = units
    layers.append(nn.Linear(features, classes or DATA_SETS[data].classes))
    return nn.Sequential(*layers)


def _convolution(
    channels: int, out_channels: int, kernel: int, stride: int, padding: int, orthogonal: bool
) -> nn.Conv2d:
    """A freshly initialised convolution, see `select_model`."""
    conv = nn.Conv2d(channels, out_channels, kernel, stride, padding)
    if orthogonal:
        # The taps that an output sees add up to at most kernel / stride times the norm of the kernels as a matrix.
        nn.init.orthogonal_(conv.weight, gain=stride / kernel)
    else:
        nn.init.normal_(conv.weight, 0.0, math.sqrt(2.0 / (kernel * kernel * out_channels)))
    nn.init.zeros_(conv.bias)
    return conv


# --- flags -----------------------------------------------------------------------------------------------------------


def add_common_flags(parser: argparse.ArgumentParser, data_sets: Sequence[str]) -> None:
    """The flags that training and evaluation share."""
    models = sorted({model for data in data_sets for model in MODELS[data]})
    parser.add_argument("--data", choices=data_sets, default=data_sets[0], help="data set")
    below = "folder of the data sets; absent ones are downloaded there"
    parser.add_argument("--data_dir", type=path, default="data", help=below)
    parser.add_argument("--model", choices=models, default="relux", help="network, see docs/training.md")
    parser.add_argument("--width", type=positive_float, default=1.0, help="fraction of the published channel numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--seed", type=seed, default=2019, help="of every random number")
    parser.add_argument("--test_batch_size", type=positive_int, default=256, help="images per evaluated batch")


def data_sets(recipe: str) -> list[str]:
    """The data sets that take a published one's networks and training script, that one first."""
    return [data for data, record in DATA_SETS.items() if record.recipe == recipe]


def radius_text(epsilon: float) -> str:
    """A radius as papers write it: in 255ths, the steps of a pixel, where it is a whole number of them below 1."""
    steps = 255 * epsilon
    return f"{steps:.0f}/255" if 0 < epsilon < 1 and abs(steps - round(steps)) < 1e-9 else f"{epsilon:g}"


def run_arguments(run: Run) -> argparse.Namespace:
    """The arguments that the training of a run has."""
    return training_arguments("", data_sets(run.data), run.recipe.defaults, run.training())


def training_arguments(
    description: str, data_sets: Sequence[str], defaults: Mapping[str, Any], command_line: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line of a training script. The scripts differ in their data sets and defaults only.

    command_line: the flags; None: those of this process.

    Exits with code 2 and one line on a wrong flag.

    Raises:
        InputError: if the schedule does not fit together.
    """
    parser = ArgumentParser(description)
    add_common_flags(parser, data_sets)
    add_training_flags(parser)
    parser.set_defaults(**defaults)
    return _settled(parser.parse_args(command_line), defaults)


def _settled(args: argparse.Namespace, defaults: Mapping[str, Any]) -> argparse.Namespace:
    """The arguments with what depends on others filled in, and scaled."""
    if args.resume and args.overwrite:
        raise InputError("--resume and --overwrite exclude each other")
    args.prefix = args.prefix or f"{args.data}_{args.model}"
    if args.epsilon is None:
        args.epsilon = DATA_SETS[args.data].epsilon
    if args.more is None:
        args.more = round(25 * args.epochs / defaults["epochs"])
    args.loss_weight = choose_weight(args.loss, args.loss_weight, args.epsilon_train)
    whole = args.epochs
    for name in ("epochs", "warmup", "rampup", "more", "global_epochs", "unaugmented_epochs"):
        setattr(args, name, round(getattr(args, name) * args.scale))
    args.lr_warmup *= args.scale
    if args.epochs < 1:
        raise InputError(f"--scale {args.scale:g} leaves none of {whole} epochs; give a larger one")
    if args.lr_warmup >= args.epochs:
        raise InputError(f"--lr_warmup {args.lr_warmup:g} leaves none of {args.epochs} epochs; lower it")
    if args.epochs < args.warmup + args.rampup:
        raise InputError(
            f"--epochs {args.epochs} is less than warm-up and ramp-up ({args.warmup} + {args.rampup}); "
            f"lower --warmup and --rampup too, or shorten all with --scale"
        )
    return args


# --- training --------------------------------------------------------------------------------------------------------


def train(args: argparse.Namespace) -> None:
    """What a training script does with its arguments: data, network, training, in one process or several.

    Raises:
        ScriptError: see `locallip.training.run.train`; InputError too if there is no such network, device or data.
    """
    with distributed.process_group(args.device):
        device = distributed.select_device(args.device)
        torch.manual_seed(args.seed)
        classes = count_classes(args.data, args.data_dir)
        model = select_model(args.data, args.model, args.init, args.width, classes, args.orthogonal)
        # On a CPU a 3x3 convolution of 32 channels takes half the time in this order.
        model = model.to(device, memory_format=torch.channels_last)
        with distributed.one_per_machine_first():
            training_set = load_data(args.data, args.data_dir, train=True)
            if args.val_split:
                training_set, validation_set = hold_out(training_set, args.val_split, args.seed)
            else:
                validation_set = load_data(args.data, args.data_dir, train=False)
        parts = (distributed.shard(images).to(device) for images in (training_set, validation_set))
        training_run.train(model, *parts, args, _augmentation(args))


def _augmentation(args: argparse.Namespace) -> Augmentation | None:
    if args.no_augmentation or not DATA_SETS[args.data].augmented:
        return None
    return partial(crop_and_flip, padding=args.crop_padding)
