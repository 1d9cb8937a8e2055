"""Lanczos iteration: the largest eigenvalue from below, and how far below it can be, with what probability.

Kuczyński and Woźniakowski (SIAM J. Matrix Anal. Appl. 13, 1992) bound, for any spectrum, the probability that the
estimate is below by more than a given factor: P[estimate of ||M||^2 <= (1 - t) ||M||^2] <= 1.648 sqrt(n)
exp(-sqrt(t) (2k - 1)) after k steps in n dimensions, from a start vector drawn uniformly from the sphere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Steps after which it is checked who has enough.
_CHECKS = (4, 8, 16, 32)
# What a share of a tiny probability may have underflowed from.
_LEAST = 5e-324


def inflation(dimension: Tensor, steps: int, probability: float) -> Tensor:
    """Factor by which the estimate of a norm has to grow, (N,); infinite where so few steps prove nothing."""
    root = torch.log(1.648 * dimension.clamp(min=1).sqrt() / probability) / (2 * steps - 1)
    return torch.where(root < 1, (1 - root.clamp(max=1) ** 2).rsqrt(), torch.inf)


def steps_for(dimension: int, probability: float, factor: float) -> int:
    """After how many steps the estimate of a norm need grow by no more than a factor above 1, see `inflation`."""
    chance = math.log(1.648) + math.log(dimension) / 2 - math.log(max(probability, _LEAST))
    return max(1, math.ceil((chance / math.sqrt(1 - factor**-2) + 1) / 2))


def largest_ritz_value(
    gram: Callable[[Tensor, Tensor], Tensor],
    draw: Callable[[], Tensor],
    steps: int,
    enough: Tensor | None = None,
) -> Tensor:
    """Lanczos with full re-orthogonalisation: the largest eigenvalue (N,) that `steps` products show.

    gram: multiplies vectors (M, n), given the places (M,) among the N of those that they are for.
    draw: gives random vectors (N, n). The first starts the iteration; further ones carry on where a space is exhausted,
    since what the start vector has no part in may have been lost to rounding.
    enough: (N,) eigenvalues from which on nobody needs to know more; what is given for those is what had been shown
    when they were looked at. None: all is shown.
    """
    vector, _ = _normalized(draw())
    count, size = vector.shape
    steps = min(steps, size)
    places = torch.arange(count, device=vector.device)
    result = vector.new_zeros(count)
    basis = vector.new_zeros(count, steps, size)
    diagonal, beside = vector.new_zeros(count, steps), vector.new_zeros(count, steps)
    for step in range(steps):
        basis[:, step] = vector
        image = gram(vector, places)
        diagonal[:, step] = (vector * image).sum(dim=1)
        vector, length = _normalized(_orthogonal(image, basis[:, : step + 1]))
        exhausted = length <= 1e-12 * diagonal.abs().amax(dim=1)
        beside[:, step] = torch.where(exhausted, 0, length)
        if exhausted.any():
            fresh, rest = _normalized(_orthogonal(_normalized(draw()[places])[0], basis[:, : step + 1]))
            # In a space with no direction left, what is left of a vector is rounding.
            fresh = torch.where((rest > 1e-8)[:, None], fresh, 0)
            vector = torch.where(exhausted[:, None], fresh, vector)
        is_last = step + 1 == steps
        if not (is_last or (enough is not None and step + 1 in _CHECKS)):
            continue
        result[places] = _largest_eigenvalue(diagonal[:, : step + 1], beside[:, :step])
        if is_last:
            break
        going_on = (~(result[places] >= enough[places])).nonzero().squeeze(1)
        if not len(going_on):
            break
        if len(going_on) < len(places):
            places, vector = places[going_on], vector[going_on]
            diagonal, beside = diagonal[going_on], beside[going_on]
            basis[: len(going_on), : step + 1] = basis[going_on, : step + 1]
            basis = basis[: len(going_on)]
    return result


def _largest_eigenvalue(diagonal: Tensor, beside: Tensor) -> Tensor:
    """Of symmetric tridiagonal matrices: (N,)."""
    return torch.linalg.eigvalsh(diagonal.diag_embed() + beside.diag_embed(1) + beside.diag_embed(-1))[:, -1]


def _orthogonal(x: Tensor, basis: Tensor) -> Tensor:
    """What is left of x beside an orthonormal basis, by Gram-Schmidt, twice. x: (N, n), basis: (N, k, n)."""
    left = x[:, None]  # (N, 1, n): as products of matrices both run along the basis, two to five times as fast
    for _ in range(2):
        left = torch.baddbmm(left, torch.bmm(left, basis.transpose(1, 2)), basis, alpha=-1)
    return left[:, 0]


def _normalized(x: Tensor) -> tuple[Tensor, Tensor]:
    length = x.norm(dim=1)
    return x * torch.where(length > 0, 1 / length, 0)[:, None], length
