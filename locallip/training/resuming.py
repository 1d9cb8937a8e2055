"""Whether a run that is resumed is the one that was stopped: its flags and processes, against the checkpoint's."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from locallip import distributed
from locallip.files import InputError

# Flags that a resumed run may have otherwise than before.
_MAY_DIFFER = {"device", "ddp", "compile", "cuda_graph", "data_dir", "output_dir", "prefix", "resume", "overwrite"}
_MAY_DIFFER |= {"test_batch_size", "keep_vectors"}
# Flags that weights belong to, so that a run with other ones cannot start from them.
_OF_THE_NETWORK = {"data", "model", "width"}
# What every run had from before there was a flag for it.
_BEFORE = {"lr_warmup": 0.0, "epsilon_schedule": "linear", "loss_weight": None, "ema": None, "ascend": False}
_BEFORE |= {"unaugmented_epochs": 0, "crop_padding": 4, "optimizer": "adam"}


def refuse_other_arguments(args: argparse.Namespace, saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Refuse to go on with other flags; `args` takes over start_from, which need not be given again.

    saved: the arguments that the checkpoint has.

    Raises:
        InputError: names a flag that is not as it was.
    """
    saved = _BEFORE | {"loss": "gloro" if saved.get("gloro") else "bcp"} | dict(saved)
    args.start_from = args.start_from or saved.get("start_from")
    for name, value in vars(args).items():
        if name not in _MAY_DIFFER and name in saved and saved[name] != value:
            with_weights = "" if name in _OF_THE_NETWORK else f", with --start_from {checkpoint}"
            raise InputError(
                f"cannot resume {checkpoint}: it ran with --{name} {saved[name]}, not {value}; resume "
                f"with the same flags, or begin a new run: another --prefix{with_weights}"
            )


def own_shuffle(shuffles: Tensor) -> Tensor:
    """The state of this process's shuffling. shuffles: that of every process, a row each.

    Raises:
        ValueError: if there are more or fewer processes than before.
    """
    shuffles = torch.atleast_2d(shuffles)
    if len(shuffles) != distributed.processes():
        raise ValueError(f"it ran in {len(shuffles)} processes, not {distributed.processes()}")
    return shuffles[distributed.rank()].clone()  # a generator takes no view of a part of a tensor
