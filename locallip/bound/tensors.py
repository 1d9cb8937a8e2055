"""Small tensor arithmetic, image by image, that several parts of the bound share."""

from __future__ import annotations

import torch
from torch import Tensor


def entries(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the images'; to flatten them would copy what is in channels-last order."""
    return tuple(range(1, x.dim()))


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ...), with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def unit(x: Tensor) -> tuple[Tensor, Tensor]:
    """x / ||x|| for every image, zero where ||x|| is zero, and the lengths (N,). x: (N, ...).

    A length that is not finite is NaN: as a norm it certifies nothing.
    """
    length = torch.linalg.vector_norm(x, dim=entries(x))
    length = torch.where(length.isinf(), torch.nan, length)
    return x * per_image(torch.where(length == 0, 0, 1 / length), x), length


def underflow_to_nan(product: Tensor, *factors: Tensor) -> Tensor:
    """The product of factors, or NaN where it is too small a number for its dtype though no factor is 0."""
    lost = product.abs() < torch.finfo(product.dtype).tiny
    for factor in factors:
        lost = lost & (factor != 0)
    return torch.where(lost, torch.nan, product)


def eliminating(rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """For which images (N,) a mask switches anything off; at least one is not None."""
    masks = [mask for mask in (rows, columns) if mask is not None]
    return torch.stack([~mask.all(dim=entries(mask)) for mask in masks]).any(dim=0)
