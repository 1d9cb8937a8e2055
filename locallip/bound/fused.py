"""Ball centre and box through a clipping activation, in one autograd function.

Between two linear layers the walk (`walk.py`) intersects two boxes, clips three tensors (for MaxMin it sorts pairs
first), marks what can vary and takes middle and half-width: operation by operation some thirty passes over memory, on a
CPU as expensive as the convolutions. In `fused_formulas` forward and backward pass are written out as plain tensor
arithmetic, which saves nothing but its inputs; compiled (`compiled.py`) each makes one pass over memory.

At a tie between the two boxes, or between the two of a pair, the gradient goes to one side; at a threshold it goes to
the threshold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from locallip.bound import fused_formulas as formulas
from locallip.bound.compiled import Compilable
from locallip.bound.fused_formulas import Threshold


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

_CLIPPED, _CLIPPED_BACKWARD = Compilable(formulas.clipped), Compilable(formulas.clipped_backward)
_FORWARD, _BACKWARD = Compilable(formulas.forward), Compilable(formulas.backward)


def _pays(images: Tensor) -> bool:
    """Whether to run compiled. For one image alone all would be compiled anew."""
    return len(images) > 1


class _Activation(torch.autograd.Function):
    """`formulas.clipped` with the gradients written out: autograd shares them out at ties, which takes much longer."""

    @staticmethod
    def forward(ctx, x, low, high, pairs):  # noqa: ANN001, ANN205
        _save(ctx, (x,), low, high, pairs)
        return _CLIPPED(x, low, high, pairs, pays=_pays(x))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        (x,), low, high = _saved(ctx)
        by_thresholds = any(ctx.needs_input_grad[1:3])
        grads = _CLIPPED_BACKWARD(grad.contiguous(), x, low, high, ctx.pairs, by_thresholds, pays=_pays(x))
        return grads[0], _sum_to(grads[1], low), _sum_to(grads[2], high), None


class _ThroughActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stack, half, reach, low, high, pairs):  # noqa: ANN001, ANN205
        _save(ctx, (stack, half, reach), low, high, pairs)
        stack, half, varying = _FORWARD(stack, half, reach, low, high, pairs, pays=_pays(half))
        ctx.mark_non_differentiable(varying)
        ctx.set_materialize_grads(False)
        return stack, half, varying

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_stack, grad_half, _):  # noqa: ANN001, ANN205
        (stack, half, reach), low, high = _saved(ctx)
        grad_stack = half.new_zeros(2, *half.shape) if grad_stack is None else grad_stack.contiguous()
        grad_half = torch.zeros_like(half) if grad_half is None else grad_half.contiguous()
        *grads, grad_low, grad_high = _BACKWARD(
            grad_stack, grad_half, stack, half, reach, low, high, ctx.pairs, pays=_pays(half)
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
