"""The term of the input: the largest a . d + nu/2 ||d - c||^2 over the steps d that an attacker may take.

For the whole ball it is known. For valid images, steps in a box besides, it is bounded for every lam >= 0 by

    lam/2 epsilon^2 + nu/2 ||c||^2 + sum over the pixels of max over the box of (a - nu c) d + (nu - lam)/2 d^2,

which is convex in lam, with slope (epsilon^2 - ||d||^2) / 2 for the maximising d.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from locallip.bound.dual.maxima import clamp
from locallip.bound.tensors import norm, per_image


@dataclass
class InputTerm:
    """The term of the input for P questions.

    Attributes:
        value: (P,) an upper bound on the term.
        step: (P, ...) where it is about as large.
        size: (P,) sum of absolute values that bound every intermediate result.
    """

    value: Tensor
    step: Tensor
    size: Tensor


def in_ball(a: Tensor, c: Tensor, nu: Tensor, epsilon: Tensor) -> InputTerm:
    """The term over all steps no longer than epsilon. a, c: (P, ...); nu, epsilon: (P,)."""
    pull = a - per_image(nu, a) * c
    length = norm(pull)
    fixed = nu / 2 * (epsilon**2 + norm(c) ** 2)
    step = pull * per_image(torch.where(length > 0, epsilon / length, 0), a)
    size = fixed + epsilon * (norm(a) + nu * norm(c))
    return InputTerm(fixed + epsilon * length, step, size)


def in_box(a: Tensor, c: Tensor, nu: Tensor, epsilon: Tensor, lo: Tensor, hi: Tensor, halvings: int = 60) -> InputTerm:
    """The term over those that also keep lo <= step <= hi, where lo <= 0 <= hi; (P, ...) both."""
    pull = a - per_image(nu, a) * c
    longest = torch.maximum(lo.abs(), hi.abs())
    least, most = torch.zeros_like(nu), nu + norm(pull) / epsilon
    for _ in range(halvings):
        lam = (least + most) / 2
        step, _ = _best_in_box(pull, per_image(nu - lam, a), lo, hi)
        too_long = norm(step) > epsilon
        least, most = torch.where(too_long, lam, least), torch.where(too_long, most, lam)
    step, gain = _best_in_box(pull, per_image(nu - most, a), lo, hi)
    fixed = most / 2 * epsilon**2 + nu / 2 * norm(c) ** 2
    sizes = (a.abs() + per_image(nu, a) * c.abs()) * longest + per_image(nu + most, a) * longest**2
    return InputTerm(fixed + gain.flatten(1).sum(dim=1), step, fixed + sizes.flatten(1).sum(dim=1))


def _best_in_box(pull: Tensor, curvature: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
    """Where pull d + curvature/2 d^2 is largest in the box, and the value there."""
    top = clamp(torch.where(curvature < 0, -pull / curvature, 0), lo, hi)
    step, value = top, top * (pull + curvature / 2 * top)
    for end in (lo, hi):
        at_end = end * (pull + curvature / 2 * end)
        step, value = torch.where(at_end > value, end, step), torch.maximum(value, at_end)
    return step, value
