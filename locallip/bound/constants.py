"""What a run uses beside its images: a graph stands for other images only if nothing of that changes meanwhile."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Constants:
    """The weights of a network's modules, and the other tensors that calls use beside its images, with their values.

    A module may be called with other weights than it holds (`torch.func.functional_call`), or change them for the time
    of a call: its values are compared at each call with those from before the run, and with what it holds afterwards.
    """

    def __init__(self, model: nn.Module):
        self._values: dict[int, tuple[Tensor, Tensor]] = {}
        self._held = {id(module): _own(module) for module in model.modules()}
        self._used: dict[int, nn.Module] = {}
        self.use_tensors(_own(model))

    def use(self, module: nn.Module) -> bool:
        """Note that a module is called; whether it holds what it held before the run."""
        self._used[id(module)] = module
        return self._holds(module)

    def use_tensors(self, tensors: Iterable[Tensor]) -> bool:
        """Note that a call uses these; whether they are what they were, if they were known before."""
        found = [self._is_as_it_was(tensor) for tensor in tensors]  # all of them are noted
        return all(found)

    def are_as_they_were(self) -> bool:
        """Whether all modules and tensors that were used are still what they were when they were."""
        return all(map(self._holds, self._used.values())) and self.use_tensors([t for t, _ in self._values.values()])

    def _holds(self, module: nn.Module) -> bool:
        now = _own(module)
        before = self._held.setdefault(id(module), now)
        same = len(before) == len(now) and all(a is b for a, b in zip(before, now))
        return same and self.use_tensors(now)

    def _is_as_it_was(self, tensor: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            _, value = self._values.setdefault(id(tensor), (tensor, tensor.detach().clone()))
            if value.shape != tensor.shape or value.dtype != tensor.dtype:
                return False
            return bool(((value == tensor) | ((value != value) & (tensor != tensor))).all())


def _own(module: nn.Module) -> list[Tensor]:
    """Weights and buffers of a module and all in it."""
    return [*module.parameters(), *module.buffers()]
