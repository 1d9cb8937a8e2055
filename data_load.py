"""Data sets as uint8 tensors that live on the device, and batches of them.

MNIST, CIFAR-10 and the digits are read whole (MNIST takes 47 MB) and their pixels and labels are checked against a
known md5, whether the files were downloaded, shipped or copied by hand; Tiny ImageNet is mapped from a cache (see
`tiny_imagenet`). Images become floats in [0, 1] one batch at a time.
"""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import tiny_imagenet
from dependencies import datasets
from utils import CLASSES, InputError, first_line

DIGITS_DIR = Path(__file__).resolve().parent / "digits"

# Data sets that the recipes augment; a mirrored or shifted digit is no better a digit.
AUGMENTED = {"cifar10", "tinyimagenet"}

# md5 of pixels and labels, as uint8 without file headers; pixels as (N, C, H, W).
_FINGERPRINTS = {
    ("mnist", True): ("6510e85a72c3e9475c492d559d3770d2", "e86ee40d66677c011a9abda399ec8c4d"),
    ("mnist", False): ("240610fa99e73bfa49df8e7fc24d3206", "073c3904dfbd3e141ff8aa01cfde6b15"),
    ("cifar10", True): ("11af95666bd6fd7846144e768325bf13", "69c5f3349be54915edfca558b72ad888"),
    ("cifar10", False): ("f1aa22116df97725db0e47461c45a82b", "251f18ce75337ae9ca5d0dbd7ea62cf4"),
    ("digits", True): ("10b4fcd9bad0de9d27af358a73feadec", "7dc8a8db1ef897f901ebfc7da7de9514"),
    ("digits", False): ("191569c3f3903696ecb37f8df7fc6a81", "f8a3d21f400aa73985cb5c2ee250224b"),
}


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
        augment: bool = False,
        count: int | None = None,
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Batches (x, y, indices): x (B, C, H, W) float32 in [0, 1], y (B,), indices (B,) into this set.

        In order without a `generator`; shuffled by it (a CPU generator) otherwise. The last batch may be smaller.

        augment: random crop and flip, drawn from `generator` too. count: of the batches; by default as few as need be.
        """
        order = torch.arange(len(self)) if generator is None else torch.randperm(len(self), generator=generator)
        sizes = batch_sizes(len(self), batch_size, count)
        for indices in order.to(self.labels.device).split(sizes):
            images = self.images[indices]
            if augment:
                images = crop_and_flip(images, generator)
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

    images: (N, C, H, W) on any device. generator: a CPU generator. Returns (N, C, H, W).
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


def load_data(data: str, data_dir: str | Path, train: bool) -> ImageSet:
    """A data set by name, on the CPU.

    data: `mnist` or `cifar10` (read, or downloaded, by torchvision below `data_dir`), `digits` (shipped with the
        repository) or `tinyimagenet` (unpacked below `data_dir`; its validation set serves as test set).

    Raises:
        InputError: if it is unknown, cannot be had, or is damaged.
    """
    if data not in _READERS:
        raise InputError(f"unknown data '{data}'; choose from {', '.join(_READERS)}")
    images, labels = _READERS[data](Path(data_dir), train)
    if data == "tinyimagenet":
        return ImageSet(torch.from_numpy(images), torch.from_numpy(labels).long())
    found = tuple(hashlib.md5(array.tobytes()).hexdigest() for array in (images, labels))
    if found != _FINGERPRINTS[data, train]:
        folder = DIGITS_DIR if data == "digits" else Path(data_dir)
        raise InputError(f"the {data} files in {folder} are damaged (wrong md5); delete them and fetch them again")
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels).long())


def count_classes(data: str, data_dir: str | Path) -> int:
    """Number of classes of a data set; of Tiny ImageNet, of which parts are in use too, what is there.

    Raises:
        InputError: if it is unknown or not there.
    """
    if data not in CLASSES:
        raise InputError(f"unknown data '{data}'; choose from {', '.join(CLASSES)}")
    return len(tiny_imagenet.wnids(Path(data_dir))) if data == "tinyimagenet" else CLASSES[data]


def hold_out(images: ImageSet, count: int, seed: int) -> tuple[ImageSet, ImageSet]:
    """Split off `count` images drawn at random; returns what is left, and them.

    Raises:
        InputError: if that leaves nothing.
    """
    if count >= len(images):
        raise InputError(f"--val_split {count} leaves none of the {len(images)} training images")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[count:].sort().values], images[order[:count].sort().values]


def _read_digits(_: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    prefix = "train" if train else "t10k"
    images = _read_idx(DIGITS_DIR / f"{prefix}-images-idx3-ubyte.gz")
    return images[:, None], _read_idx(DIGITS_DIR / f"{prefix}-labels-idx1-ubyte.gz")


def _read_idx(path: Path) -> np.ndarray:
    """A gzipped idx file of bytes: two zero bytes, type 8, number of dimensions, sizes (big-endian), values."""
    try:
        raw = gzip.decompress(path.read_bytes())
        dimensions = raw[3]
        shape = np.frombuffer(raw, ">u4", count=dimensions, offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise InputError(f"cannot read {path}: {error}; restore it with `git checkout {path.parent.name}`") from None


def _read_mnist(data_dir: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    mnist = _from_torchvision(lambda: datasets.MNIST(data_dir, train=train, download=True), "MNIST", data_dir)
    return mnist.data.numpy()[:, None], mnist.targets.numpy().astype(np.uint8)


def _from_torchvision(read: Callable[[], datasets.VisionDataset], name: str, data_dir: Path) -> datasets.VisionDataset:
    try:
        return read()
    except (OSError, RuntimeError, ValueError, AssertionError, TypeError, KeyError, EOFError) as error:
        raise InputError(
            f"cannot read or download {name} below {data_dir} ({first_line(error)}); "
            f"without a network, put torchvision's files for it there, or name their folder with --data_dir"
        ) from None


def _read_cifar10(data_dir: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    cifar = _from_torchvision(lambda: datasets.CIFAR10(data_dir, train=train, download=True), "CIFAR-10", data_dir)
    return np.ascontiguousarray(cifar.data.transpose(0, 3, 1, 2)), np.array(cifar.targets, dtype=np.uint8)


_READERS = {
    "mnist": _read_mnist,
    "digits": _read_digits,
    "cifar10": _read_cifar10,
    "tinyimagenet": tiny_imagenet.load,
}
