"""Many images a few at a time: as many as fit into memory, with a bar on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from locallip.bound.graph import Graph

# Bytes that the walk may take at a time, beside the network; Lanczos vectors and worst cases have bounds of their own.
_MEMORY = 2**28
# Tensors as large as all activations of an image that a proof holds at its peak (measured: 20 to 40).
_COPIES = 40
_BYTES = 8

Found = TypeVar("Found")


def images_at_a_time(graph: Graph, x: Tensor) -> int:
    """How many images a call takes at a time. x: (N, ...) images, of which only the shape counts."""
    outputs = sum(operator.output_shape.numel() for operator in graph.operators(x))
    return fitting(x.shape[1:].numel() + outputs + graph.classes, _COPIES)


def fitting(entries: int, copies: int) -> int:
    """How many times so many float64 entries fit into memory in so many copies; at least once."""
    return max(1, _MEMORY // (_BYTES * copies * max(1, entries)))


def in_pieces(
    ask: Callable[[Tensor], Found], images: int, at_a_time: int, device: torch.device, progress: bool = False
) -> list[Found]:
    """What `ask` answers for the indices of some images after others.

    Raises:
        ImportError: for a bar without tqdm, before anything is asked.
    """
    found = []
    with _bar(images, progress) as show:
        for part in torch.arange(images, device=device).split(at_a_time):
            found.append(ask(part))
            show(len(part))
    return found


@contextmanager
def _bar(images: int, progress: bool) -> Iterator[Callable[[int], object]]:
    """A bar over so many images, by what moves it on; where nothing is shown, that does nothing."""
    if not progress:
        yield lambda images: None
        return
    with new_bar(images, unit="image") as bar:
        yield bar.update


def new_bar(images: int, **looks: str) -> Any:
    """A tqdm bar over so many images.

    Raises:
        ImportError: without tqdm.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        raise ImportError("progress=True needs tqdm (pip install tqdm)") from None
    return tqdm(total=images, dynamic_ncols=True, **looks)
