"""How far a run over images has come: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 60


@contextmanager
def progress(images: int, done: int = 0, quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show on stderr how many images are done; yields a function to call with how many more, and counts by name.

    done: how many are from the start. quiet: show nothing.
    """
    said = time.monotonic()
    with tqdm(total=images, initial=done, unit="image", disable=quiet or None, dynamic_ncols=True) as bar:

        def advance(more: int, **counts: int) -> None:
            nonlocal done, said
            done += more
            bar.update(more)
            bar.set_postfix(counts)
            is_due = time.monotonic() >= said + _SECONDS_BETWEEN_LINES
            if is_due and bar.disable and not quiet:
                said = time.monotonic()
                found = ", ".join(f"{count} {name}" for name, count in counts.items())
                print(f"{done} of {images} images: {found}", file=sys.stderr, flush=True)

        yield advance
