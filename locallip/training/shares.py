"""How the processes of a run share an epoch: as many steps for each, and every image counts alike."""

from __future__ import annotations

import math

from locallip.files import InputError
from locallip.images import batch_sizes


def count_batches(images: list[int], batch_size: int) -> int:
    """Steps of an epoch, the same for all processes, whose numbers of images these are: none goes without an image.

    Raises:
        InputError: if a process has no image.
    """
    if min(images) == 0:
        raise InputError(f"{len(images)} processes are more than there are training images, {sum(images)}")
    return min(math.ceil(max(images) / batch_size), min(images))


def loss_weights(images: list[int], batch_size: int, batches: int) -> list[list[float]]:
    """By process and batch: what makes the mean over the processes of their mean losses the mean over the images."""
    sizes = [batch_sizes(count, batch_size, batches) for count in images]
    together = [sum(column) for column in zip(*sizes)]
    return [[len(images) * size / whole for size, whole in zip(row, together)] for row in sizes]
