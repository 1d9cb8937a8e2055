"""Tiny ImageNet from the files of its official archive, decoded once into one file that every later start maps.

The folder `tiny-imagenet-200` holds `train/WNID/images/*.JPEG` and the validation images, either as the archive has
them (`val/images/*.JPEG`, labels in `val/val_annotations.txt`) or sorted into class folders (`val/WNID/...`). Labels
are positions in the sorted list of the training set's wnids, for both. A part of the set, with fewer classes, loads
too. What file managers, archivers and notebooks leave in folders, hidden or by a known name, is no data.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from locallip.files import InputError, first_line, write_atomically

FOLDER = "tiny-imagenet-200"
SHAPE = (3, 64, 64)
HINT = "`bash run_job.sh tinyimagenet-data` fetches and unpacks the archive"
# Folders beside the data that are not hidden: of archives from macOS, and of Synology's file server.
_NO_DATA = {"__MACOSX", "@eaDir"}
# Changes with the layout of the cache, so that one of another layout is rebuilt.
_LAYOUT = 1
_HEADER_BYTES = 4096
_LABEL_TYPE = np.dtype("<i2")
_IMAGES_AT_A_TIME = 1024


def load(data_dir: Path, train: bool) -> tuple[np.ndarray, np.ndarray]:
    """The training or the validation set of the archive unpacked below `data_dir`.

    Returns uint8 pixels (N, 3, 64, 64), mapped from the cache copy-on-write, and labels (N,).

    Raises:
        InputError: if files are missing or damaged, or the cache cannot be written.
    """
    folder = data_dir / FOLDER
    listing = _List.of(folder)
    cache = _Cache(data_dir / f"{FOLDER}.cache", listing)
    found = cache.read(train)
    if found is None:
        cache.build()
        found = cache.read(train)
    if found is None:
        raise InputError(f"{cache.path} does not hold what was written to it; is the disk sound?")
    return found


def wnids(data_dir: Path) -> list[str]:
    """The names of the classes, in the order of the labels.

    Raises:
        InputError: if there are none, one has no images, or `wnids.txt` lists others than `train` has folders for.
    """
    folder = data_dir / FOLDER
    names = sorted(entry.name for entry in _entries(folder / "train") if entry.is_dir())
    if not names:
        raise InputError(f"no Tiny ImageNet in {folder}; {HINT}")
    listed = _listed(folder / "wnids.txt")
    if listed is not None and listed != names:
        raise InputError(
            f"{folder} is incomplete: wnids.txt lists {len(listed)} classes, train has {len(names)}; "
            f"{', '.join(sorted({*listed} ^ {*names})[:5]) or 'one of them'} is not in both, or is listed twice"
        )
    full = {name for name in names if any(_image_entries(folder / "train" / name))}
    if not full:
        raise InputError(f"no training images below {folder / 'train'}; {HINT}")
    _refuse_empty_classes(names, full, folder / "train")
    return names


def count_classes(data_dir: Path) -> int:
    """The number of classes that are there.

    Raises:
        InputError: as `wnids` does.
    """
    return len(wnids(data_dir))


def _listed(path: Path) -> list[str] | None:
    """The classes that a list names, sorted; None where there is no list."""
    try:
        return sorted(_text(path).split())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}; {HINT}") from None


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8-sig")  # editors of Windows put a byte-order mark in front


def _refuse_empty_classes(names: Iterable[str], full: Collection[str], folder: Path) -> None:
    empty = [name for name in names if name not in full]
    if empty:
        more = f" (nor have {len(empty) - 1} others)" if len(empty) > 1 else ""
        raise InputError(f"class {empty[0]} has no images in {folder}{more}; {HINT}")


@dataclass
class _List:
    """The image files of both sets with their labels: pairs (path, label)."""

    train: list[tuple[Path, int]]
    val: list[tuple[Path, int]]
    classes: int

    @classmethod
    def of(cls, folder: Path) -> _List:
        names = wnids(folder.parent)
        labels = {name: label for label, name in enumerate(names)}
        train = [(path, labels[name]) for name in names for path in _images(folder / "train" / name)]
        return cls(train, _validation_images(folder / "val", labels), len(names))

    def of_set(self, train: bool) -> list[tuple[Path, int]]:
        return self.train if train else self.val

    def fingerprint(self) -> str:
        """Changes when a file is added, removed or replaced, or a label changes."""
        digest = hashlib.sha256()
        for path, label in [*self.train, *self.val]:
            try:
                status = path.stat()
            except OSError as error:
                raise InputError(f"cannot read {path}: {first_line(error)}; {HINT}") from None
            digest.update(f"{path.parent.parent.name}/{path.name} {label} ".encode())
            digest.update(f"{status.st_size} {status.st_mtime_ns}\n".encode())
        return digest.hexdigest()


def _validation_images(folder: Path, labels: dict[str, int]) -> list[tuple[Path, int]]:
    flat = {entry.name: Path(entry.path) for entry in _entries(folder / "images") if _is_image(entry)}
    official = bool(flat)
    if official:
        listed = _annotations(folder / "val_annotations.txt")
    else:
        sorted_in = [(entry.name, path) for entry in _entries(folder) for path in _images(Path(entry.path))]
        flat = {path.name: path for _, path in sorted_in}
        listed = _once([(path.name, name) for name, path in sorted_in], folder)
    unknown = sorted(set(listed.values()) - labels.keys())
    if unknown:
        raise InputError(f"{folder} has images of class {unknown[0]}, which the training set has not")
    if flat.keys() != listed.keys():
        name = min(flat.keys() ^ listed.keys())
        where = "not there" if name in listed else "not in val_annotations.txt"
        raise InputError(f"{folder} is incomplete: {name} is {where}")
    if not flat:
        raise InputError(f"no validation images below {folder}; {HINT}")
    if not official:
        _refuse_empty_classes(labels, set(listed.values()), folder)
    return [(flat[name], labels[listed[name]]) for name in sorted(flat, key=_number)]


def _number(name: str) -> tuple[int, str]:
    """Sorts val_10.JPEG behind val_9.JPEG, which is the same order in both layouts."""
    return int("".join(filter(str.isdigit, name)) or 0), name


def _annotations(path: Path) -> dict[str, str]:
    """The wnid of every validation image."""
    try:
        rows = [line.split("\t")[:2] for line in _text(path).splitlines() if line.strip()]
        return _once(rows, path)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}; {HINT}") from None


def _once(images: list[tuple[str, str]], source: Path) -> dict[str, str]:
    """Pairs (image, wnid) as a mapping, if no image has two classes."""
    classes: dict[str, str] = {}
    for image, wnid in images:
        if classes.setdefault(image, wnid) != wnid:
            raise InputError(f"{source} has {image} in two classes, {classes[image]} and {wnid}")
    return classes


def _images(folder: Path) -> list[Path]:
    """The images in a class folder, or in its folder `images`, sorted."""
    return sorted((Path(entry.path) for entry in _image_entries(folder)), key=lambda path: _number(path.name))


def _image_entries(folder: Path) -> Iterator[os.DirEntry]:
    return filter(_is_image, chain(_entries(folder), _entries(folder / "images")))


def _entries(folder: Path) -> Iterator[os.DirEntry]:
    """What lies in a folder that may be data; nothing where there is none."""
    try:
        with os.scandir(folder) as entries:
            data = [entry for entry in entries if not entry.name.startswith(".") and entry.name not in _NO_DATA]
            yield from sorted(data, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise InputError(f"cannot read {folder}: {first_line(error)}") from None


def _is_image(entry: os.DirEntry) -> bool:
    return entry.name.lower().endswith((".jpeg", ".jpg"))


def _decode(path: Path) -> np.ndarray:
    """(3, 64, 64) uint8; a grey image becomes one of three equal channels."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB")).transpose(2, 0, 1)
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError(f"cannot read {path}: {first_line(error)}; {HINT}") from None
    if pixels.shape != SHAPE:
        raise InputError(f"{path} has {pixels.shape[2]}x{pixels.shape[1]} pixels, not {SHAPE[2]}x{SHAPE[1]}")
    return pixels


class _Cache:
    """One file: a header in JSON, then pixels and labels of the training set, then those of the validation set.

    The header knows which image files it was made from and the checksums of both sets.
    """

    def __init__(self, path: Path, listing: _List):
        self.path, self.listing = path, listing
        self._source = listing.fingerprint()

    def read(self, train: bool) -> tuple[np.ndarray, np.ndarray] | None:
        """Pixels and labels of one set, or None where the file is absent, damaged, or was made from other images."""
        try:
            with open(self.path, "rb") as file:
                header = json.loads(file.read(_HEADER_BYTES))
            stored = np.memmap(self.path, np.uint8, mode="c")
            begin, end = self._range(train)
            usable = (header["layout"], header["source"]) == (_LAYOUT, self._source) and len(stored) == self._size()
            if not usable or zlib.crc32(stored[begin:end]) != header["crc32"][self._name(train)]:
                return None
        except (OSError, ValueError, KeyError, TypeError):
            return None
        return self._parts(stored, train)

    def build(self) -> None:
        images = len(self.listing.train) + len(self.listing.val)
        tqdm.write(f"decoding {images} images into {self.path}, once")
        write_atomically(self.path, self._write)

    def _write(self, path: Path) -> None:
        # Written, not mapped: on a full disk a write raises an error, a mapped page kills the process.
        with open(path, "wb") as file, ThreadPoolExecutor() as pool:
            file.seek(_HEADER_BYTES)
            checksums = {}
            for train in (True, False):
                checksum = 0
                for block in self._blocks(train, pool):
                    file.write(block)
                    checksum = zlib.crc32(block, checksum)
                checksums[self._name(train)] = checksum
            header = {"layout": _LAYOUT, "source": self._source, "crc32": checksums}
            file.seek(0)
            file.write(json.dumps(header).encode().ljust(_HEADER_BYTES))

    def _blocks(self, train: bool, pool: ThreadPoolExecutor) -> Iterator[bytes]:
        """The bytes of a set: its pixels, then its labels."""
        files = self.listing.of_set(train)
        for begin in range(0, len(files), _IMAGES_AT_A_TIME):
            paths = [path for path, _ in files[begin : begin + _IMAGES_AT_A_TIME]]
            yield b"".join(pixels.tobytes() for pixels in pool.map(_decode, paths))
        yield np.array([label for _, label in files], _LABEL_TYPE).tobytes()

    def _parts(self, stored: np.ndarray, train: bool) -> tuple[np.ndarray, np.ndarray]:
        begin, end = self._range(train)
        count = len(self.listing.of_set(train))
        middle = end - count * _LABEL_TYPE.itemsize
        return stored[begin:middle].reshape(count, *SHAPE), stored[middle:end].view(_LABEL_TYPE)

    def _range(self, train: bool) -> tuple[int, int]:
        """Where the bytes of a set begin and end."""
        image = int(np.prod(SHAPE)) + _LABEL_TYPE.itemsize
        middle = _HEADER_BYTES + image * len(self.listing.train)
        return (_HEADER_BYTES, middle) if train else (middle, middle + image * len(self.listing.val))

    def _size(self) -> int:
        return self._range(train=False)[1]

    @staticmethod
    def _name(train: bool) -> str:
        return "train" if train else "val"
