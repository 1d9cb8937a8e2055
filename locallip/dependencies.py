"""The two dependencies that do not import as they come, mended in one place.

Take `torchvision_datasets()` and `l2_pgd_attack()` from here, not from their packages. Importing torchvision takes a
second, as long as torch does, so that both wait until somebody asks.

torchvision: PyPI's wheel of it is built against the CUDA build of torch. Beside a CPU-only torch its compiled
operators cannot be loaded, and its import then fails while it describes two of them (`operator torchvision::nms does
not exist`, then `qnms`). Only its data sets are used here, which need none of them, so the two are declared, without
an implementation: to call them stays an error. Where the compiled operators load, nothing is touched.

advertorch: 0.2.3 is its last release, and one of its attacks imports `zero_gradients`, which torch removed in 1.9.
It is put back with the meaning it had. It imports torchvision too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from locallip.files import InputError, first_line

_UNDECLARED_OPERATORS = ("nms", "qnms")
# A library's declarations live as long as the object does.
_declared: list[torch.library.Library] = []


def forget_parts(package: str) -> None:
    """Forget the modules of a package whose import failed: a new import would take them for whole and miss them."""
    if package not in sys.modules:
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            del sys.modules[name]


@contextlib.contextmanager
def _importing(package: str) -> Iterator[None]:
    try:
        yield
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        way_out = "install what requirements.txt names, or let `bash run_job.sh` do so"
        raise InputError(f"cannot import {package} ({first_line(error)}); {way_out}") from error


@functools.cache
@_importing("torchvision")
def torchvision_datasets() -> ModuleType:
    """Import torchvision.datasets.

    Raises:
        InputError: if that fails for another reason than the one above.
    """
    try:
        from torchvision import datasets
    except RuntimeError as error:
        if "operator torchvision::" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in _UNDECLARED_OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)
        forget_parts("torchvision")
        from torchvision import datasets
    return datasets


def _zero_gradients(x: Tensor) -> None:
    """Set the gradient of a leaf tensor to zero where it has one."""
    if x.grad is not None:
        x.grad.detach_()
        x.grad.zero_()


@functools.cache
@_importing("advertorch")
def l2_pgd_attack() -> type:
    """Import advertorch's L2PGDAttack.

    Raises:
        InputError: if that fails.
    """
    torchvision_datasets()
    # `torch.autograd.gradcheck` as an attribute is the function of that name, which hides its module.
    module = importlib.import_module("torch.autograd.gradcheck")
    if not hasattr(module, "zero_gradients"):
        module.zero_gradients = _zero_gradients
    from advertorch.attacks import L2PGDAttack

    return L2PGDAttack
