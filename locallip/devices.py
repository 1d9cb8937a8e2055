"""The device of a process, and the memory of its machine."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from locallip.files import InputError


def select_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:N` as a device that exists; full float32 precision on CUDA (no TF32).

    A CUDA device with a number becomes the current one.

    Raises:
        InputError: if the device does not exist on this machine.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"unknown device '{name}'; choose auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device '{name}' is not supported; choose auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device '{name}' does not exist here: {torch.cuda.device_count()} CUDA devices found")
    if device.index is not None and device.type == "cuda":
        torch.cuda.set_device(device)  # streams and graphs are made on the current one
    return device


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Let GPUs round the factors of matrix products to TF32 meanwhile, or not. Convolutions stay as they are."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = allowed
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def hardware(device: torch.device) -> str:
    """What a device is, in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"CPU, {threads} thread{'s' if threads > 1 else ''} ({platform.machine()})"


def available_memory() -> int | None:
    """Bytes of host memory that can still be had, by the kernel and by the container's limit; None if unknown."""
    found = []
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found.append(1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:"))))
    with contextlib.suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(counts.get("inactive_file", 0)))  # of files, given up when it is needed
    return min(found, default=None)
