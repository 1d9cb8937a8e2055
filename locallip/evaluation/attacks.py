"""Attacks on certificates: descent on the margin in the whole ball, and ascent on the slope.

Whatever an attack finds counts only after `is_inside` has looked at it in float64. No slope ||h(x') - h(x)|| /
||x' - x|| of the last hidden layer h inside a ball can be above a true Lipschitz bound, and no margin there below a
certified one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from locallip.bound.tensors import per_image

ATTACK_STEPS = 50
# A hair inside the ball, so that rounding does not lead out of it.
_INSIDE = 1 - 1e-6

Clip = tuple[float, float] | None


def right(logits: Tensor, y: Tensor) -> Tensor:
    """(N,) bool: the label has the largest logit, and none is NaN."""
    return (logits.argmax(dim=1) == y) & ~logits.isnan().any(dim=1)


def margins(logits: Tensor, y: Tensor) -> Tensor:
    """By how much the label's logit exceeds each: (N, K), inf at the label. logits: (N, K). y: (N,)."""
    label = y[:, None]
    return (logits.gather(1, label) - logits).scatter(1, label, torch.inf)


def descend(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    epsilon: Tensor,
    start: Tensor | None = None,
    other: Tensor | None = None,
    steps: int = ATTACK_STEPS,
    clip: Clip = None,
) -> Tensor:
    """Look for the smallest margin in the ball: the step (N, ...) from x to the lowest point met, the start included.

    Moves along the normalised gradient and back into the ball; moves get shorter from twice the radius to 0.

    Args:
        model: of the precision of x.
        x: (N, ...) images. y: (N,) labels. epsilon: (N,) L2 radius.
        start: (N, ...) steps from x, brought into the ball first; None: x itself.
        other: (N,) the wrong classes to go for; None: at every point the one that is nearest there.
        clip: smallest and largest value of a valid image, if points are bound to them.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Tensors of inference mode have no gradients.
        x, y, epsilon, other = (None if tensor is None else tensor.clone() for tensor in (x, y, epsilon, other))
        step = inside(x, torch.zeros_like(x) if start is None else start.to(x.dtype).clone(), epsilon, clip)
        best, lowest = step, torch.full_like(epsilon, torch.inf)
        for number in range(steps + 1):
            step = step.detach().requires_grad_()
            found = margins(model(x + step), y)
            margin = found.amin(dim=1) if other is None else found.gather(1, other[:, None]).squeeze(1)
            lower = margin.detach() < lowest
            best = torch.where(per_image(lower, x), step.detach(), best)
            lowest = torch.where(lower, margin.detach(), lowest)
            if number < steps:
                gradient = _gradient(margin, step)
                if gradient is None:
                    break
                length = 2 * epsilon * (1 - number / steps) ** 1.5
                step = inside(x, step.detach() - _unit(gradient) * per_image(length, x), epsilon, clip)
        return best


def inside(x: Tensor, step: Tensor, epsilon: Tensor, clip: Clip = None) -> Tensor:
    """The step (N, ...) from x cut to valid images, and then to the ball."""
    if clip is not None:
        step = (x + step).clamp(*clip) - x
    length = step.flatten(1).norm(dim=1).clamp(min=torch.finfo(step.dtype).tiny)
    return step * per_image((epsilon * _INSIDE / length).clamp(max=1), step)


def is_inside(x: Tensor, point: Tensor, epsilon: Tensor, clip: Clip = None) -> Tensor:
    """Whether points (N, ...) lie in the balls around x, and are valid: (N,) bool, computed in float64."""
    near = (point.double() - x.double()).flatten(1).norm(dim=1) <= epsilon
    return near if clip is None else near & ((point >= clip[0]) & (point <= clip[1])).flatten(1).all(dim=1)


def random_steps(x: Tensor, epsilon: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Steps (N, ...) to random points of the ball: a random direction, a random share of the radius."""
    device = x.device if generator is None else generator.device
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
    share = torch.rand(len(x), generator=generator, dtype=x.dtype, device=device).to(x.device)
    return _unit(direction) * per_image(share * epsilon, x)


def attack_slopes(hidden: nn.Sequential, x: Tensor, epsilon: float, steps: int, clip: Clip = None) -> Tensor:
    """The steepest slope from x that gradient ascent finds inside the ball: (N,). hidden, x: float64."""
    center, radius = hidden(x), torch.full_like(x.flatten(1)[:, 0], epsilon)
    step = inside(x, _unit(torch.randn_like(x)) * (epsilon / 2), radius, clip)
    steepest = x.new_zeros(len(x))
    for _ in range(steps):
        step = step.detach().requires_grad_()
        slope = (hidden(x + step) - center).norm(dim=1) / step.flatten(1).norm(dim=1)
        (gradient,) = torch.autograd.grad(slope.sum(), step)
        steepest = torch.maximum(steepest, slope.detach().nan_to_num())
        step = inside(x, step.detach() + _unit(gradient) * (epsilon / 5), radius, clip)
    return steepest


def _gradient(margin: Tensor, step: Tensor) -> Tensor | None:
    """None: the network hides it (no_grad, detach)."""
    if not margin.requires_grad:
        return None
    return torch.autograd.grad(margin.sum(), step, allow_unused=True)[0]


def _unit(direction: Tensor) -> Tensor:
    """Directions (N, ...) of length 1; 0 stays 0."""
    # By the largest entry first, whose square is a number whatever the scale of the network.
    largest = direction.flatten(1).abs().amax(dim=1)
    direction = direction / per_image(torch.where(largest > 0, largest, 1), direction)
    return direction / per_image(direction.flatten(1).norm(dim=1).clamp(min=1), direction)
