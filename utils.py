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
from locallip.flags import (
    ArgumentParser,
    natural_float,
    natural_int,
    path,
    positions,
    positive_float,
    positive_int,
    probability,
    scale,
    seed,
)
from locallip.images import Augmentation, crop_and_flip, hold_out
from locallip.training import run as training_run
from locallip.training.losses import LOSSES, choose_weight
from locallip.training.optimizers import OPTIMIZERS
from locallip.training.schedule import LOG_START, RADII, RATES
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
    for title, add_flags in _TRAINING_FLAGS.items():
        add_flags(parser.add_argument_group(title))
    parser.set_defaults(**defaults)
    return _settled(parser.parse_args(command_line), defaults)


def _file_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--prefix", type=path, help="names the run's files, below --output_dir; default: DATA_MODEL")
    flag("--output_dir", type=path, default="runs", help="folder of checkpoints and logs")
    flag("--resume", action="store_true", help="go on from the run's last checkpoint")
    flag("--overwrite", action="store_true", help="start afresh even if the prefix has a run already")
    keep = "write every image's singular vectors too, whose size a start prints, so that a resumed run loses nothing"
    flag("--keep_vectors", action="store_true", help=keep)
    start_from = "begin with the weights of this file, or of the run with this prefix; all else is a new run's"
    flag("--start_from", type=path, metavar="CHECKPOINT", help=start_from)


def _schedule_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--epochs", type=positive_int, help="length of the training")
    flag("--scale", type=scale, default=1.0, help="shorten (or stretch) the whole schedule, whatever is in epochs")
    flag("--warmup", type=natural_int, help="epochs at epsilon 0, with the clean loss only")
    flag("--rampup", type=natural_int, help="epochs in which epsilon rises and kappa falls, after the warm-up")
    flag("--epsilon_train", type=natural_float, help="L2 radius at the end of the ramp-up")
    ramp = f"how the radius rises: linearly from 0, or from {LOG_START} on a logarithmic scale"
    flag("--epsilon_schedule", choices=list(RADII), default="linear", help=ramp)
    rate = "learning rate; of muon in parts of a layer's start weights, so that 0.01 is a usual one"
    flag("--lr", type=positive_float, help=rate)
    flag("--end_lr", type=positive_float, help="learning rate of the last epoch")
    shape = "constant, then exponential to end_lr; constant; or, step by step, linear or half a cosine to end_lr"
    flag("--lr_scheduler", choices=list(RATES), default="exp", help=shape)
    rise = "epochs, with fractions, in which the learning rate rises linearly from 0 before its decay"
    flag("--lr_warmup", type=natural_float, default=0.0, help=rise)
    more = "epochs of constant learning rate beyond half of all; default: 25 of the published number, in proportion"
    flag("--more", type=natural_int, help=more)
    alone = "first so many epochs with the ball alone: no box, global norms, a fraction of the time (GloRo's bound)"
    flag("--global_epochs", type=natural_int, default=0, help=alone)
    flag("--no_augmentation", action="store_true", help="no random crops and flips (digits never have any)")
    border = "random crops shift an image by up to so many pixels; 0: flips alone"
    flag("--crop_padding", type=natural_int, default=4, help=border)
    last = "last so many epochs without random crops and flips"
    flag("--unaugmented_epochs", type=natural_int, default=0, help=last)


def _loss_flags(group: argparse._ArgumentGroup) -> None:
    flag, losses = group.add_argument, group.add_mutually_exclusive_group()
    names = "what is minimised; docs/training.md has the formulas and their sources"
    losses.add_argument("--loss", choices=list(LOSSES), default="bcp", help=names)
    losses.add_argument("--gloro", dest="loss", action="store_const", const="gloro", help="short for --loss gloro")
    weights = ", ".join(f"{loss.weight:g} for {name}" for name, loss in LOSSES.items() if loss.weight is not None)
    weight = f"of the loss's second term, the slack of cll; default: {weights}"
    flag("--loss_weight", type=positive_float, help=weight)
    flag("--opt_iter", type=positive_int, default=1, help="rounds of pinning for the worst-case logits")
    flag("--sparse", type=natural_float, default=0.0, help="weight of the sparsity loss")
    flag("--sp_thres", type=natural_float, default=0.1, help="its weight for what may be clipped from above")


def _norm_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--sniter", type=positive_int, help="power iterations per training step")
    ascends = "norms of the training by steepest ascent in place of power iteration: as many products, less lag"
    flag("--ascend", action="store_true", help=ascends)
    indices = "positions of the layers that train with local norms, e.g. 0,6,12; the others have global ones"
    flag("--indices", type=positions, help=f"{indices}; default: all are local")


def _step_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    flag("--init", type=natural_float, help="start value of the thresholds of clipped ReLU")
    orthogonal = "start hidden layers with orthogonal weights of spectral norm about 1, not with the published ones"
    flag("--orthogonal", action="store_true", help=orthogonal)
    moves = "adam, the published one, or muon, whose steps are as long in every direction of a layer"
    flag("--optimizer", choices=list(OPTIMIZERS), default="adam", help=moves)
    average = "decay of a moving average of the weights, which is validated beside them; the better of both is kept"
    flag("--ema", type=probability, help=f"{average}; default: none")
    flag("--batch_size", type=positive_int, default=256, help="images per step and process")
    compiles = (
        "compile element-wise work, which takes up to a minute and a C++ compiler; auto: if the run is long enough"
    )
    flag("--compile", choices=["auto", "yes", "no"], default="auto", help=compiles)
    records = "on one GPU, replay the step as a CUDA graph, in place of launching its many kernels one by one"
    flag("--cuda_graph", choices=["yes", "no"], default="no", help=records)
    rounds = "convolutions of the training in bfloat16, where the device has fast ones; validation stays in float32"
    flag("--bfloat16", action="store_true", help=rounds)
    ddp = (
        "averages the gradients of several processes: PyTorch's DistributedDataParallel (auto, torch) or NVIDIA apex's"
    )
    flag("--ddp", choices=["auto", "torch", "apex"], default="auto", help=ddp)


def _validation_flags(group: argparse._ArgumentGroup) -> None:
    flag = group.add_argument
    val_split = "training images held out to pick the best epoch on; 0: the test set picks, as in the paper"
    flag("--val_split", type=natural_int, default=0, help=val_split)
    epsilon = "L2 radius of validation, in pixel space (pixels in [0, 1]); default: the paper's for the data set"
    flag("--epsilon", type=natural_float, help=epsilon)
    flag("--test_sniter", type=positive_int, default=20, help="power iterations per validated batch")
    flag("--test_opt_iter", type=positive_int, default=1000, help="rounds of pinning in validation")


_TRAINING_FLAGS = {
    "files": _file_flags,
    "schedule": _schedule_flags,
    "loss": _loss_flags,
    "norms": _norm_flags,
    "network and step": _step_flags,
    "validation, after every epoch": _validation_flags,
}


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
