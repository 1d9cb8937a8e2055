"""Reading a network off one run of it: which layers and functions its images go through.

The network runs as it is, in plain PyTorch, on random images. A `TorchFunctionMode` sees every call of a function or
a tensor's method, global hooks see every module. A module with a rule is one node, and so is a call that means such a
layer; every other module is looked into. What would make the reading wrong for other images ends it: a value that
leaves the tensors (`if x.sum() > 0`, `.item()`, `.numpy()`), or a function that cannot be seen (see `origins`).

`torch.export` reads the same graph, but takes modules with a rule of the user's apart and ten to a hundred times as
long; `torch.fx` dies of `len(x)` and `if x.shape[1] != 3`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from locallip.bound.calls import Call, NoTranslationError, Step, translate
from locallip.bound.checks import is_plain
from locallip.bound.constants import Constants
from locallip.bound.nodes import IMAGES, Node, Obstacle, Refusal
from locallip.bound.operators import Position
from locallip.bound.origins import UNSEEN, Operations, Origins
from locallip.bound.precision import own_precision
from locallip.bound.rules import describe, has_rule, namesake, no_rule
from locallip.bound.seen import TELLS_NO_VALUE, name_of, tensors_in, users_line
from locallip.bound.traces import ChangedInPlaceError, Traces

# Images of the run: another number than there are channels, classes or dimensions, so that they are told apart.
_IMAGES = 3
_BY_VALUE = "a graph holds for all images only if nothing but their shape decides what happens; say it with tensors"


@dataclass
class Captured:
    """What one run has shown.

    Attributes:
        nodes: in the order of the calls.
        output: position of the node that makes the logits.
        shape: of one image's output.
        roots: tensors that nodes were made from and do not hold themselves; not the images.
        draws: whether the run has drawn random numbers.
    """

    nodes: list[Node] = field(default_factory=list)
    output: Position | None = IMAGES
    shape: torch.Size = field(default_factory=torch.Size)
    roots: list[Tensor] = field(default_factory=list)
    draws: bool = False

    def keep(self, *roots: Tensor) -> None:
        """Note roots, each once."""
        self.roots = list({id(root): root for root in (*self.roots, *roots)}.values())


def capture(model: nn.Module, x: Tensor) -> Captured:
    """Run a network in eval mode on random images like x (N, ...), of which only shape, dtype and device count.

    It runs twice: only then can be told which tensors were there before.

    Raises:
        Refusal: names all that has no rule, each with its place, the user's line and a way out.
    """
    before = Origins()
    _read(model, x, before)
    chance = torch.get_rng_state()
    captured = _read(model, x, Origins(before))
    captured.draws = not torch.equal(chance, torch.get_rng_state())
    return captured


def _read(model: nn.Module, x: Tensor, origins: Origins) -> Captured:
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode(False), torch.no_grad(), own_precision(x.device), ExitStack() as watching:
        images = torch.rand(_IMAGES, *x.shape[1:], generator=generator, dtype=torch.float64, device="cpu")
        reader = _Reader(model, images.to(x.device, x.dtype), origins)
        watching.enter_context(reader.watching())
        try:
            output = model(reader.images)
        except _Stop:
            raise Refusal(reader.obstacles) from None
        except Exception as error:
            if reader.obstacles:
                raise Refusal(reader.obstacles) from error
            sizes = ", ".join(map(str, x.shape[1:]))
            said = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(f"the network does not run on images (N, {sizes}) of {x.dtype}: {said[0]}") from error
    return reader.finish(output)


class _Stop(BaseException):
    """Ends a run that nothing more can be learnt from; no `except Exception` of the user's may hold it."""


def reads(hook: Callable[..., Any]) -> bool:
    """Whether a hook on all modules is one of a reading, of another thread's: it changes nothing."""
    return isinstance(getattr(hook, "__self__", None), _Reader)


class _Reader(TorchFunctionMode):
    """Follows the images through a run."""

    def __init__(self, model: nn.Module, images: Tensor, origins: Origins):
        super().__init__()
        self.images, self.obstacles, self._origins = images, [], origins
        self._seen = False
        self._captured = Captured()
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._traces, self._constants = Traces(), Constants(model)
        self._inside: list[nn.Module] = []
        self._leaf: nn.Module | None = None
        self._before: dict[int, Position | None] = {}
        self._failed: list[str] = []
        self._names: set[Position] = set()
        self._thread = threading.get_ident()
        self._traces.trace(images, IMAGES)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See all functions and modules that are called meanwhile."""
        with ExitStack() as stack:
            for handle in (
                register_module_forward_pre_hook(self._enter),
                register_module_forward_hook(self._leave, with_kwargs=True, always_call=True),
            ):
                stack.callback(handle.remove)
            stack.enter_context(Operations(self._look))
            stack.enter_context(self)
            yield

    def finish(self, output: Any) -> Captured:
        """What was read, given what the network has returned."""
        if not isinstance(output, Tensor):
            self.obstacles.append(
                Obstacle(
                    f"the network gives a {type(output).__name__}, not one tensor of logits",
                    "wrap it in a module whose forward returns the logits alone",
                )
            )
        elif not self.obstacles and not self._traces.depends(output):
            self.obstacles.append(Obstacle("the logits do not come from the images by calls that can be seen"))
        self.obstacles.extend(Obstacle(f"{what} fails, and the network goes on", _BY_VALUE) for what in self._failed)
        if not self._constants.are_as_they_were():
            self.obstacles.append(
                Obstacle("the network changes weights or constants while it runs", "compute new tensors from them")
            )
        if self.obstacles:
            raise Refusal(self.obstacles)
        result = self._captured
        result.output, result.shape = self._position(output), output.shape[1:]
        return result

    # --- modules -----------------------------------------------------------------------------------------------------

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if threading.get_ident() != self._thread or self._leaf is not None:
            return
        self._inside.append(module)
        if _is_leaf(module):
            self._refuse_unknown(tensors_in(args), type(module).__name__)
            # All of it now, since the layer may work in place, or fail.
            self._before = {id(t): self._position(t) for t in tensors_in(args) if self._traces.depends(t)}
            self._leaf = module
            self._enter_leaf(module)

    def _enter_leaf(self, module: nn.Module) -> None:
        if not self._constants.use(module):
            where = f"{describe(_position(self._path(module)), module)}{users_line(' ({})')}"
            self._stop(Obstacle(f"{where} is called with other weights than it holds", "write the call out with them"))
        if self._before and not has_rule(module):
            self.obstacles.append(no_rule(module, _position(self._path(module)), users_line()))
            if module.training:
                raise _Stop  # before it learns from the images

    def _leave(self, module: nn.Module, args: tuple, *rest: Any) -> None:
        """rest: the arguments by name, and the output; of a module that has failed, None."""
        if threading.get_ident() != self._thread or self._leaf not in (None, module):
            return
        if not self._inside or self._inside[-1] is not module:
            return  # it has failed before it was entered
        self._inside.pop()
        failed = len(rest) == 1
        if module is self._leaf:
            self._leaf = None
            if failed:
                self._failed.append(describe(_position(self._path(module)), module))
            else:
                self._leave_leaf(module, args, *rest)

    def _leave_leaf(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        tensors, by_name = list(tensors_in(output)), any(map(self._traces.depends, tensors_in(kwargs)))
        if not self._before and not by_name:
            self._origins.made(tensors)
            self._traces.compute([*module.parameters(), *module.buffers()], output)
        elif not has_rule(module):
            if not self._before:
                self.obstacles.append(no_rule(module, _position(self._path(module)), users_line()))
            self._go_on(tensors)
        elif len(args) != 1 or not isinstance(args[0], Tensor) or kwargs or not isinstance(output, Tensor):
            where = f"{describe(_position(self._path(module)), module)}{users_line(' ({})')}"
            what = f"{where} takes or gives several tensors, takes one by name, or is told something else besides"
            self.obstacles.append(Obstacle(what, "call it with one tensor alone"))
            self._go_on(tensors)
        else:
            position = self._name(_position(self._path(module)))
            self._captured.nodes.append(
                Node(position, module, tuple(self._before.values()), args[0].shape[1:], users_line())
            )
            self._traces.trace(output, position)

    def _path(self, module: nn.Module) -> str:
        return self._paths.get(id(module), f"<{type(module).__name__} that the network does not list>")

    # --- calls -------------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._leaf is not None or threading.get_ident() != self._thread or function in TELLS_NO_VALUE:
            return self._call(function, args, kwargs)
        tensors = list(tensors_in((args, kwargs)))
        self._refuse_unknown(tensors, name_of(function))
        inputs = [tensor for tensor in tensors if self._traces.depends(tensor)]
        if not inputs:
            result = self._call(function, args, kwargs)
            self._origins.made(tensors_in(result))
            self._traces.compute(tensors, result)
            return result
        self._refuse_training(function, args, kwargs)
        before = {id(tensor): (self._position(tensor), tensor.shape[1:]) for tensor in inputs}
        constants = {id(tensor): tensor._version for tensor in tensors if id(tensor) not in before}
        self._refuse_subclasses(tensors, function)
        try:
            result = self._call(function, args, kwargs)
        except Exception:
            self._failed.append(f"{name_of(function)}{self._where()}")
            raise
        if not any(True for _ in tensors_in(result)):
            self._stop(self._without_result(function))
        try:
            if any(constants.get(id(tensor), tensor._version) != tensor._version for tensor in tensors):
                raise NoTranslationError("writes activations into another tensor")
            if not self._constants.use_tensors(tensor for tensor in tensors if id(tensor) not in before):
                raise NoTranslationError("takes weights or constants that the network changes while it runs")
            steps = translate(args, kwargs, Call(function, self._traces.depends, result))
            if any({id(tensor) for tensor in step.tensors()} != set(before) for step in steps):
                raise NoTranslationError("depends on the images in more than its first argument")
        except NoTranslationError as reason:
            self.obstacles.append(Obstacle(f"{name_of(function)}{self._where()} {reason}", self._way_out()))
            self._go_on(list(tensors_in(result)))
            return result
        made_from = [constant for step in steps for constant in step.made_from]
        self._captured.keep(*self._traces.roots(tensors), *made_from)
        for tensor, step in zip(tensors_in(result), steps, strict=True):
            self._traces.trace(tensor, self._apply(step, function, before)[0])
        return result

    def _without_result(self, function: Callable[..., Any]) -> Obstacle:
        if function is Tensor.__setitem__:
            what = f"something writes into a part of activations{self._where()}"
            return Obstacle(what, "put the parts together with torch.cat or torch.where, as new tensors")
        return Obstacle(f"{name_of(function)}{self._where()} takes a value out of the network", _BY_VALUE)

    def _call(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function that is seen to be called."""
        outermost, self._seen = not self._seen, True
        try:
            return function(*args, **kwargs)
        finally:
            self._seen = not outermost

    def _look(self, operands: tuple[Any, ...]) -> None:
        """Stop where something computes with the images without having been seen."""
        seen = self._seen or self._leaf is not None or threading.get_ident() != self._thread
        if not seen and any(map(self._traces.depends, tensors_in(operands))):
            self._stop(Obstacle(f"{UNSEEN} computes with the images{self._where()}", self._way_out()))

    def _refuse_unknown(self, tensors: Iterable[Tensor], taker: str) -> None:
        if not self._origins.are_known(tensor for tensor in tensors if not self._traces.depends(tensor)):
            what = f"{taker}{self._where()} takes a tensor from an earlier run or from {UNSEEN}"
            self._stop(Obstacle(what, f"keep a constant in a buffer (register_buffer), or {self._way_out()}"))

    def _refuse_subclasses(self, tensors: list[Tensor], function: Callable[..., Any]) -> None:
        for tensor in tensors:
            if not is_plain(tensor):
                kind = f"a {type(tensor).__name__}, whose class may say what it does"
                self._stop(Obstacle(f"{name_of(function)}{self._where()} takes {kind}", "take plain tensors"))

    def _apply(
        self, step: Step, function: Callable[..., Any], known: dict[int, tuple[Any, torch.Size]], outermost: bool = True
    ) -> tuple[Position | None, torch.Size]:
        """Record a step behind those that it is applied to: its position, and inside of another the shape behind it.

        known: position and shape of tensors by their identity, as they were before the call.
        """
        before = [
            self._apply(value, function, known, outermost=False) if isinstance(value, Step) else known[id(value)]
            for value in step.inputs
        ]
        if step.layer is None:
            return before[0]
        path = self._path(self._inside[-1]) if self._inside else ""
        position = self._name(f"{path}.{name_of(function)}" if path else name_of(function))
        inputs, (shape, *_) = zip(*before)
        self._captured.nodes.append(Node(position, step.layer, inputs, shape, users_line()))
        return position, shape if outermost else _shape_behind(step.layer, [shape for _, shape in before])

    def _refuse_training(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        """Statistics of a batch are stopped before they are taken, which would change the network."""
        if function is nn.functional.batch_norm:
            training = kwargs.get("training", args[5] if len(args) > 5 else False)
            if training or kwargs.get("running_mean", args[1] if len(args) > 1 else None) is None:
                self._stop(Obstacle(f"batch_norm(){self._where()} depends on the batch", "call it with training=False"))

    # --- tensors and names -------------------------------------------------------------------------------------------

    def _position(self, tensor: Tensor) -> Position | None:
        try:
            return self._traces.position(tensor)
        except ChangedInPlaceError:
            what = f"activations that something has changed in place are used again{self._where()}"
            self._stop(Obstacle(what, "write the change without the underscore, or take inplace=True away"))

    def _name(self, name: Position) -> Position:
        """The name, or with a number behind it where another node has it: a layer that is used again."""
        known, number = name, 1
        while name in self._names:
            number += 1
            name = f"{known}#{number}"
        self._names.add(name)
        return name

    # --- obstacles ---------------------------------------------------------------------------------------------------

    def _go_on(self, tensors: list[Tensor]) -> None:
        """Follow what an obstacle has given, so that all obstacles can be named at once."""
        assert self.obstacles, "only what is refused in the end may be unknown"
        for tensor in tensors:
            self._traces.trace(tensor, None)

    def _stop(self, obstacle: Obstacle) -> None:
        self.obstacles.append(obstacle)
        raise _Stop

    def _where(self) -> str:
        if not self._inside:
            return users_line(" ({})")
        module = self._inside[-1]
        kind, path = type(module).__name__, self._path(module)
        kind = f"{type(module).__module__}.{kind}" if namesake(module) else kind
        return f" in {kind}{f' at position {path}' if path else ''}{users_line(' ({})')}"

    def _way_out(self) -> str:
        other = namesake(self._inside[-1]) if self._inside else None
        use = f"use {other}, which has one, or " if other else ""
        return f"{use}put what it does into a module of its own with a rule (@rule, see docs/adding_a_layer.md)"


def _shape_behind(layer: nn.Module, shapes: list[torch.Size]) -> torch.Size:
    """The shape behind a step inside of another: behind the outermost it is the result's."""
    return layer.forward(*(torch.empty(1, *shape, device="meta") for shape in shapes)).shape[1:]


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is one node: it has a rule, or is PyTorch's own and holds no others in order."""
    own = type(module).__module__.startswith("torch.nn.") and not isinstance(module, nn.Sequential)
    return own or has_rule(module)


def _position(path: str) -> Position:
    return int(path) if path.isdecimal() else path
