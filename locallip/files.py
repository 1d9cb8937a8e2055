"""How scripts end, and files: found, written whole or not at all, refused in one line."""

from __future__ import annotations

import contextlib
import csv
import ctypes
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

from locallip import launch

_SECONDS_FOR_RANK_0 = 5


class ScriptError(Exception):
    """Ends a script with one line on stderr and this exit code."""

    exit_code = 1


class InputError(ScriptError):
    """Something the user gave cannot be used."""

    exit_code = 2


def run_script(main: Callable[[], None]) -> NoReturn:
    """Run a script's `main`: exit code 2 and one line for bad input, 130 for Ctrl-C."""
    keep_freed_memory()
    try:
        main()
    except ScriptError as error:
        fail(str(error), error.exit_code)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        fail("out of memory; lower --batch_size or --test_batch_size", 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        _end(130)
    sys.exit(0)


def _is_out_of_memory(error: Exception) -> bool:
    # On a CPU, PyTorch has no type of its own for it.
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def keep_freed_memory() -> None:
    """Have glibc keep freed memory for the next tensor; without effect where there is no glibc.

    By default every tensor of more than 32 MB is handed back to the system when freed, and the page faults of the next
    one cost several times what arithmetic on it does.
    """
    trim_threshold, mmap_max = -1, -4  # names of malloc.h
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_max, 0)
        mallopt(trim_threshold, 2**31 - 1)


def fail(message: str, exit_code: int) -> NoReturn:
    """End the script with one line, which of several processes says which one it is from."""
    rank = launch.rank_of_several()
    if rank:
        # What fails in all processes alike, such as a wrong flag, is said once: torchrun ends them meanwhile.
        time.sleep(_SECONDS_FOR_RANK_0)
    where = "" if rank is None else f"rank {rank}: "
    print(f"error: {where}{message}", file=sys.stderr)
    _end(exit_code)


def _end(exit_code: int) -> NoReturn:
    """End the script; a connection to other processes that still stands is left to the system.

    Its threads may find the others gone while the interpreter shuts down, and abort the process then (exit code -6).
    """
    if not (dist.is_available() and dist.is_initialized()):
        sys.exit(exit_code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def expand_home(path: str | Path) -> str:
    """Put the home folder in for a leading `~` or `~user`, which a shell leaves alone in `--flag=~/folder`.

    Raises:
        InputError: if there is no such home.
    """
    expanded = os.path.expanduser(path)
    if expanded.startswith("~"):
        home = expanded.split(os.sep)[0]
        raise InputError(f"there is no home folder '{home}'; ./{home} would be a folder of that name here")
    return expanded


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: `path` is never half written.

    Raises:
        InputError: if the place cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()  # says why a file cannot be made, which torch.save does not always
        write(temporary)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise InputError(f"cannot write {path}: {first_line(error)}") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def first_line(error: Exception) -> str:
    """What an exception says, short enough for one line."""
    text = getattr(error, "strerror", None) or str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows, whole or not at all. columns: their keys; None: those of the first row."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]) if columns is None else columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, lambda temporary: temporary.write_text(text.getvalue(), encoding="utf-8"))


def exists(path: Path) -> bool:
    """Whether there is a file or folder of that name.

    Raises:
        InputError: if that cannot be found out.
    """
    try:
        return path.exists()
    except OSError as error:  # such as a name that is too long
        raise InputError(f"cannot look for {path}: {first_line(error)}") from None


def check_writable(folder: Path) -> None:
    """Create `folder` if need be and make sure that a file can be written there.

    Raises:
        InputError: if it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        why = "it is a file, not a folder" if folder.is_file() else first_line(error)
        raise InputError(f"cannot write into {folder}: {why}") from None
