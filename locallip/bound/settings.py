"""Settings of layers: one number for every axis of the images."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral

Setting = int | Sequence[int]


def per_axis(setting: Setting, axes: int) -> tuple[int, ...]:
    """A setting of a convolution or of pooling for each axis, as PyTorch takes it: one number stands for all.

    Raises:
        TypeError: if it is neither one whole number nor one for each axis.
    """
    numbers = (setting,) if isinstance(setting, Integral) else setting
    numbers = tuple(numbers) if isinstance(numbers, Sequence) else ()
    if len(numbers) not in (1, axes) or not all(isinstance(number, Integral) for number in numbers):
        raise TypeError(f"needs one whole number, or one for each of {axes} axes, got {setting!r}")
    return tuple(map(int, numbers)) * (axes if len(numbers) == 1 else 1)
