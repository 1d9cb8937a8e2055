"""Several processes that make one run, as torchrun starts them: each has its own part of the images and its own GPU.

    torchrun --standalone --nproc_per_node=4 train_cifar10.py ...

A script that is started without torchrun is one process; everything here then answers for that one and talks to
nobody. Nothing depends on how many machines the processes are spread over.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

import utils
from data_load import ImageSet
from utils import InputError, ScriptError, first_line

T = TypeVar("T")

NO_APEX = (
    "--ddp apex needs NVIDIA apex with parallel.DistributedDataParallel, whose last tag is 25.05, and it is not "
    "installed here (the package of that name on PyPI is another one); --ddp torch does the same"
)
# Processes may be far apart in their work, as on images that are harder to certify. A process that died is noticed
# otherwise: by torchrun, and by the connection to it.
_PATIENCE = timedelta(days=1)
# torchrun ends the others as soon as it finds one dead, and its report begins with the one that it found first.
_SECONDS_FOR_TORCHRUN = 5


class ConnectionLost(ScriptError):
    """Another process of the run is gone."""


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Connect the processes that torchrun has started, for as long as the context lasts; nothing to do for one process.

    device: as for `select_device`; GPUs talk by NCCL, CPUs by gloo.

    Raises:
        ConnectionLost: if another process of the run died.
    """
    if not utils.is_launched():
        yield
        return
    on_gpu = select_device(device).type == "cuda"
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=_PATIENCE)
        yield
    except RuntimeError as error:
        if not _is_of_the_connection(error):
            raise
        time.sleep(_SECONDS_FOR_TORCHRUN)
        raise ConnectionLost(f"lost the connection to another process: {first_line(error)}") from None
    # After an error the others may never come to take part in this.
    dist.destroy_process_group()


def _is_of_the_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def select_device(name: str) -> torch.device:
    """The device of this process: as `utils.select_device`, but each process of a machine gets a GPU of its own.

    Raises:
        InputError: if there are fewer GPUs than processes, or one GPU is named for all.
    """
    device = utils.select_device(name)
    if device.type != "cuda" or not utils.is_launched():
        return device
    if device.index is not None:
        raise InputError(f"--device {name} is one GPU for all processes; --device cuda gives each its own")
    if processes_here() > torch.cuda.device_count():
        raise InputError(
            f"{processes_here()} processes have {torch.cuda.device_count()} GPUs here; lower --nproc_per_node, or "
            f"choose --device cpu"
        )
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    return device


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def processes_here() -> int:
    """Number of processes of the run on this machine."""
    return int(os.environ["LOCAL_WORLD_SIZE"]) if utils.is_launched() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def say(text: str) -> None:
    """Print a line, once for the whole run."""
    if is_main():
        tqdm.write(text)


@contextmanager
def one_per_machine_first() -> Iterator[None]:
    """One process of every machine goes through the context before the others, as when files are fetched in it."""
    first = not dist.is_initialized() or os.environ["LOCAL_RANK"] == "0"
    if not first:
        dist.barrier()
    yield
    if dist.is_initialized() and first:
        dist.barrier()


# --- exchange between the processes ----------------------------------------------------------------------------------


def total(values: Tensor) -> Tensor:
    """The sum over all processes, entry by entry, in every process."""
    return _reduced(values, dist.ReduceOp.SUM)


def smallest(values: Tensor) -> Tensor:
    """The minimum over all processes, entry by entry, in every process."""
    return _reduced(values, dist.ReduceOp.MIN)


def _reduced(values: Tensor, operation: dist.ReduceOp) -> Tensor:
    values = values.clone()
    if dist.is_initialized():
        dist.all_reduce(values, operation)
    return values


def gather(value: T) -> list[T]:
    """The values of all processes by rank, in every process."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * processes()
    dist.all_gather_object(values, value)
    return values


def share(value: T) -> T:
    """The main process's value, in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


# --- parts of the images ---------------------------------------------------------------------------------------------


def shard(images: ImageSet) -> ImageSet:
    """This process's fixed part of a set: every image is in one part, and their sizes differ by one at most."""
    return images[rank() :: processes()]


def places(images: int) -> list[np.ndarray]:
    """Where the images of each process's part stand in a set of so many images."""
    return [np.arange(images)[number :: processes()] for number in range(processes())]


# --- gradients -------------------------------------------------------------------------------------------------------


def wrap(module: nn.Module, engine: str) -> nn.Module:
    """The module, such that backward leaves the mean over all processes in the gradients of its parameters.

    The parameters start as the main process's. Only what `forward` computes takes part.

    engine: `torch`, PyTorch's DistributedDataParallel; `apex`, NVIDIA's; or `auto`, PyTorch's.

    Raises:
        InputError: if apex is asked for and cannot be had.
    """
    if engine == "apex":
        return _apex()(module)
    if processes() == 1:
        return module
    device = next(module.parameters()).device
    return nn.parallel.DistributedDataParallel(module, device_ids=[device] if device.type == "cuda" else None)


def _apex() -> type[nn.Module]:
    try:
        from apex.parallel import DistributedDataParallel
    except Exception:  # the unrelated package of that name fails in ways of its own
        raise InputError(NO_APEX) from None
    if not dist.is_initialized() or not torch.cuda.is_available():
        raise InputError("--ddp apex works with several processes on GPUs only")
    return DistributedDataParallel
