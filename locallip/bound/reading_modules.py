"""The modules of a network that is read: those with a rule are nodes, the others are looked into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from locallip.bound.nodes import Obstacle
from locallip.bound.operators import Position
from locallip.bound.reading import Reading, Stop, position_of
from locallip.bound.replaced import replacements, trains
from locallip.bound.rules import has_rule, no_rule
from locallip.bound.seen import tensors_in, users_line


class Modules:
    """Sees every module that runs."""

    def __init__(self, reading: Reading):
        self._reading = reading
        self._before: dict[int, Position | None] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See them meanwhile."""
        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ):
                stack.callback(handle.remove)
            yield

    def _enter(self, module: nn.Module, args: tuple) -> None:
        reading = self._reading
        if reading.is_elsewhere() or reading.leaf is not None:
            return
        reading.inside.append(module)
        self._refuse_replaced(module)
        if _is_leaf(module):
            reading.refuse_unknown(tensors_in(args), type(module).__name__)
            # All of it now, since the layer may work in place, or fail.
            self._before = {id(t): reading.position(t) for t in tensors_in(args) if reading.traces.depends(t)}
            reading.leaf = module
            self._enter_leaf(module)

    def _refuse_replaced(self, module: nn.Module) -> None:
        """Stop before a module runs, perhaps one that is not listed, that does not compute what its class says."""
        where = self._named(module)
        obstacles = [*replacements(where, module)]
        if trains(module):
            obstacles.append(Obstacle(f"{where} is in training mode", "keep layers in nn.ModuleList, for model.eval()"))
        if obstacles:
            self._reading.obstacles.extend(obstacles)
            raise Stop

    def _enter_leaf(self, module: nn.Module) -> None:
        reading = self._reading
        if not reading.constants.use(module):
            what = f"{self._named(module)} is called with other weights than it holds"
            reading.stop(Obstacle(what, "write the call out with them"))
        if self._before and not has_rule(module):
            self._refuse(module)
            if module.training:
                raise Stop  # before it learns from the images

    def _leave(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        """rest: the arguments by name, and the output; of a module that has failed, None."""
        reading = self._reading
        if reading.is_elsewhere() or reading.leaf not in (None, module):
            return
        if not reading.inside or reading.inside[-1] is not module:
            return  # it has failed before it was entered
        reading.inside.pop()
        failed = len(rest) == 1
        if module is reading.leaf:
            reading.leaf = None
            if failed:
                reading.fails(reading.description(module))
            else:
                self._leave_leaf(module, args, *rest)

    def _leave_leaf(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        reading, tensors = self._reading, list(tensors_in(output))
        by_name = any(map(reading.traces.depends, tensors_in(kwargs)))
        if not self._before and not by_name:
            reading.origins.made(tensors)
            reading.traces.compute([*module.parameters(), *module.buffers()], output)
        elif not has_rule(module):
            if not self._before:
                self._refuse(module)
            reading.go_on(tensors)
        elif len(args) != 1 or not isinstance(args[0], Tensor) or kwargs or not isinstance(output, Tensor):
            what = f"{self._named(module)} takes or gives several tensors, takes one by name, or is told something else"
            reading.obstacles.append(Obstacle(f"{what} besides", "call it with one tensor alone"))
            reading.go_on(tensors)
        else:
            name, inputs = position_of(reading.path(module)), tuple(self._before.values())
            reading.trace(output, reading.add(name, module, inputs, args[0].shape[1:]))

    def _named(self, module: nn.Module) -> str:
        return f"{self._reading.description(module)}{users_line(' ({})')}"

    def _refuse(self, module: nn.Module) -> None:
        obstacle = no_rule(module, position_of(self._reading.path(module)), users_line())
        self._reading.obstacles.append(obstacle)


def reads(hook: Callable[..., Any]) -> bool:
    """Whether a hook on all modules is one of a reading, of another thread's: it changes nothing."""
    return isinstance(getattr(hook, "__self__", None), Modules)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node: it has a rule, or is PyTorch's own and holds no others in order."""
    own = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    return own or has_rule(module)
