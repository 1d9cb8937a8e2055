"""Ball centre and box through a clipping activation, in one autograd function.

Between two linear layers the walk of `local_bound` intersects two boxes, clips three tensors (for MaxMin it sorts pairs
first), marks what can vary and takes middle and half-width: operation by operation some thirty passes over memory, on a
CPU as expensive as the convolutions. Here forward and backward pass are written out as plain tensor arithmetic, which
saves nothing but its inputs. `compile_activations` has `torch.compile` make one pass over memory of each; where there
is no compiler they run as they stand.

At a tie between the two boxes, or between the two of a pair, the gradient goes to one side; at a threshold it goes to
the threshold.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

Threshold = Tensor | float
Ends = tuple[Tensor, Tensor, Tensor]  # centre of the ball, lower and upper ends of the box; (N, ...) each


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
    outputs = _ThroughActivation.apply(
        *(_entries(x) if isinstance(x, Tensor) else x for x in (stack, half, reach, clip.low, clip.high)), clip.pairs
    )
    stack, half, varying = (_as_before(x, half) for x in outputs)
    return stack, half, varying.bool()


def activation(x: Tensor, clip: Clipping) -> Tensor:
    """What an activation makes of a tensor alone. x: (N, C, ...) with C even for pairs."""
    return _PASSES["activation"](x, clip.low, clip.high, clip.pairs)


def compile_activations() -> None:
    """Compile all passes for this process, at their first use, which takes up to a minute.

    Without a compiler they run as they stand, and a warning says so.
    """
    # Convolutions and dense layers, first layers and last batches: each may get a version of its own.
    torch._dynamo.config.recompile_limit = 32
    to_compile = {"activation": _clipped, "forward": _forward, "backward": _backward}
    _PASSES.update({name: _compiled(function) for name, function in to_compile.items()})


def _entries(x: Tensor) -> Tensor:
    """(N, C, H, W) or (N, C) as (N, entries, C), which in channels-last order copies nothing."""
    return (x.movedim(1, -1).flatten(1, -2) if x.dim() == 4 else x.unsqueeze(1)).contiguous()


def _as_before(x: Tensor, like: Tensor) -> Tensor:
    """(N, entries, C) as (N, C, H, W) or (N, C) again."""
    return x.unflatten(1, like.shape[2:]).movedim(-1, 1) if like.dim() == 4 else x.squeeze(1)


# --- the formulas, for tensors of (N, entries, C) --------------------------------------------------------------------


def _forward(
    stack: Tensor, half: Tensor, reach: Tensor, low: Threshold, high: Threshold, pairs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    # `varying` as numbers: compiled code stores booleans one by one.
    if not pairs:
        center, lower, upper = _cut(stack, half, reach)
        varying = (~((upper <= low) | (lower >= high))).to(half.dtype)
        center, lower, upper = (_clip(x, low, high) for x in (center, lower, upper))
        return torch.cat([center, (upper + lower) * 0.5]), (upper - lower) * 0.5, varying
    first, second = (_cut(*part) for part in _halves(stack, half, reach))
    larger_center, larger_lower, larger_upper = (torch.maximum(a, b) for a, b in zip(first, second))
    smaller_center, smaller_lower, smaller_upper = (torch.minimum(a, b) for a, b in zip(first, second))
    varying = _join((~(larger_lower >= high)).to(half.dtype), (~(smaller_upper <= low)).to(half.dtype))
    larger_center, larger_lower, larger_upper = (
        torch.minimum(x, high) for x in (larger_center, larger_lower, larger_upper)
    )
    smaller_center, smaller_lower, smaller_upper = (
        torch.maximum(x, low) for x in (smaller_center, smaller_lower, smaller_upper)
    )
    center = _join(larger_center, smaller_center)
    middle = _join((larger_upper + larger_lower) * 0.5, (smaller_upper + smaller_lower) * 0.5)
    half = _join((larger_upper - larger_lower) * 0.5, (smaller_upper - smaller_lower) * 0.5)
    return torch.cat([center, middle]), half, varying


def _backward(
    grad_stack: Tensor,
    grad_half: Tensor,
    stack: Tensor,
    half: Tensor,
    reach: Tensor,
    low: Threshold,
    high: Threshold,
    pairs: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients of stack, half and reach, and of low and high before their sum over the images; None: a number."""
    if not pairs:
        ends, grads = _cut(stack, half, reach), _grad_ends(grad_stack, grad_half)
        over = [grad * (x >= high) for x, grad in zip(ends, grads)]
        through = [grad * ((x > low) & (x < high)) for x, grad in zip(ends, grads)]
        return *_cut_backward(through, stack, half, reach), None, sum(over) if isinstance(high, Tensor) else None
    parts = list(_halves(stack, half, reach))
    first, second = (_cut(*part) for part in parts)
    grads_larger, grads_smaller = (_grad_ends(*part) for part in _halves(grad_stack, grad_half))
    grads_a, grads_b, grad_low, grad_high = [], [], 0, 0
    for a, b, grad_larger, grad_smaller in zip(first, second, grads_larger, grads_smaller):
        in_order = a >= b
        larger, smaller = torch.maximum(a, b), torch.minimum(a, b)
        grad_high, grad_low = grad_high + grad_larger * (larger >= high), grad_low + grad_smaller * (smaller <= low)
        grad_larger, grad_smaller = grad_larger * (larger < high), grad_smaller * (smaller > low)
        crossed = (grad_larger - grad_smaller) * in_order
        grads_a.append(grad_smaller + crossed)
        grads_b.append(grad_larger - crossed)
    joined = (_join(a, b) for a, b in zip(_cut_backward(grads_a, *parts[0]), _cut_backward(grads_b, *parts[1])))
    return *joined, grad_low, grad_high


def _cut(stack: Tensor, half: Tensor, reach: Tensor) -> Ends:
    """Centre of the ball, and the ends of the intersection of its own box with the box."""
    center, middle = stack[: len(half)], stack[-len(half) :]
    return center, torch.maximum(middle - half, center - reach), torch.minimum(middle + half, center + reach)


def _grad_ends(grad_stack: Tensor, grad_half: Tensor) -> Ends:
    """From gradients of centre, middle and half-width to those of centre, lower and upper end."""
    grad_center, grad_middle = grad_stack.chunk(2)
    return grad_center, (grad_middle - grad_half) * 0.5, (grad_middle + grad_half) * 0.5


def _cut_backward(grads: Ends, stack: Tensor, half: Tensor, reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of centre and ends of the intersection to those of stack, half and reach."""
    center, middle = stack[: len(half)], stack[-len(half) :]
    grad_center, grad_lower, grad_upper = grads
    ball_lower = grad_lower * (center - reach > middle - half)
    ball_upper = grad_upper * (center + reach < middle + half)
    box_lower, box_upper = grad_lower - ball_lower, grad_upper - ball_upper
    grad_center, grad_middle = grad_center + ball_lower + ball_upper, box_lower + box_upper
    grad_stack = torch.cat([grad_center, grad_middle]) if len(stack) > len(half) else grad_center + grad_middle
    return grad_stack, box_upper - box_lower, (ball_upper - ball_lower).sum_to_size(len(half), *reach.shape[1:])


def _clipped(x: Tensor, low: Threshold, high: Threshold, pairs: bool) -> Tensor:
    """The activation of x (N, C, ...)."""
    if not pairs:
        return _clip(x, low, high)
    a, b = x.chunk(2, dim=1)
    return torch.cat([torch.minimum(torch.maximum(a, b), high), torch.maximum(torch.minimum(a, b), low)], dim=1)


def _clip(x: Tensor, low: Threshold, high: Threshold) -> Tensor:
    x = torch.maximum(x, low) if isinstance(low, Tensor) else x.clamp(min=low)
    return torch.minimum(x, high) if isinstance(high, Tensor) else x.clamp(max=high)


def _halves(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The first halves of the channels of all tensors, then the second ones."""
    return zip(*(x.chunk(2, dim=-1) for x in tensors))


def _join(first: Tensor, second: Tensor) -> Tensor:
    return torch.cat([first, second], dim=-1)


# --- their autograd function -----------------------------------------------------------------------------------------


class _Activation(torch.autograd.Function):
    """`_clipped` with the gradients written out: autograd looks for ties to share them out, which takes much longer."""

    @staticmethod
    def forward(ctx, x, low, high, pairs):  # noqa: ANN001, ANN205
        ctx.numbers, ctx.pairs = [None if isinstance(t, Tensor) else t for t in (low, high)], pairs
        ctx.save_for_backward(x, *(t for t in (low, high) if isinstance(t, Tensor)))
        return _clipped(x, low, high, pairs)

    @staticmethod
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        x, *tensors = ctx.saved_tensors
        low, high = (tensors.pop(0) if number is None else number for number in ctx.numbers)
        wants_low, wants_high = ctx.needs_input_grad[1:3]
        if not ctx.pairs:
            grad_high = _sum_to(grad * (x >= high), high) if wants_high else None
            return (grad * ((x > low) & (x < high))).sum_to_size(x.shape), None, grad_high, None
        (a, b), (grad_larger, grad_smaller) = x.chunk(2, dim=1), grad.chunk(2, dim=1)
        larger, smaller, in_order = torch.maximum(a, b), torch.minimum(a, b), a >= b
        grad_high = _sum_to(grad_larger * (larger >= high), high) if wants_high else None
        grad_low = _sum_to(grad_smaller * (smaller <= low), low) if wants_low else None
        grad_larger, grad_smaller = grad_larger * (larger < high), grad_smaller * (smaller > low)
        grad_a = torch.where(in_order, grad_larger, grad_smaller)
        grad_b = torch.where(in_order, grad_smaller, grad_larger)
        return torch.cat([grad_a, grad_b], dim=1).sum_to_size(x.shape), grad_low, grad_high, None


def _sum_to(grad: Tensor, threshold: Tensor) -> Tensor:
    return _sum_over_images(grad).sum_to_size(threshold.shape)


_PLAIN_PASSES = {"activation": _Activation.apply, "forward": _forward, "backward": _backward}
_PASSES: dict[str, Callable[..., Any]] = dict(_PLAIN_PASSES)


class _ThroughActivation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stack, half, reach, low, high, pairs):  # noqa: ANN001, ANN205
        ctx.numbers, ctx.pairs = [None if isinstance(x, Tensor) else x for x in (low, high)], pairs
        ctx.save_for_backward(stack, half, reach, *(x for x in (low, high) if isinstance(x, Tensor)))
        stack, half, varying = _PASSES["forward"](stack, half, reach, low, high, pairs)
        ctx.mark_non_differentiable(varying)
        return stack, half, varying

    @staticmethod
    def backward(ctx, grad_stack, grad_half, _):  # noqa: ANN001, ANN205
        stack, half, reach, *tensors = ctx.saved_tensors
        low, high = (tensors.pop(0) if number is None else number for number in ctx.numbers)
        *grads, grad_low, grad_high = _PASSES["backward"](
            grad_stack, grad_half, stack, half, reach, low, high, ctx.pairs
        )
        return *grads, _sum_over_images(grad_low), _sum_over_images(grad_high), None


def _sum_over_images(x: Tensor | None) -> Tensor | None:
    """(1, ...) as a product with ones, which on a CPU is much faster than a sum over the first dimension."""
    return None if x is None else (x.new_ones(1, len(x)) @ x.flatten(1)).view(1, *x.shape[1:])


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, or all passes as they stand from the first failure to compile one."""
    compiled = torch.compile(function)

    def call(*args: Tensor | float | bool) -> Any:
        try:
            return compiled(*args)
        except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
            warnings.warn(f"no compiler, going on without: {reason}", stacklevel=1)
            _PASSES.update(_PLAIN_PASSES)
            return function(*args)

    return call
