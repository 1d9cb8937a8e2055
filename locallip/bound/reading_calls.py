"""The calls of a network that is read: those that mean a layer with a rule are nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from locallip.bound.calls import Call, NoTranslationError, Step, translate
from locallip.bound.checks import is_plain
from locallip.bound.nodes import Obstacle
from locallip.bound.operators import Position
from locallip.bound.origins import UNSEEN, Operations
from locallip.bound.reading import BY_VALUE, Reading
from locallip.bound.seen import TELLS_NO_VALUE, name_of, tensors_in, version

# Position and shape of tensors by their identity, as they were before a call.
_Known = dict[int, tuple[Position | None, torch.Size]]


class Calls(TorchFunctionMode):
    """Sees every call of a function or a tensor's method, and every operation that comes of none."""

    def __init__(self, reading: Reading):
        super().__init__()
        self._reading, self._in_call, self._translating = reading, False, False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See them meanwhile."""
        with Operations(self._look), self:
            yield

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, reading = kwargs or {}, self._reading
        if reading.leaf is not None or reading.is_elsewhere() or function in TELLS_NO_VALUE:
            return self._call(function, args, kwargs)
        tensors = list(tensors_in((args, kwargs)))
        reading.refuse_unknown(tensors, name_of(function))
        if any(map(reading.traces.depends, tensors)):
            return self._follow(function, args, kwargs, tensors)
        result = self._call(function, args, kwargs)
        reading.origins.made(tensors_in(result))
        reading.traces.compute(tensors, result)
        return result

    def _follow(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Call a function that takes activations, and add its nodes. tensors: all that it takes."""
        reading = self._reading
        self._refuse_training(function, args, kwargs)
        known = {id(t): (reading.position(t), t.shape[1:]) for t in tensors if reading.traces.depends(t)}
        constants = [(tensor, version(tensor)) for tensor in tensors if id(tensor) not in known]
        self._refuse_subclasses(tensors, function)
        try:
            result = self._call(function, args, kwargs)
        except Exception:
            reading.fails(f"{name_of(function)}{reading.where()}")
            raise
        if not any(True for _ in tensors_in(result)):
            reading.stop(self._without_result(function))
        try:
            self._refuse_changes(constants)
            steps = self._translate(function, args, kwargs, result)
            if any({id(tensor) for tensor in step.tensors()} != set(known) for step in steps):
                raise NoTranslationError("depends on the images in more than its first argument")
        except NoTranslationError as reason:
            what = f"{name_of(function)}{reading.where()} {reason}"
            reading.obstacles.append(Obstacle(what, reading.way_out()))
            reading.go_on(list(tensors_in(result)))
            return result
        made_from = [constant for step in steps for constant in step.made_from]
        reading.captured.keep(*reading.traces.roots(tensors), *made_from)
        reading.captured.computes = reading.captured.computes or reading.traces.compute_numbers(tensors)
        for tensor, step in zip(tensors_in(result), steps, strict=True):
            reading.trace(tensor, self._apply(step, function, known)[0])
        return result

    def _translate(
        self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any
    ) -> tuple[Step, ...]:
        """The steps that a call means; what is computed to find them is not the network's."""
        self._translating = True
        try:
            return translate(args, kwargs, Call(function, self._reading.traces.depends, result))
        finally:
            self._translating = False

    def _call(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> Any:
        """Call a function that is seen to be called."""
        outermost, self._in_call = not self._in_call, True
        try:
            return function(*args, **kwargs)
        finally:
            self._in_call = not outermost

    def _look(self, function: Callable[..., Any], operands: tuple[Any, ...]) -> None:
        """Note chance, and stop where something computes with the images without having been seen."""
        reading = self._reading
        if self._translating or reading.is_elsewhere():
            return
        if torch.Tag.nondeterministic_seeded in getattr(function, "tags", ()):
            reading.captured.draws = True
        seen = self._in_call or reading.leaf is not None
        if not seen and any(map(reading.traces.depends, tensors_in(operands))):
            reading.stop(Obstacle(f"{UNSEEN} computes with the images{reading.where()}", reading.way_out()))

    def _apply(
        self, step: Step, function: Callable[..., Any], known: _Known, outermost: bool = True
    ) -> tuple[Position | None, torch.Size]:
        """Add a step behind those that it is applied to: its position, and inside of another the shape behind it."""
        before = [
            self._apply(value, function, known, outermost=False) if isinstance(value, Step) else known[id(value)]
            for value in step.inputs
        ]
        if step.layer is None:
            return before[0]
        reading = self._reading
        path = reading.path(reading.inside[-1]) if reading.inside else ""
        inputs, (shape, *_) = zip(*before)
        name = f"{path}.{name_of(function)}" if path else name_of(function)
        position = reading.add(name, step.layer, inputs, shape)
        if step.alone:
            reading.parts[position] = Obstacle(f"{name_of(function)}{reading.where()} {step.alone}", reading.way_out())
        return position, shape if outermost else _shape_behind(step.layer, [shape for _, shape in before])

    # --- what is in the way ------------------------------------------------------------------------------------------

    def _refuse_training(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any]) -> None:
        """Statistics of a batch are stopped before they are taken, which would change the network."""
        if function is nn.functional.batch_norm:
            training = kwargs.get("training", args[5] if len(args) > 5 else False)
            if training or kwargs.get("running_mean", args[1] if len(args) > 1 else None) is None:
                what = f"batch_norm(){self._reading.where()} depends on the batch"
                self._reading.stop(Obstacle(what, "call it with training=False"))

    def _refuse_subclasses(self, tensors: list[Tensor], function: Callable[..., Any]) -> None:
        for tensor in tensors:
            if not is_plain(tensor):
                kind = f"a {type(tensor).__name__}, whose class may say what it does"
                what = f"{name_of(function)}{self._reading.where()} takes {kind}"
                self._reading.stop(Obstacle(what, "take plain tensors"))

    def _refuse_changes(self, constants: list[tuple[Tensor, int | None]]) -> None:
        """constants: what a call has taken besides activations, with its version before the call."""
        if any(version(tensor) != before for tensor, before in constants):
            raise NoTranslationError("writes activations into another tensor")
        if not self._reading.constants.use_tensors(tensor for tensor, _ in constants):
            raise NoTranslationError("takes weights or constants that the network changes while it runs")

    def _without_result(self, function: Callable[..., Any]) -> Obstacle:
        where = self._reading.where()
        if function is Tensor.__setitem__:
            what = f"something writes into a part of activations{where}"
            return Obstacle(what, "put the parts together with torch.cat or torch.where, as new tensors")
        return Obstacle(f"{name_of(function)}{where} takes a value out of the network", BY_VALUE)


def _shape_behind(layer: nn.Module, shapes: list[torch.Size]) -> torch.Size:
    """The shape behind a step inside of another: behind the outermost it is the result's."""
    return layer.forward(*(torch.empty(1, *shape, device="meta") for shape in shapes)).shape[1:]
