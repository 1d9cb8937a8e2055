"""The formulas of `fused`: forward and backward pass of a ball centre and a box through a clipping activation.

Plain arithmetic on tensors of (N, entries, C), or of pairs (N, entries, 2, C / 2). A `stack` is (2, N, ...), ball
centres and middles of the box, or (1, N, ...) if the two are the same; `half` and `reach` are the half-widths of the
box and of the ball's own box.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

Threshold = Tensor | float
Ends = tuple[Tensor, Tensor, Tensor]  # centre of the ball, lower and upper ends of the box; (N, ...) each


def forward(
    stack: Tensor, half: Tensor, reach: Tensor, low: Threshold, high: Threshold, pairs: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Centres and middles of the box behind the activation, its half-widths, and 1 where an output can vary, else 0."""
    # Not booleans, which compiled code stores one by one.
    if not pairs:
        center, lower, upper = _cut(stack, half, reach)
        varying = (~((upper <= low) | (lower >= high))).to(half.dtype)
        center, lower, upper = (_clip(x, low, high) for x in (center, lower, upper))
        return torch.stack([center, (upper + lower) * 0.5]), (upper - lower) * 0.5, varying
    first, second = (_cut(*part) for part in _halves(stack, half, reach))
    larger_center, larger_lower, larger_upper = (torch.maximum(a, b) for a, b in zip(first, second))
    smaller_center, smaller_lower, smaller_upper = (torch.minimum(a, b) for a, b in zip(first, second))
    varying = _join((~(larger_lower >= high)).to(half.dtype), (~(smaller_upper <= low)).to(half.dtype))
    larger_center, larger_lower, larger_upper = (_at_most(x, high) for x in (larger_center, larger_lower, larger_upper))
    smaller_center, smaller_lower, smaller_upper = (
        _at_least(x, low) for x in (smaller_center, smaller_lower, smaller_upper)
    )
    center = _join(larger_center, smaller_center)
    middle = _join((larger_upper + larger_lower) * 0.5, (smaller_upper + smaller_lower) * 0.5)
    half = _join((larger_upper - larger_lower) * 0.5, (smaller_upper - smaller_lower) * 0.5)
    return torch.stack([center, middle]), half, varying


def backward(
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
        grad_a, grad_b, at_low, at_high = _pairs_backward(a, b, grad_larger, grad_smaller, low, high)
        grads_a.append(grad_a)
        grads_b.append(grad_b)
        grad_low, grad_high = grad_low + at_low, grad_high + at_high
    joined = (_join(a, b) for a, b in zip(_cut_backward(grads_a, *parts[0]), _cut_backward(grads_b, *parts[1])))
    return *joined, grad_low if isinstance(low, Tensor) else None, grad_high if isinstance(high, Tensor) else None


def _cut(stack: Tensor, half: Tensor, reach: Tensor) -> Ends:
    """Centre of the ball, and the ends of the intersection of its own box with the box."""
    center, middle = stack[0], stack[-1]
    return center, torch.maximum(middle - half, center - reach), torch.minimum(middle + half, center + reach)


def _grad_ends(grad_stack: Tensor, grad_half: Tensor) -> Ends:
    """From gradients of centre, middle and half-width to those of centre, lower and upper end."""
    grad_center, grad_middle = grad_stack.unbind(0)
    return grad_center, (grad_middle - grad_half) * 0.5, (grad_middle + grad_half) * 0.5


def _cut_backward(grads: Ends, stack: Tensor, half: Tensor, reach: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """From gradients of centre and ends of the intersection to those of stack, half and reach."""
    center, middle = stack[0], stack[-1]
    grad_center, grad_lower, grad_upper = grads
    ball_lower = grad_lower * (center - reach > middle - half)
    ball_upper = grad_upper * (center + reach < middle + half)
    box_lower, box_upper = grad_lower - ball_lower, grad_upper - ball_upper
    grad_center, grad_middle = grad_center + ball_lower + ball_upper, box_lower + box_upper
    grad_stack = torch.stack([grad_center, grad_middle]) if len(stack) > 1 else (grad_center + grad_middle).unsqueeze(0)
    return grad_stack, box_upper - box_lower, (ball_upper - ball_lower).sum_to_size(len(half), *reach.shape[1:])


def clipped(x: Tensor, low: Threshold, high: Threshold, pairs: bool) -> Tensor:
    """What the activation makes of x."""
    if not pairs:
        return _clip(x, low, high)
    a, b = x.unbind(-2)
    return _join(_at_most(torch.maximum(a, b), high), _at_least(torch.minimum(a, b), low))


def clipped_backward(
    grad: Tensor, x: Tensor, low: Threshold, high: Threshold, pairs: bool, learns: bool
) -> tuple[Tensor | None, ...]:
    """Gradients of x, and of low and high before their sum over the images; None: a number, or nothing `learns`."""
    if not pairs:
        over = grad * (x >= high) if learns and isinstance(high, Tensor) else None
        return grad * ((x > low) & (x < high)), None, over
    grad_a, grad_b, *at_thresholds = _pairs_backward(*x.unbind(-2), *grad.unbind(-2), low, high)
    return _join(grad_a, grad_b), *(at_thresholds if learns else (None, None))


def _pairs_backward(
    a: Tensor, b: Tensor, grad_larger: Tensor, grad_smaller: Tensor, low: Threshold, high: Threshold
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the two of each pair, and of low and high before their sum over the images."""
    # Few booleans and no torch.where: uncompiled, on a CPU, these take 4 to 20 times as long as a sum.
    larger, smaller = grad_larger * (torch.maximum(a, b) < high), grad_smaller * (torch.minimum(a, b) > low)
    crossed = (larger - smaller) * (a >= b)
    return smaller + crossed, larger - crossed, grad_smaller - smaller, grad_larger - larger


def _clip(x: Tensor, low: Threshold, high: Threshold) -> Tensor:
    return _at_most(_at_least(x, low), high)


def _at_least(x: Tensor, low: Threshold) -> Tensor:
    return torch.maximum(x, low) if isinstance(low, Tensor) else x.clamp(min=low)


def _at_most(x: Tensor, high: Threshold) -> Tensor:
    return torch.minimum(x, high) if isinstance(high, Tensor) else x.clamp(max=high)


def _halves(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The first halves of the channels of all tensors, then the second ones."""
    return zip(*(x.unbind(-2) for x in tensors))


def _join(first: Tensor, second: Tensor) -> Tensor:
    return torch.stack([first, second], dim=-2)
