"""Images as uint8 tensors that live on the device, and batches of them as floats in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from locallip.files import InputError

Augmentation: TypeAlias = Callable[[Tensor, "torch.Generator | None"], Tensor]


@dataclass
class ImageSet:
    """Images and labels on one device.

    Attributes:
        images: (N, C, H, W) uint8.
        labels: (N,) int64.
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, indices: slice | Tensor) -> ImageSet:
        return ImageSet(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device))

    def batches(
        self,
        batch_size: int,
        generator: torch.Generator | None = None,
        augment: Augmentation | None = None,
        count: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches (x, y, indices): x (B, C, H, W) float32 in [0, 1], y (B,), indices (B,) into this set.

        In order without a `generator`; shuffled by it (a CPU generator) otherwise. The last batch may be smaller.

        augment: what changes the images (B, C, H, W) uint8 of a batch, given `generator` too, such as crop_and_flip.
        count: of the batches; by default as few as need be.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        sizes = batch_sizes(len(self), batch_size, count)
        for indices in order.to(self.labels.device).split(sizes):
            images = self.images[indices]
            if augment:
                images = augment(images, generator)
            yield channels_last(images.float() / 255), self.labels[indices], indices


def batch_sizes(images: int, batch_size: int, count: int | None = None) -> list[int]:
    """Sizes of `count` batches (by default as few as need be) of so many images: full ones first, none empty.

    Only where `count` is too small do batches exceed `batch_size`: the last one, by what is left.
    """
    count = -(-images // batch_size) if count is None else count
    sizes = []
    for later in reversed(range(count)):
        left = images - sum(sizes)
        sizes.append(min(batch_size, left - later) if later else left)
    return sizes


def channels_last(images: Tensor) -> Tensor:
    """The images (N, C, H, W) in the memory order in which convolutions are fastest.

    With one channel PyTorch takes any order for this one, and then convolves in the other.
    """
    channels, height, width = images.shape[1:]
    images = images.contiguous(memory_format=torch.channels_last)
    return images.as_strided(images.shape, (channels * height * width, 1, width * channels, channels))


def crop_and_flip(images: Tensor, generator: torch.Generator | None = None, padding: int = 4) -> Tensor:
    """Every image cut at random from itself with a black border, and mirrored left to right half of the time.

    images: (N, C, H, W) on any device. generator: a CPU generator. padding: width of the border in pixels; 0 mirrors
    alone. Returns (N, C, H, W).
    """
    count, channels, height, width = images.shape
    offsets = torch.randint(2 * padding + 1, (2, count, 1), generator=generator).to(images.device)
    mirrored = torch.randint(2, (count, 1), generator=generator, dtype=torch.bool).to(images.device)
    across = torch.arange(width, device=images.device)
    rows = offsets[0] + torch.arange(height, device=images.device)  # (N, H)
    columns = offsets[1] + torch.where(mirrored, across.flip(0), across)  # (N, W)
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[:, None, None]
    padded = F.pad(images, [padding] * 4)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def hold_out(images: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split off `count` images drawn at random; returns what is left, and them.

    Raises:
        InputError: if that leaves nothing.
    """
    if count >= len(images):
        raise InputError(f"holding out {count} leaves none of the {len(images)} training images; hold out fewer")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[count:].sort().values], images[order[:count].sort().values]
