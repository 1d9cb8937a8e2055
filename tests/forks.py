"""Processes for tests that kill or connect some: copies of the one that tests, which have everything imported."""

import multiprocessing
import os
import re
import socket
import sys
import tempfile
import time

import torch
from conftest import Answer

from locallip.files import run_script

OF_LAUNCHERS = re.compile("RANK|LOCAL_|WORLD_SIZE|MASTER_|OMPI_|PMI_|SLURM_|TORCHELASTIC")


class Fork(multiprocessing.get_context("fork").Process):
    """A process that runs `main` as a script does, on these words as its command line; starts at once.

    environment: the whole of it, instead of this process's.
    What `main` replaces in modules stays in its own process.
    """

    def __init__(self, main, *words, environment=None):
        super().__init__(daemon=True)
        self.main, self.words, self.environment = main, words, environment
        self.printed = [tempfile.TemporaryFile("w+") for _ in range(2)]  # noqa: SIM115
        self.start()

    def run(self):
        torch.set_num_threads(1)  # those of OpenMP are not copied, and would be waited for
        if self.environment is not None:
            os.environ.clear()
            os.environ.update(self.environment)
        for number, file in enumerate(self.printed, start=1):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = self.printed
        sys.argv = ["script.py", *map(str, self.words)]
        run_script(self.main)

    def end(self, timeout=100):
        """Wait for its end, and return it; one that takes longer is killed."""
        self.join(timeout)
        self.kill()
        self.join()
        printed = []
        for file in self.printed:
            file.seek(0)
            printed.append(file.read())
            file.close()
        return Answer(self.exitcode, *printed)

    def kill_behind(self, event, seconds):
        """Kill it with -9 so many seconds behind the moment at which `event()` comes true, and return its end."""
        deadline = time.monotonic() + 60
        while self.is_alive() and not event():
            assert time.monotonic() < deadline
            time.sleep(0.002)
        time.sleep(seconds)
        return self.end(timeout=0)


def environment_with(**given):
    """This process's environment without any launcher's variables, and with these."""
    plain = {name: value for name, value in os.environ.items() if not OF_LAUNCHERS.match(name)}
    return plain | {"OMP_NUM_THREADS": "1"} | given


def meeting_place():
    """Where processes meet, as their environment says it: a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}


def environments_of(processes):
    """The environments of so many processes of one run, as a loop that starts them would set them."""
    place = meeting_place()
    return [environment_with(RANK=str(rank), WORLD_SIZE=str(processes), **place) for rank in range(processes)]


def run_at_once(environments, main, *words):
    """Run `main` in a process for each of these environments; how they ended."""
    started = [Fork(main, *words, environment=environment) for environment in environments]
    return [process.end() for process in started]
