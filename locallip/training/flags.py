"""The flags of the training scripts, by what they are about."""

from __future__ import annotations

import argparse

from locallip.flags import (
    natural_float,
    natural_int,
    path,
    positions,
    positive_float,
    positive_int,
    probability,
    scale,
)
from locallip.training.losses import LOSSES
from locallip.training.optimizers import OPTIMIZERS
from locallip.training.schedule import LOG_START, RADII, RATES


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Add them, in groups; those that evaluations have too are `utils.add_common_flags`."""
    for title, add_flags in _GROUPS.items():
        add_flags(parser.add_argument_group(title))


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
    records = "replay the step as a CUDA graph, in place of launching its many kernels one by one; auto: on one GPU"
    flag("--cuda_graph", choices=["auto", "yes", "no"], default="auto", help=records)
    rounds = (
        "convolutions of the training in bfloat16, where the device has fast ones, on a GPU its other products in "
        "TF32; validation stays in float32"
    )
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


_GROUPS = {
    "files": _file_flags,
    "schedule": _schedule_flags,
    "loss": _loss_flags,
    "norms": _norm_flags,
    "network and step": _step_flags,
    "validation, after every epoch": _validation_flags,
}
