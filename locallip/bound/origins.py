"""Where the tensors of a run come from, so that nothing that the images pass through stays unseen.

A `TorchFunctionMode` does not see functions that are not written in Python: TorchScript, extensions, what
`torch.vmap` unwraps. Two things give them away. Their operations on the images go through PyTorch's dispatcher, outside
of any call that is seen. And their results turn up in a call as tensors that no call has made; those that were there
before the run, such as constants, are the same objects in every run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

UNSEEN = "a function that cannot be seen (TorchScript, an extension, torch.vmap)"


class Origins:
    """The constants of a run: tensors that calls have made without the images, and those of unknown origin.

    All are kept, so that their identities stay their own.

    Args:
        before: those of a run before this one; None: this is the first.
    """

    def __init__(self, before: Origins | None = None):
        self._before, self._constants = before, {}
        self._made: set[int] = set()

    def made(self, tensors: Iterable[Tensor]) -> None:
        """Note what a call has made without the images."""
        new = {id(tensor): tensor for tensor in tensors}
        self._constants.update(new)
        self._made.update(new)

    def are_known(self, tensors: Iterable[Tensor]) -> bool:
        """Whether all of these were made by calls, or were there in the run before; in the first run all are."""
        new = {id(tensor): tensor for tensor in tensors if id(tensor) not in self._made}
        self._constants.update(new)
        return self._before is None or new.keys() <= self._before._constants.keys()


class Operations(TorchDispatchMode):
    """Shows what computes with which tensors, whoever calls it.

    Args:
        look: is shown every operation and its operands.
    """

    def __init__(self, look: Callable[[Callable[..., Any], tuple[Any, ...]], None]):
        super().__init__()
        self._look = look

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._look(function, (args, kwargs))
        return function(*args, **kwargs)
