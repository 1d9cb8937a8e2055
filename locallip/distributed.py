"""Several processes that make one run: each has its own part of the images and its own GPU.

    torchrun --standalone --nproc_per_node=4 train_cifar10.py ...

mpirun, srun and hand-written loops do as well (see `launch`), where they also say at which MASTER_ADDR and MASTER_PORT
the processes meet. A script that is started alone is one process; everything here then answers for that one and talks
to nobody. Nothing depends on how many machines the processes are spread over.
"""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

# Imported later, as by torch._dynamo, its default arguments would hold the group that stands then, and gloo's threads
# would live into the interpreter's end, which can abort then.
import torch.distributed.nn
from torch import Tensor
from tqdm import tqdm

from locallip import devices, launch
from locallip.files import InputError, ScriptError, first_line
from locallip.images import ImageSet
from locallip.launch import Launch

T = TypeVar("T")

# For all processes to be started; somebody who forgot one should not wait for a day.
_MEETING = timedelta(minutes=10)
# Processes may be far apart in their work, as on images that are harder to certify. A process that died is noticed
# otherwise: by torchrun, and by the connection to it.
_PATIENCE = timedelta(days=1)
# torchrun ends the others as soon as it finds one dead, and its report begins with the one that it found first.
_SECONDS_FOR_TORCHRUN = 5

_met: Launch | None = None  # the place of this process, once it has met the others


class ConnectionLost(ScriptError):
    """Another process of the run is gone."""


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Connect the processes of a run for as long as the context lasts; nothing to do for one process.

    device: as for `select_device`; GPUs talk by NCCL, CPUs by gloo.

    Raises:
        InputError: if the environment speaks of several processes that cannot be joined, or they do not meet.
        ConnectionLost: if another process of the run died.
    """
    if _place().processes == 1:
        yield
        return
    try:
        _join(device)
        yield
    except RuntimeError as error:
        if not _is_of_the_connection(error):
            raise
        time.sleep(_SECONDS_FOR_TORCHRUN)
        raise ConnectionLost(f"lost the connection to another process: {first_line(error)}") from None
    # After an error the others may never come to take part in this.
    _leave()


def _join(device: str) -> None:
    global _met
    place = _place()
    try:
        store, *_ = next(dist.rendezvous("env://", place.rank, place.processes, timeout=_MEETING))
        _met = _find_place_here(place, store)
    except RuntimeError as error:
        raise InputError(
            f"process {place.rank} did not meet the {place.processes - 1} others at {os.environ['MASTER_ADDR']}:"
            f"{os.environ['MASTER_PORT']} ({first_line(error)}); start each once, with the same address and a free port"
        ) from None
    on_gpu = select_device(device).type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    group = dist.PrefixStore("default_pg", store)
    dist.init_process_group(backend, store=group, rank=place.rank, world_size=place.processes, timeout=_PATIENCE)
    store.set_timeout(_PATIENCE)
    if on_gpu:
        _refuse_shared_gpus()


def _leave() -> None:
    global _met
    dist.destroy_process_group()
    gc.collect()  # cycles may still hold the group, and with it its threads
    _met = None


def _is_of_the_connection(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)


def refuse_several() -> None:
    """Refuse to be one of several processes, in a script that is a run of one.

    Raises:
        InputError: if the environment speaks of several.
    """
    place = _place()
    if place.processes > 1:
        raise InputError(
            f"this is process {place.rank} of {place.processes}, and the script works in one; start it once, without "
            f"torchrun, mpirun or srun, or set WORLD_SIZE=1"
        )


def _place() -> Launch:
    """The place of this process in its run, as found when the processes met, or as the environment says it."""
    if _met is not None:
        return _met
    try:
        return launch.read()
    except ValueError as error:
        raise InputError(str(error)) from None


def _find_place_here(place: Launch, store: dist.Store) -> Launch:
    """The place with what the environment does not say: which processes are on this machine."""
    store = dist.PrefixStore("machines", store)
    if store.add(f"processes {place.rank}", 1) > 1:
        raise InputError(f"two processes are number {place.rank} of {place.processes}; RANK must differ")
    store.set(f"machine {place.rank}", socket.gethostname())
    if place.local_rank is not None and place.processes_here is not None:
        return place
    machines = [store.get(f"machine {number}") for number in range(place.processes)]
    here = [number for number, machine in enumerate(machines) if machine == machines[place.rank]]
    local_rank = here.index(place.rank) if place.local_rank is None else place.local_rank
    return replace(place, local_rank=local_rank, processes_here=len(here))


def select_device(name: str) -> torch.device:
    """The device of this process: as `devices.select_device`, but each process of a machine gets a GPU of its own.

    Raises:
        InputError: if there are fewer GPUs than processes, or one GPU is named for all.
    """
    device, place = devices.select_device(name), _place()
    if device.type != "cuda" or place.processes == 1:
        return device
    if device.index is not None:
        raise InputError(f"--device {name} is one GPU for all processes; --device cuda gives each its own")
    gpus = torch.cuda.device_count()
    if 1 < gpus < place.processes_here:
        raise InputError(
            f"{place.processes_here} processes have {gpus} GPUs here; start fewer (--nproc_per_node of torchrun), or "
            f"choose --device cpu"
        )
    # Launchers such as srun show every process a GPU of its own only.
    device = torch.device("cuda", 0 if gpus == 1 else place.local_rank)
    torch.cuda.set_device(device)
    return device


def _refuse_shared_gpus() -> None:
    own = str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid)
    sharing = gather(own).count(own)
    if sharing > 1:
        raise InputError(
            f"{sharing} processes have one GPU between them; start fewer (--nproc_per_node of torchrun), or choose "
            f"--device cpu"
        )


def rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """Number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


def processes_here() -> int:
    """Number of processes of the run on this machine."""
    return _place().processes_here if dist.is_initialized() else 1


def is_main() -> bool:
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def say(text: str) -> None:
    """Print a line, once for the whole run."""
    if is_main():
        tqdm.write(text)


@contextmanager
def all_or_none() -> Iterator[None]:
    """If one process leaves the context with a ScriptError, all do, so that none waits for one that is gone.

    No values may be exchanged within. With one process, or without errors, it changes nothing.
    """
    problem = None
    try:
        yield
    except ScriptError as error:
        problem = error
    _raise_everywhere(problem)


@contextmanager
def one_per_machine_first() -> Iterator[None]:
    """One process of every machine goes through the context before the others, as when files are fetched in it.

    A ScriptError in one process is raised in all, as by `all_or_none`.
    """
    is_first = not dist.is_initialized() or _place().local_rank == 0
    if not is_first:
        _raise_everywhere(None)
    with all_or_none():
        yield
    if is_first:
        _raise_everywhere(None)


def _raise_everywhere(problem: ScriptError | None) -> None:
    problems = gather(problem)
    if problem is not None:
        raise problem
    for number, other in enumerate(problems):
        if other is not None:
            raise type(other)(f"process {number}: {other}")


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
