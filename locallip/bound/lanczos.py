"""Lanczos iteration: the largest eigenvalue from below, and how far below it can be, with what probability.

Kuczyński and Woźniakowski (SIAM J. Matrix Anal. Appl. 13, 1992) bound, for any spectrum, the probability that the
estimate is below by more than a given factor: P[estimate of ||M||^2 <= (1 - t) ||M||^2] <= 1.648 sqrt(n)
exp(-sqrt(t) (2k - 1)) after k steps in n dimensions, from a start vector drawn uniformly from the sphere.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def inflation(dimension: Tensor, steps: int, probability: float) -> Tensor:
    """Factor by which the estimate of a norm has to grow, (N,); infinite where so few steps prove nothing."""
    root = torch.log(1.648 * dimension.clamp(min=1).sqrt() / probability) / (2 * steps - 1)
    return torch.where(root < 1, (1 - root.clamp(max=1) ** 2).rsqrt(), torch.inf)


def largest_ritz_value(gram: Callable[[Tensor], Tensor], draw: Callable[[], Tensor], steps: int) -> Tensor:
    """Lanczos with full re-orthogonalisation: the largest eigenvalue (N,) that `steps` products show.

    draw: gives random vectors (N, n). The first starts the iteration; further ones carry on where a space is exhausted,
    since what the start vector has no part in may have been lost to rounding.
    """
    vector, _ = _normalized(draw())
    count, size = vector.shape
    steps = min(steps, size)
    basis = vector.new_zeros(count, steps, size)
    diagonal, beside = vector.new_zeros(count, steps), vector.new_zeros(count, steps)
    for step in range(steps):
        basis[:, step] = vector
        image = gram(vector)
        diagonal[:, step] = (vector * image).sum(dim=1)
        vector, length = _normalized(_orthogonal(image, basis[:, : step + 1]))
        exhausted = length <= 1e-12 * diagonal.abs().amax(dim=1)
        beside[:, step] = torch.where(exhausted, 0, length)
        if exhausted.any():
            fresh, left = _normalized(_orthogonal(_normalized(draw())[0], basis[:, : step + 1]))
            # In a space with no direction left, what is left of a vector is rounding.
            fresh = torch.where((left > 1e-8)[:, None], fresh, 0)
            vector = torch.where(exhausted[:, None], fresh, vector)
    tridiagonal = diagonal.diag_embed() + beside[:, :-1].diag_embed(1) + beside[:, :-1].diag_embed(-1)
    return torch.linalg.eigvalsh(tridiagonal)[:, -1]


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """What is left of x beside an orthonormal basis, by Gram-Schmidt, twice. x: (N, n), basis: (N, k, n)."""
    left = x[:, None]  # (N, 1, n): as products of matrices both run along the basis, two to five times as fast
    for _ in range(2):
        left = torch.baddbmm(left, torch.bmm(left, basis.transpose(1, 2)), basis, alpha=-1)
    return left[:, 0]


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    length = x.norm(dim=1)
    return x * torch.where(length > 0, 1 / length, 0)[:, None], length
