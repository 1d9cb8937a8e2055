"""One singular vector per training image and layer, kept between the epochs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from locallip import devices, distributed
from locallip.bound.operators import Position
from locallip.files import InputError, first_line, write_atomically


class StoredVectors:
    """One singular vector per training image and layer, which warm-start the power iteration of the image's next visit.

    Kept in half precision: a start vector needs no more. They lie on `device` if they take at most half of its free
    memory, else in host memory.

    Args:
        images: number of images.
        shapes: shape of one image's vector, by position.
        device: where the vectors are used.
        seed: of the start vectors.
        host_memory: bytes that they may take in host memory; None: any number.

    Raises:
        MemoryError: if that is too little.
    """

    def __init__(
        self,
        images: int,
        shapes: Mapping[Position, torch.Size],
        device: torch.device,
        seed: int = 0,
        host_memory: int | None = None,
    ):
        self.bytes = 2 * images * sum(shape.numel() for shape in shapes.values())
        self._used_on = device
        self.device = device if self._fits(device) else torch.device("cpu")
        if self.device.type == "cpu" and host_memory is not None and self.bytes > host_memory:
            raise MemoryError(f"they take {self.bytes / 1e9:,.1f} GB, and {host_memory / 1e9:,.1f} GB are free")
        generator = torch.Generator().manual_seed(seed)
        self._vectors = {}
        for position, shape in shapes.items():
            vector = torch.randn(1, *shape, generator=generator) / shape.numel() ** 0.5
            # In the order in which training convolves; what is read and written is each image's as a whole anyway.
            order = torch.channels_last if len(shape) == 3 else torch.contiguous_format
            room = torch.empty(images, *shape, dtype=torch.half, device=self.device, memory_format=order)
            self._vectors[position] = room.copy_(vector)

    def _fits(self, device: torch.device) -> bool:
        return device.type != "cuda" or self.bytes <= torch.cuda.mem_get_info(device)[0] / 2

    def read(self, indices: Tensor) -> dict[Position, Tensor]:
        """Start vectors (B, *shape) in float32 of the images at `indices`, by position."""
        rows = indices.to(self.device)
        read = {p: vectors[rows].to(self._used_on).float() for p, vectors in self._vectors.items()}
        # A little of everything: a part of the layer that was masked out at the last visit may have come back since.
        return {p: vectors + 1e-3 / vectors[0].numel() ** 0.5 for p, vectors in read.items()}

    def write(self, indices: Tensor, vectors: Mapping[Position, Tensor]) -> None:
        """Keep what the iteration has come to for the images at `indices`."""
        rows = indices.to(self.device)
        for position, kept in self._vectors.items():
            kept[rows] = vectors[position].to(self.device, torch.half)

    def save(self, path: Path, epoch: int) -> None:
        """Write all vectors to a file, as they are after an epoch.

        Raises:
            InputError: if it cannot be written.
        """
        kept = {"epoch": epoch, "vectors": self._vectors}
        write_atomically(path, lambda temporary: torch.save(kept, temporary))

    def load(self, path: Path) -> int:
        """Take all vectors from a file; returns the epoch after which they were written.

        Raises:
            InputError: if it is damaged, or was written for other images or layers.
        """
        way_out = "remove it, and the first epoch finds the vectors anew"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            epoch, kept = content["epoch"], content["vectors"]
            found = {position: vectors.shape for position, vectors in kept.items()}
        except Exception as error:  # the unpickler fails in many ways on foreign bytes
            raise InputError(f"{path} is no file of singular vectors ({first_line(error)}); {way_out}") from None
        if found != {position: vectors.shape for position, vectors in self._vectors.items()}:
            raise InputError(f"{path} is of other images or layers; {way_out}")
        for position, vectors in kept.items():
            self._vectors[position].copy_(vectors)
        return epoch


def make_room(images: int, shapes: Mapping[Position, torch.Size], device: torch.device, seed: int) -> StoredVectors:
    """Vectors for so many images in each of the processes that share this machine, see `StoredVectors`.

    Raises:
        InputError: if memory does not suffice for them.
    """
    memory = devices.available_memory()
    share = None if memory is None else memory // distributed.processes_here()
    try:
        return StoredVectors(images, shapes, device, seed, share)
    except (RuntimeError, MemoryError) as error:
        raise InputError(
            f"no room for the singular vectors of {images} training images in each process: {first_line(error)}; "
            f"local norms at fewer layers (--indices) or more machines would help"
        ) from None
