"""A bound on the norm of a zero-padded convolution without chance: the circular one on a torus that it is a part of."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from locallip.bound.operators import Conv


def torus_norm(operator: Conv) -> Tensor:
    """At least the norm of a zero-padded convolution, a scalar, but for what rounding takes away.

    On a torus of side input + reach of the kernel or more, the convolution wraps around without touching itself, so the
    zero-padded one is a part of it: some of its rows and columns. Fourier transform makes the circular convolution
    block-diagonal, with one (C_out, C_in) block per frequency; a stride of s adds up the frequencies that it cannot
    tell apart, which makes the blocks (C_out, C_in s^2). The bound is the largest singular value of all blocks.
    """
    sides = [
        -(-(size + d * (k - 1)) // s) * s
        for size, k, d, s in zip(
            operator.input_shape[1:], operator.weight.shape[2:], operator.dilation, operator.stride
        )
    ]
    (height, width), (down, right) = sides, operator.stride
    kernel = operator.weight.new_zeros(*operator.weight.shape[:2], height, width)
    rows = torch.arange(operator.weight.shape[2], device=kernel.device) * operator.dilation[0]
    columns = torch.arange(operator.weight.shape[3], device=kernel.device) * operator.dilation[1]
    kernel[:, :, rows[:, None], columns] = operator.weight
    spectrum = torch.fft.fft2(kernel) / math.sqrt(down * right)
    outputs, inputs = len(kernel) // operator.groups, kernel.shape[1]
    blocks = spectrum.view(operator.groups, outputs, inputs, down, height // down, right, width // right)
    blocks = blocks.permute(4, 6, 0, 1, 2, 3, 5).flatten(4)  # (frequency, frequency, group, C_out, C_in s^2)
    gram = blocks @ blocks.mH if outputs <= blocks.shape[4] else blocks.mH @ blocks
    return torch.linalg.eigvalsh(gram)[..., -1].amax().clamp(min=0).sqrt()
