"""Ball centre and box through a clipping activation, in one autograd function.

Between two linear layers the walk (`walk.py`) intersects two boxes, clips three tensors (for MaxMin it sorts pairs
first), marks what can vary and takes middle and half-width: operation by operation some thirty passes over memory, on a
CPU as expensive as the convolutions. In `fused_formulas` forward and backward pass are written out as plain tensor
arithmetic, which saves nothing but its inputs. `compile_activations` has `torch.compile` make one pass over memory of
each; where there is no compiler they run as they stand.

At a tie between the two boxes, or between the two of a pair, the gradient goes to one side; at a threshold it goes to
the threshold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.fx.experimental._config
from torch import Tensor
from torch.autograd.function import once_differentiable

from locallip.bound import fused_formulas as formulas
from locallip.bound.fused_formulas import Threshold
from locallip.bound.seen import first_line


class Clipping(Protocol):
    """An activation that the passes know: see `activations.Clip` and `activations.ClippedMaxMin`."""

    low: Threshold
    high: Threshold
    pairs: bool


def through_activation(stack: Tensor, half: Tensor, reach: Tensor, clip: Clipping) -> tuple[Tensor, Tensor, Tensor]:
    """Centre and box behind an activation, and what can vary there.

    Args:
        stack: (2N, ...) ball centres, then middles of the box; or (N, ...) if the two are the same.
        half: (N, ...) half-widths of the box.
        reach: half-widths of the ball's own box around the centres, broadcasts over (N, ...).
        clip: the activation.

    Returns:
        (2N, ...) centres and middles of the box behind the activation, (N, ...) its half-widths, and (N, ...) bool,
        which outputs can vary in the box.
    """
    copies = 1 + (len(stack) > len(half))
    tensors = [_entries(x, clip.pairs) for x in (stack, half, reach)]
    tensors[0] = tensors[0].unflatten(0, (copies, len(half)))
    outputs = _ThroughActivation.apply(*tensors, *_thresholds(clip.low, clip.high), clip.pairs)
    stack, half, varying = (_as_before(x, half, clip.pairs) for x in (outputs[0].flatten(0, 1), *outputs[1:]))
    return stack, half, varying.bool()


def activation(x: Tensor, clip: Clipping) -> Tensor:
    """What an activation makes of a tensor alone. x: (N, C, ...) with C even for pairs."""
    x, low, high = _broadcast(x, clip)
    entries = x
    if x.dim() != 4 or not x.is_contiguous(memory_format=torch.channels_last):
        entries, low, high = (t.flatten(1) if isinstance(t, Tensor) else t for t in (x, low, high))
    out = _Activation.apply(_entries(entries, clip.pairs), *_thresholds(low, high), clip.pairs)
    return _as_before(out, entries, clip.pairs).reshape(x.shape)


def compile_activations() -> None:
    """Compile all passes for this process, at their first use, which takes some ten seconds for each.

    Without a compiler they run as they stand, and a warning says so.
    """
    # By activation, rank and number of stacked tensors a pass has up to nine versions for float32 alone.
    torch._dynamo.config.recompile_limit = max(32, torch._dynamo.config.recompile_limit)
    _PASSES.update({name: _compiled(function) for name, function in _PLAIN_PASSES.items()})


# --- one layout for all layers, so that a pass is compiled once and not for every layer ------------------------------


def _entries(x: Tensor, pairs: bool = False) -> Tensor:
    """(N, C, H, W) or (N, C) as (N, entries, C), pairs as (N, entries, 2, C / 2); channels-last is not copied."""
    x = (x.movedim(1, -1).flatten(1, -2) if x.dim() == 4 else x.unsqueeze(1)).contiguous()
    return x.unflatten(-1, (2, -1)) if pairs else x


def _as_before(x: Tensor, like: Tensor, pairs: bool) -> Tensor:
    """(N, entries, C) or (N, entries, 2, C / 2) as (N, C, H, W) or (N, C) again."""
    x = x.flatten(-2) if pairs else x
    return x.unflatten(1, like.shape[2:]).movedim(-1, 1) if like.dim() == 4 else x.squeeze(1)


def _thresholds(*thresholds: Threshold) -> Iterator[Threshold]:
    return (_entries(t) if isinstance(t, Tensor) else t for t in thresholds)


def _broadcast(x: Tensor, clip: Clipping) -> tuple[Tensor, Threshold, Threshold]:
    """x, low and high, expanded to one another where the thresholds are not one for each entry of an image."""
    tensors = [t for t in (clip.low, clip.high) if isinstance(t, Tensor)]
    entries = (x.shape[1] // 2, *x.shape[2:]) if clip.pairs else x.shape[1:]
    if all(t.shape == (1, *entries) for t in tensors):
        return x, clip.low, clip.high
    shape = torch.broadcast_shapes((len(x), *entries), *(t.shape for t in tensors))
    low, high = (t.expand(shape) if isinstance(t, Tensor) else t for t in (clip.low, clip.high))
    return x if clip.pairs else x.expand(shape), low, high


# --- their autograd functions ----------------------------------------------------------------------------------------

_PLAIN_PASSES: dict[str, Callable[..., Any]] = {
    "activation": formulas.clipped,
    "activation backward": formulas.clipped_backward,
    "forward": formulas.forward,
    "backward": formulas.backward,
}
_PASSES = dict(_PLAIN_PASSES)


def _pass(name: str, images: int) -> Callable[..., Any]:
    """A pass, compiled or not. For one image alone it would be compiled anew, which does not pay."""
    return (_PASSES if images > 1 else _PLAIN_PASSES)[name]


class _Activation(torch.autograd.Function):
    """`formulas.clipped` with the gradients written out: autograd shares them out at ties, which takes much longer."""

    @staticmethod
    def forward(ctx, x, low, high, pairs):  # noqa: ANN001, ANN205
        _save(ctx, (x,), low, high, pairs)
        return _pass("activation", len(x))(x, low, high, pairs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        (x,), low, high = _saved(ctx)
        grads = _pass("activation backward", len(x))(
            grad.contiguous(), x, low, high, ctx.pairs, any(ctx.needs_input_grad[1:3])
        )
        return grads[0], _sum_to(grads[1], low), _sum_to(grads[2], high), None


class _ThroughActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stack, half, reach, low, high, pairs):  # noqa: ANN001, ANN205
        _save(ctx, (stack, half, reach), low, high, pairs)
        stack, half, varying = _pass("forward", len(half))(stack, half, reach, low, high, pairs)
        ctx.mark_non_differentiable(varying)
        ctx.set_materialize_grads(False)
        return stack, half, varying

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_stack, grad_half, _):  # noqa: ANN001, ANN205
        (stack, half, reach), low, high = _saved(ctx)
        grad_stack = half.new_zeros(2, *half.shape) if grad_stack is None else grad_stack.contiguous()
        grad_half = torch.zeros_like(half) if grad_half is None else grad_half.contiguous()
        *grads, grad_low, grad_high = _pass("backward", len(half))(
            grad_stack, grad_half, stack, half, reach, low, high, ctx.pairs
        )
        return *grads, _sum_to(grad_low, low), _sum_to(grad_high, high), None


def _save(ctx: Any, tensors: tuple[Tensor, ...], low: Threshold, high: Threshold, pairs: bool) -> None:
    ctx.numbers, ctx.pairs = [None if isinstance(t, Tensor) else t for t in (low, high)], pairs
    ctx.save_for_backward(*tensors, *(t for t in (low, high) if isinstance(t, Tensor)))


def _saved(ctx: Any) -> tuple[list[Tensor], Threshold, Threshold]:
    tensors = list(ctx.saved_tensors)
    high, low = (tensors.pop() if number is None else number for number in reversed(ctx.numbers))
    return tensors, low, high


def _sum_to(grad: Tensor | None, threshold: Threshold) -> Tensor | None:
    """(1, ...), summed over the images by a product with ones, on a CPU much faster than a sum over dimension 0.

    A threshold that was expanded to the images keeps its (N, ...).
    """
    if grad is None or len(threshold) == len(grad):
        return grad
    return (grad.new_ones(1, len(grad)) @ grad.flatten(1)).view(1, *grad.shape[1:])


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled for all shapes, or all passes as they stand from the first failure to compile one."""
    compiled = torch.compile(function, dynamic=True)

    def call(*args: Tensor | float | bool) -> Any:
        # What has a gradient, or is a parameter, would be compiled anew; so would sizes that happened to be equal.
        args = tuple(x.detach() if isinstance(x, Tensor) else x for x in args)
        try:
            with torch.fx.experimental._config.patch(use_duck_shape=False):
                return compiled(*args)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
            warnings.warn(f"no compiler, going on without: {first_line(error)[:160]}", stacklevel=1)
            _PASSES.update(_PLAIN_PASSES)
            return function(*args)

    return call
