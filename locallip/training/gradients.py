"""The mean of the gradients of several processes, by PyTorch or by NVIDIA apex."""

from __future__ import annotations

import torch
from torch import nn

from locallip import distributed
from locallip.files import InputError

NO_APEX = (
    "--ddp apex needs NVIDIA apex with parallel.DistributedDataParallel, whose last tag is 25.05, and it is not "
    "installed here (the package of that name on PyPI is another one); --ddp torch does the same"
)


def wrap(module: nn.Module, engine: str) -> nn.Module:
    """The module, such that backward leaves the mean over all processes in the gradients of its parameters.

    The parameters start as the main process's. Only what `forward` computes takes part.

    engine: `torch`, PyTorch's DistributedDataParallel; `apex`, NVIDIA's; or `auto`, PyTorch's.

    Raises:
        InputError: if apex is asked for and cannot be had.
    """
    if engine == "apex":
        return _apex()(module)
    if distributed.processes() == 1:
        return module
    device = next(module.parameters()).device
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def _apex() -> type[nn.Module]:
    try:
        from apex.parallel import DistributedDataParallel
    except Exception:  # the unrelated package of that name fails in ways of its own
        raise InputError(NO_APEX) from None
    if distributed.processes() == 1 or not torch.cuda.is_available():
        raise InputError("--ddp apex works with several processes on GPUs only")
    return DistributedDataParallel
