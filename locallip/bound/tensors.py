"""Small tensor arithmetic, image by image, that several parts of the bound share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from locallip.bound.compiled import Compilable


def entries(x: Tensor) -> tuple[int, ...]:
    """All dimensions but the images'; to flatten them would copy what is in channels-last order."""
    return tuple(range(1, x.dim()))


def per_image(values: Tensor, like: Tensor) -> Tensor:
    """(N,) as (N, 1, ...), with as many dimensions as `like`."""
    return values.view(-1, *[1] * (like.dim() - 1))


def norm(x: Tensor) -> Tensor:
    """||x|| of every image, as it comes: (N,)."""
    return x.flatten(1).norm(dim=1)


def masked(x: Tensor, mask: Tensor | None) -> Tensor:
    """x where the mask is set, 0 elsewhere; None: set everywhere."""
    return x if mask is None else torch.where(mask, x, 0)


def unit(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x / ||x|| for every image, zero where ||x|| is zero, and the lengths (N,); x may be overwritten.

    x: (N, ...). mask: of numbers 0 and 1, which x is multiplied by before.
    """
    return _unit_of_rows(x, mask) if x.is_cuda and _unit.compiled else _unit(x, mask, pays=False)


def _unit_of_rows(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """`_unit` compiled once for the shapes of all layers; what is in channels-last order is not copied."""
    if x.dim() < 3:
        return _unit(x, mask, pays=True)
    rows = (None if t is None else t.movedim(1, -1).flatten(1) for t in (x, mask))
    vectors, length = _unit(*rows, pays=True)
    return vectors.unflatten(1, (*x.shape[2:], x.shape[1])).movedim(-1, 1), length


@Compilable
def _unit(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x if mask is None else x.mul_(mask)
    length = lengths(x)
    # Where the length is 0 every entry is, and any factor does.
    factor = length.clamp(min=torch.finfo(length.dtype).tiny).reciprocal()
    return x.mul_(per_image(factor, x)), length


def lengths(x: Tensor) -> Tensor:
    """||x|| of every image, in float32 at least: (N,). What is not finite is NaN: as a norm it certifies nothing."""
    length = torch.linalg.vector_norm(x, dim=entries(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return infinite_to_nan(length)


def infinite_to_nan(x: Tensor) -> Tensor:
    """x, and NaN where it is not finite."""
    return torch.add(x, x, alpha=0)  # infinity + 0 infinity, in one kernel


def reciprocal(length: Tensor) -> Tensor:
    """1 / length, and 0 where that is 0."""
    return torch.where(length == 0, 0, 1 / length)


class ForEveryImage(torch.autograd.Function):
    """row (1, ...) times scale (N, 1, ...): (N, ...).

    The gradient of row is summed over the images by a product of matrices, on a CPU much faster than a sum over the
    first dimension of a product.
    """

    @staticmethod
    def forward(ctx, row, scale):  # noqa: ANN001, ANN205
        ctx.save_for_backward(row, scale)
        return row * scale

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: ANN001, ANN205
        row, scale = ctx.saved_tensors
        grad_row = None
        if ctx.needs_input_grad[0]:
            by_pixel = grad.movedim(1, -1)  # without a copy in channels-last order
            grad_row = (scale.view(1, -1) @ by_pixel.flatten(1)).view(1, *by_pixel.shape[1:]).movedim(-1, 1)
        return grad_row, (grad * row).sum(entries(grad), keepdim=True) if ctx.needs_input_grad[1] else None


def underflows(product: Tensor, *factors: Tensor) -> Tensor:
    """Where a product is too small a number for its dtype though no factor is 0: bool.

    A denormal number keeps a few digits, without which half precision would be lost at ordinary scales. Where denormals
    are flushed, products and this limit are 0.
    """
    info = torch.finfo(product.dtype)
    lost = product.abs() <= 64 * info.eps * info.tiny
    for factor in factors:
        lost = lost & (factor != 0)
    return lost


def underflow_to_nan(product: Tensor, *factors: Tensor) -> Tensor:
    """The product of factors, or NaN where it underflows."""
    return torch.where(underflows(product, *factors), torch.nan, product)


def same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors agree in shape and in every entry, a NaN being the same as another."""
    # Two passes over memory less where there is no NaN.
    return torch.equal(x, y) or (x.shape == y.shape and bool(((x == y) | (x.isnan() & y.isnan())).all()))


def eliminating(rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """For which images (N,) a mask switches anything off; at least one is not None."""
    masks = [mask for mask in (rows, columns) if mask is not None]
    # As bytes: on a CPU `all` takes ten times as long as a minimum.
    return torch.stack([mask.view(torch.uint8).amin(dim=entries(mask)) == 0 for mask in masks]).any(dim=0)
