"""Which of several processes of a run this one is, as the environment that its launcher set says.

    torchrun, hand-written loops   RANK and WORLD_SIZE; also LOCAL_RANK, LOCAL_WORLD_SIZE
    mpirun                         OMPI_COMM_WORLD_RANK and _SIZE (Open MPI), PMI_RANK and PMI_SIZE (MPICH, Intel MPI)
    srun                           SLURM_PROCID and SLURM_STEP_NUM_TASKS

The order matters: mpirun starts its helpers by srun, and either may start a torchrun on every machine. SLURM_NTASKS
says nothing: the shell of an allocation (sbatch, salloc) has it too, and what is started there without srun is one
process. WORLD_SIZE=1 makes a process of any launcher a run of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

_RANK_AND_SIZE = (
    ("RANK", "WORLD_SIZE"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PMI_RANK", "PMI_SIZE"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
)
_WAY_OUT = "set RANK and WORLD_SIZE for each, or WORLD_SIZE=1 for a run of one process"


@dataclass(frozen=True)
class Launch:
    """The place of a process among those of its run; by default it is the only one.

    Attributes:
        rank: number of this process, from 0.
        processes: how many there are.
        local_rank, processes_here: the same among those on this machine; None where the environment does not say.
    """

    rank: int = 0
    processes: int = 1
    local_rank: int | None = 0
    processes_here: int | None = 1


def read(environment: Mapping[str, str] | None = None) -> Launch:
    """Return the place of this process in its run. environment: None: that of this process.

    Raises:
        ValueError: if it speaks of several processes that cannot be joined; the text says what to set.
    """
    environment = os.environ if environment is None else environment
    own, *others = ([_number(environment, name) for name in names] for names in _RANK_AND_SIZE)
    launcher = next((place for place in others if (place[1] or 0) > 1), [None, None])
    rank, processes = (theirs if ours is None else ours for ours, theirs in zip(own, launcher))
    if own[1] == 1 or rank is processes is None:
        return Launch()
    if rank is None or processes is None:
        raise ValueError(f"the environment names a rank or a number of processes, but not both; {_WAY_OUT}")
    if None in own and launcher not in ([rank, processes], [None, None]):
        raise ValueError(
            f"RANK or WORLD_SIZE makes this process {rank} of {processes}, its launcher "
            f"{launcher[0]} of {launcher[1]}; {_WAY_OUT}"
        )
    if not 0 <= rank < processes:
        raise ValueError(f"there is no process {rank} of {processes}, they count from 0; {_WAY_OUT}")
    _refuse_no_meeting_place(environment, processes)
    return Launch(rank, processes, *_place_here(environment, processes))


def rank_of_several() -> int | None:
    """Return the rank of this process; None if it is the only one or its place cannot be made out."""
    try:
        launch = read()
    except ValueError:
        return None
    return launch.rank if launch.processes > 1 else None


def _number(environment: Mapping[str, str], name: str) -> int | None:
    text = environment.get(name, "")
    try:
        return int(text) if text else None
    except ValueError:
        raise ValueError(f"the environment's {name} is no whole number: '{text[:80]}'") from None


def _refuse_no_meeting_place(environment: Mapping[str, str], processes: int) -> None:
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not environment.get(name)]
    if missing:
        raise ValueError(
            f"{processes} processes do not know where to meet: set {' and '.join(missing)} for all (the machine of "
            f"process 0, a free port there), start them by torchrun, or set WORLD_SIZE=1 for runs of one process each"
        )
    port = _number(environment, "MASTER_PORT")
    if not 0 < port < 2**16:
        raise ValueError(f"the environment's MASTER_PORT is no port from 1 to 65535: {port}")


def _place_here(environment: Mapping[str, str], processes: int) -> tuple[int | None, int | None]:
    local_rank, here = (_number(environment, name) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if not 0 <= (local_rank or 0) < (here or processes) <= processes:
        raise ValueError(
            f"LOCAL_RANK {local_rank} and LOCAL_WORLD_SIZE {here} do not fit a run of {processes} processes; "
            f"without them both are found out"
        )
    return local_rank, here
