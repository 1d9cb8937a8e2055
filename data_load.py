"""Data sets by name, one record each, read as uint8 tensors.

MNIST, CIFAR-10 and the digits are read whole (MNIST takes 47 MB) and their pixels and labels are checked against a
known md5, whether the files were downloaded, shipped or copied by hand; Tiny ImageNet is mapped from a cache (see
`locallip.tiny_imagenet`). A further data set is a further record in `DATA_SETS`, with a function that reads it.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from locallip import tiny_imagenet
from locallip.dependencies import torchvision_datasets
from locallip.files import InputError, expand_home, first_line
from locallip.images import ImageSet


@dataclass(frozen=True)
class DataSet:
    """All there is to know about a data set.

    Attributes:
        recipe: the published data set whose networks and training script it takes, which may be itself.
        shape: of an image, (C, H, W).
        classes: number of them.
        epsilon: radius of the published evaluation, pixel space.
        training_images: number of them.
        read: given the folder of all data sets and whether it is about training, returns pixels (N, C, H, W), as uint8,
            and labels (N,); downloads what is absent where it can.
        augmented: whether training crops and mirrors its images; a mirrored or shifted digit is no better a digit.
        fingerprints: by whether it is about training, the md5 of pixels and labels; None: `read` checks by itself.
        folder: where its files are, if not in the folder of all data sets.
        count_classes: given that folder, counts the classes where only a part of them may be there; None: never.
    """

    recipe: str
    shape: tuple[int, int, int]
    classes: int
    epsilon: float
    training_images: int
    read: Callable[[Path, bool], tuple[np.ndarray, np.ndarray]]
    augmented: bool = False
    fingerprints: dict[bool, tuple[str, str]] | None = None
    folder: Path | None = None
    count_classes: Callable[[Path], int] | None = None


def load_data(data: str, data_dir: str | Path, train: bool) -> ImageSet:
    """Load a data set by name, on the CPU.

    data: `mnist` or `cifar10` (read, or downloaded, by torchvision below `data_dir`), `digits` (shipped with the
        repository) or `tinyimagenet` (unpacked below `data_dir`; its validation set serves as test set).

    Raises:
        InputError: if it is unknown, cannot be had, or is damaged.
    """
    record = _record(data)
    folder = record.folder or Path(expand_home(data_dir))
    images, labels = record.read(folder, train)
    if record.fingerprints is not None:
        found = tuple(hashlib.md5(array.tobytes()).hexdigest() for array in (images, labels))
        if found != record.fingerprints[train]:
            raise InputError(f"the {data} files in {folder} are damaged (wrong md5); delete them and fetch them again")
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels).long())


def count_classes(data: str, data_dir: str | Path) -> int:
    """Count the classes of a data set; of Tiny ImageNet, of which parts are in use too, what is there.

    Raises:
        InputError: if it is unknown or not there.
    """
    record = _record(data)
    return record.classes if record.count_classes is None else record.count_classes(Path(expand_home(data_dir)))


def _record(data: str) -> DataSet:
    if data not in DATA_SETS:
        raise InputError(f"unknown data '{data}'; choose from {', '.join(DATA_SETS)}")
    return DATA_SETS[data]


def _read_digits(folder: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    prefix = "train" if train else "t10k"
    images = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")
    return images[:, None], _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")


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
    mnist = _from_torchvision("MNIST", "MNIST", data_dir, train, "MNIST/raw")
    return mnist.data.numpy()[:, None], mnist.targets.numpy().astype(np.uint8)


def _from_torchvision(kind: str, name: str, data_dir: Path, train: bool, below: str) -> Any:
    """The data set of this class. below: where its files lie in `data_dir`; folders made for them do not stay empty."""
    data_set = getattr(torchvision_datasets(), kind)
    made = [folder for folder in (data_dir / below, *(data_dir / below).parents) if not folder.exists()]
    try:
        return data_set(data_dir, train=train, download=True)
    except (OSError, RuntimeError, ValueError, AssertionError, TypeError, KeyError, EOFError) as error:
        for folder in made:
            with contextlib.suppress(OSError):  # not empty, or never made
                folder.rmdir()
        damaged = "" if data_dir / below in made else "delete what is incomplete there; "
        raise InputError(
            f"cannot read or download {name} below {data_dir} ({first_line(error).rstrip(':')}); {damaged}"
            f"without a network, put torchvision's files for it there, or name the folder that holds "
            f"{Path(below).parts[0]}/ with --data_dir"
        ) from None


def _read_cifar10(data_dir: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    cifar = _from_torchvision("CIFAR10", "CIFAR-10", data_dir, train, "cifar-10-batches-py")
    return np.ascontiguousarray(cifar.data.transpose(0, 3, 1, 2)), np.array(cifar.targets, dtype=np.uint8)


DATA_SETS = {
    "mnist": DataSet(
        recipe="mnist",
        shape=(1, 28, 28),
        classes=10,
        epsilon=1.58,
        training_images=60_000,
        read=_read_mnist,
        fingerprints={
            True: ("6510e85a72c3e9475c492d559d3770d2", "e86ee40d66677c011a9abda399ec8c4d"),
            False: ("240610fa99e73bfa49df8e7fc24d3206", "073c3904dfbd3e141ff8aa01cfde6b15"),
        },
    ),
    "digits": DataSet(
        recipe="mnist",
        shape=(1, 28, 28),
        classes=10,
        epsilon=1.58,
        training_images=6_000,
        read=_read_digits,
        fingerprints={
            True: ("10b4fcd9bad0de9d27af358a73feadec", "7dc8a8db1ef897f901ebfc7da7de9514"),
            False: ("191569c3f3903696ecb37f8df7fc6a81", "f8a3d21f400aa73985cb5c2ee250224b"),
        },
        folder=Path(__file__).resolve().parent / "digits",
    ),
    "cifar10": DataSet(
        recipe="cifar10",
        shape=(3, 32, 32),
        classes=10,
        epsilon=36 / 255,
        training_images=50_000,
        read=_read_cifar10,
        augmented=True,
        fingerprints={
            True: ("11af95666bd6fd7846144e768325bf13", "69c5f3349be54915edfca558b72ad888"),
            False: ("f1aa22116df97725db0e47461c45a82b", "251f18ce75337ae9ca5d0dbd7ea62cf4"),
        },
    ),
    "tinyimagenet": DataSet(
        recipe="tinyimagenet",
        shape=tiny_imagenet.SHAPE,
        classes=200,
        epsilon=36 / 255,
        training_images=100_000,
        read=tiny_imagenet.load,
        augmented=True,
        count_classes=tiny_imagenet.count_classes,
    ),
}
