"""CUDA graphs on a CPU: what a function does is recorded operation by operation, and done again to the same memory.

As with a CUDA graph numbers are those of the recording, tensors are read and written where they were, nothing that was
recorded has been computed, and a value that Python looks at is an error.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_LOOKS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.nonzero.default}


class _Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls, self.before, self.made = [], {}, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function in _LOOKS:
            raise RuntimeError(f"{function} looks at a value in a recording")
        kwargs = kwargs or {}
        for tensor in _written(function, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self.made:
                self.before.setdefault(storage.data_ptr(), (storage, storage.clone()))
        known = {t.untyped_storage().data_ptr() for t in _tensors((args, kwargs))}
        result = function(*args, **kwargs)
        self.made |= {t.untyped_storage().data_ptr() for t in _tensors(result)} - known
        self.calls.append((function, args, kwargs, result))
        return result


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _written(function: Any, args: tuple, kwargs: dict) -> list[Tensor]:
    """The tensors that an operation writes to."""
    parameters = function._schema.arguments
    given = {parameter.name: value for parameter, value in zip(parameters, args)} | kwargs
    writes = [p.name for p in parameters if p.alias_info is not None and p.alias_info.is_write]
    return _tensors([given[name] for name in writes if name in given])


def record(function: Callable[[], Any]) -> Callable[[], Any]:
    """Record a function; a call of what is returned does it again."""
    with _Recording() as recording:
        results = function()
    for storage, content in recording.before.values():
        storage.copy_(content)
    for tensor in _tensors(results):
        tensor.detach().fill_(torch.nan)

    @torch.no_grad()
    def replay() -> Any:
        for call, args, kwargs, outputs in recording.calls:
            for old, new in zip(_tensors(outputs), _tensors(call(*args, **kwargs))):
                if old.untyped_storage().data_ptr() != new.untyped_storage().data_ptr():
                    old.detach().copy_(new)
        return results

    return replay
