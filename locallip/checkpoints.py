"""Checkpoint files: written whole, and read without running a line of what they hold (`weights_only=True`)."""

from __future__ import annotations

import contextlib
import copy
import difflib
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from locallip.files import InputError, exists, first_line, write_atomically

# Modules that torch.compile, DataParallel, DistributedDataParallel and FullyShardedDataParallel put around others.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module"}
_WAY_OUT = "where it was made, save the weights alone: torch.save({'state_dict': model.state_dict()}, FILE)"

# How files begin that are taken for checkpoints, and what they are.
_BEGINNINGS = (
    (b"version https://git-lfs", "a pointer of Git LFS; `git lfs pull` fetches the file itself"),
    (b"<", "a web page, perhaps instead of a download"),
    (b"\x1f\x8b", "compressed by gzip; unpack it first"),
    (b"\x89HDF", "an HDF5 file, as of Keras"),
    (b"\x93NUMPY", "an array of NumPy"),
)
# What weights may be, by whether the model's are in floating point.
_KINDS = {
    True: (torch.float64, torch.float32, torch.bfloat16, torch.float16),
    False: (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
}
_BEGINNING_OF_TORCH_SAVE = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # without zip, as until torch 1.5


def save_checkpoint(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Write a checkpoint under a temporary name, then rename it. Its tensors are saved as of the CPU.

    Raises:
        InputError: if the place cannot be written to.
    """
    content = _on_cpu(dict(checkpoint))
    write_atomically(path, lambda temporary: torch.save(content, temporary))


def _on_cpu(value: Any) -> Any:
    """The same with all tensors on the CPU, so that a plain torch.load of it needs no GPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        result = copy.copy(value)  # and what a state dict says of its modules
        result.update((key, _on_cpu(entry)) for key, entry in value.items())
        return result
    if isinstance(value, list | tuple):
        return type(value)(_on_cpu(entry) for entry in value)
    return value


def find_checkpoint(name: str) -> Path:
    """Return the file of that name, or the best checkpoint of the run with that prefix.

    Raises:
        InputError: if neither is there.
    """
    for path in (Path(name), Path(f"{name}_best.pth")):
        if exists(path) and path.is_file():
            return path
    raise InputError(f"no checkpoint: neither {name} nor {name}_best.pth is a file{_like(Path(name))}")


def _like(prefix: Path) -> str:
    """What somebody may have meant who named a folder, or mistyped a name."""
    with contextlib.suppress(OSError):
        folder = prefix if prefix.is_dir() else prefix.parent
        there = sorted(path.name.removesuffix("_best.pth") for path in folder.glob("*_best.pth"))
        meant = there if folder == prefix else difflib.get_close_matches(prefix.name, there)
        if meant:
            return f"; there is {', '.join(str(folder / name) for name in meant)}"
    return ""


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint as a dict with at least `state_dict`, on the CPU.

    Takes the published layout {'state_dict', 'err', 'epoch'}, a bare state dict, and one under another key if there is
    only one. Names of weights lose what torch.compile, DataParallel, DDP and FSDP add to them. Beside the weights there
    may be what torch.load takes by itself, numbers of NumPy and an argparse.Namespace.

    Raises:
        InputError: if the file is missing, damaged or no checkpoint; says what it is, where that can be told.
    """
    if not (exists(path) and path.is_file()):
        raise InputError(f"no checkpoint at {path}")
    beginning = _beginning(path)
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_SAFE):
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # The unpickler fails in many ways on foreign bytes, and its texts advise to load without protection.
        raise InputError(f"{path} {_say_what_it_is(path, beginning, str(error))}") from None
    checkpoint = _with_state_dict(content, path)
    _refuse_parts_of_tensors(checkpoint["state_dict"], path)
    checkpoint["state_dict"] = _without_wrappers(checkpoint["state_dict"], path)
    return checkpoint


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict into a model, all or nothing.

    Raises:
        InputError: if names or shapes belong to another architecture, or a weight is not finite.
    """
    expected = model.state_dict()
    for key in [*expected, *state]:
        if key not in state:
            longer = next((f", only '{name}'" for name in state if name.endswith(f".{key}")), "")
            raise InputError(f"{source} is of another architecture: it has no '{key}'{longer}")
        if key not in expected:
            raise InputError(f"{source} is of another architecture: '{key}' does not belong to the chosen model")
        if state[key].shape != expected[key].shape:
            ours, theirs = tuple(expected[key].shape), tuple(state[key].shape)
            raise InputError(f"{source} is of another architecture: '{key}' is {theirs}, the chosen model has {ours}")
        if state[key].dtype not in _KINDS[expected[key].is_floating_point()]:
            ours, theirs = expected[key].dtype, state[key].dtype
            raise InputError(f"{source} is unusable: '{key}' is {theirs}, the chosen model has {ours}; {_WAY_OUT}")
        if not torch.isfinite(state[key].to(expected[key].dtype)).all():
            raise InputError(f"{source} is unusable: '{key}' holds NaN or infinity")
    model.load_state_dict(state)


# --- what a file holds -----------------------------------------------------------------------------------------------


def _with_state_dict(content: Any, path: Path) -> dict[str, Any]:
    """The content of a file as a checkpoint with a `state_dict`."""
    if _is_state_dict(content):
        return {"state_dict": content}
    if not isinstance(content, dict):
        raise InputError(f"{path} is no checkpoint: it holds no state dict, but a {type(content).__name__}; {_WAY_OUT}")
    if "state_dict" in content:
        candidates = ["state_dict"]
    else:
        candidates = [key for key, value in content.items() if _is_state_dict(value)]
    if len(candidates) > 1:
        raise InputError(
            f"{path} holds several state dicts, {_named(candidates)}; keep the one that is meant: "
            f"torch.save({{'state_dict': torch.load('{path}')[{candidates[0]!r}]}}, FILE)"
        )
    if not candidates:
        found = _named(content) if content else "nothing"
        raise InputError(f"{path} is no checkpoint: it holds no state dict, but {found}; {_WAY_OUT}")
    state = content[candidates[0]]
    if not _is_state_dict(state):
        found = _named(state) if isinstance(state, dict) and state else "nothing of that kind"
        raise InputError(f"{path} is no checkpoint: no state dict under 'state_dict', but {found}; {_WAY_OUT}")
    return dict(content) | {"state_dict": state}


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, dict) and bool(content) and all(map(_is_weight, content.items()))


def _is_weight(item: tuple[Any, Any]) -> bool:
    return isinstance(item[0], str) and isinstance(item[1], Tensor)


def _named(keys: Any) -> str:
    """The first few of these, quoted."""
    keys = list(keys)
    return ", ".join(repr(key)[:40] for key in keys[:5]) + (", ..." if len(keys) > 5 else "")


def _refuse_parts_of_tensors(state: Mapping[str, Tensor], path: Path) -> None:
    for key, value in state.items():
        if value.is_meta:
            raise InputError(f"{path} holds no values for '{key}', which is on the device meta; {_WAY_OUT}")
        if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided or value.is_quantized:
            kind = type(value).__name__ if value.layout is torch.strided else value.layout
            raise InputError(f"{path} is no checkpoint of plain tensors: '{key}' is a {kind}; {_WAY_OUT}")


def _without_wrappers(state: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    long_names: dict[str, str] = {}
    for key in state:
        *modules, name = key.split(".")
        short = ".".join([module for module in modules if module not in _WRAPPERS] + [name])
        other = long_names.setdefault(short, key)
        if other != key:
            raise InputError(f"{path} holds '{short}' twice, as '{other}' and '{key}'; {_WAY_OUT}")
    return {short: state[key] for short, key in long_names.items()}


# --- what torch.load refuses -----------------------------------------------------------------------------------------


class _NumberType:
    """Stands in for numpy.dtype: knows the types of plain numbers and texts only."""

    def __init__(self, code: str, *_: Any):
        if not re.fullmatch(r"[biufcU]\d+", code):
            raise ValueError(f"'{code}' is no type of a number")
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1].replace("|", "") + self.code  # the order of the bytes


def _number(kind: _NumberType, content: bytes) -> bool | int | float | complex | str:
    """Stands in for numpy's function that restores a scalar."""
    (value,) = np.frombuffer(content, kind.code).tolist()
    return value


# What checkpoints hold beside weights, by the names that a pickle has for it: nothing of this runs foreign code.
_SAFE = [
    Namespace,
    (_NumberType, "numpy.dtype"),
    (_number, "numpy.core.multiarray.scalar"),
    (_number, "numpy._core.multiarray.scalar"),
]


def _beginning(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError as error:
        raise InputError(f"cannot read {path}: {first_line(error)}") from None


def _say_what_it_is(path: Path, beginning: bytes, refusal: str) -> str:
    """What a file is that torch.load refused with this text, and the way out: the rest of a sentence."""
    for known, what in _BEGINNINGS:
        if beginning.startswith(known):
            return f"is no checkpoint, but {what}"
    if beginning[8:9] == b"{" and int.from_bytes(beginning[:8], "little") <= path.stat().st_size - 8:
        return (
            "is no checkpoint, but a safetensors file; convert it: "
            "torch.save(safetensors.torch.load_file(FILE), NEW_FILE)"
        )
    if zipfile.is_zipfile(path):
        return _say_what_archive_it_is(path)
    if beginning.startswith(_BEGINNING_OF_TORCH_SAVE):
        return _say_what_is_pickled(re.findall(r"GLOBAL ([\w.]+)", refusal))
    if beginning.startswith(b"\x80"):
        return f"is no checkpoint, but a pickle that torch.save did not write; {_WAY_OUT}"
    return "is damaged, or is no checkpoint of weights alone"


def _say_what_archive_it_is(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = {name.partition("/")[2] for name in archive.namelist()}
    if "constants.pkl" in names:
        return f"is no checkpoint, but a TorchScript archive; {_WAY_OUT}"
    if "models/model.json" in names:
        return f"is no checkpoint, but a program of torch.export; {_WAY_OUT}"
    if "data.pkl" not in names:
        return f"is no checkpoint, but a zip archive of other files; {_WAY_OUT}"
    try:
        with torch.serialization.safe_globals(_SAFE):
            return _say_what_is_pickled(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        return _say_what_is_pickled([])


def _say_what_is_pickled(classes: list[str]) -> str:
    """classes: what a pickle of torch.save holds that is not loaded."""
    if not classes:
        return "is damaged, or is no checkpoint of weights alone"
    if any(name.startswith("torch.nn.modules.") for name in classes):
        return f"is a whole pickled model, which only foreign code restores; {_WAY_OUT}"
    found = ", ".join(sorted(classes)[:5])
    return f"is no checkpoint of weights alone: it holds {found}, which only foreign code restores; {_WAY_OUT}"
