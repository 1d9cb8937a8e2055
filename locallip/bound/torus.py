"""A bound on the norm of a zero-padded convolution without chance: the circular one on a torus that it is a part of."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from locallip.bound.operators import Conv


def torus_norm(operator: Conv) -> Tensor:
    """At least the norm of a zero-padded convolution, a scalar, but for what rounding takes away.

    On a torus of side input + reach of the kernel or more, the convolution wraps around without touching itself, so the
    zero-padded one is a part of it: some of its rows and columns. Fourier transform makes the circular convolution
    block-diagonal, with one (C_out, C_in) block per frequency; a stride of s adds up the frequencies that it cannot
    tell apart, which makes the blocks (C_out, C_in s^2). The bound is the largest singular value of all blocks.
    """
    weight, stride = operator.weight, operator.stride
    reach = [d * (k - 1) for d, k in zip(operator.dilation, weight.shape[2:])]
    sides = [-(-(size + r) // s) * s for size, r, s in zip(operator.input_shape[1:], reach, stride)]
    kernel = weight.new_zeros(*weight.shape[:2], *sides)
    kernel[(..., *(slice(None, r + 1, d) for r, d in zip(reach, operator.dilation)))] = weight
    axes = tuple(range(2, weight.dim()))
    spectrum = torch.fft.fftn(kernel, dim=axes) / math.sqrt(math.prod(stride))
    outputs, inputs = len(kernel) // operator.groups, kernel.shape[1]
    by_alias = [part for side, s in zip(sides, stride) for part in (s, side // s)]
    blocks = spectrum.view(operator.groups, outputs, inputs, *by_alias)
    aliases, frequencies = ([3 + offset + 2 * axis for axis in range(len(axes))] for offset in (0, 1))
    # (frequencies, group, C_out, C_in s^2)
    blocks = blocks.permute(*frequencies, 0, 1, 2, *aliases).flatten(len(axes) + 2)
    gram = blocks @ blocks.mH if outputs <= blocks.shape[-1] else blocks.mH @ blocks
    return torch.linalg.eigvalsh(gram)[..., -1].amax().clamp(min=0).sqrt()
