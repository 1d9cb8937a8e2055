"""What can be said of a call while a network runs: its name, its tensors, the user's line that makes it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

# Files between a call and the line of the user's that makes it.
_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
# What says nothing about the values of a tensor.
TELLS_NO_VALUE = {
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__, Tensor.stride),
    *(Tensor.is_contiguous, Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.element_size),
    *(torch.numel, torch.is_floating_point, torch.is_complex, torch.is_inference, Tensor.is_inference, Tensor.__hash__),
}
TELLS_NO_VALUE |= {
    getattr(Tensor, name).__get__
    for name in (
        *("shape", "ndim", "dtype", "device", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda", "is_cpu"),
        *("is_sparse", "is_quantized", "is_nested", "is_meta", "is_mkldnn", "_version", "itemsize", "nbytes"),
    )
}


def first_line(error: Exception) -> str:
    """What an exception says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def version(tensor: Tensor) -> int | None:
    """How often a tensor was changed in place; None: made in inference mode, outside of which it cannot be changed."""
    return None if tensor.is_inference() else tensor._version


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, slice):
        yield from tensors_in((value.start, value.stop, value.step))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)


def name_of(function: Callable[..., Any]) -> str:
    function = getattr(function, "overloadpacket", function)
    name = resolve_name(function) or getattr(function, "__name__", str(function))
    return f"{name.removesuffix('.__get__').split('.')[-1]}()"


def users_line(form: str = "{}") -> str:
    """File and line of the user's that called, in a form; empty where there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if not frame.f_code.co_filename.startswith((*_NOT_THE_USERS, "<")):
            return form.format(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        frame = frame.f_back
    return ""
