"""How far a run over images has come: a bar on a terminal, a line a minute in a log."""

from __future__ import annotations

import sys
import threading
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
        in_lines = bar.disable and not quiet
        # The first images can take many minutes, with every radius of the curve.
        first = threading.Timer(_SECONDS_BETWEEN_LINES, _say, [f"{done} of {images} images, and more under way"])
        first.daemon = True

        def advance(more: int, **counts: int) -> None:
            nonlocal done, said
            first.cancel()
            done += more
            bar.update(more)
            bar.set_postfix(counts)
            if in_lines and time.monotonic() >= said + _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                _say(f"{done} of {images} images: " + ", ".join(f"{count} {name}" for name, count in counts.items()))

        try:
            if in_lines:
                first.start()
            yield advance
        finally:
            first.cancel()


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
