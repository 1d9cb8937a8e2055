"""The precision of products, whatever the process has set."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def own_precision(device: torch.device) -> Iterator[None]:
    """Compute in the precision that tensors have: autocast and lower precision of float32 products are off meanwhile.

    A GPU's TF32 is left as it is, since PyTorch's two ways of setting it exclude each other. It can lead the search of
    the dual elsewhere; what a search finds is proven in float64.
    """
    backend = torch.backends.mkldnn
    kinds, inherited = (backend.matmul, backend.conv), backend.fp32_precision
    before = [kind.fp32_precision for kind in kinds]
    for kind in kinds:
        kind.fp32_precision = "ieee"
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for kind, precision in zip(kinds, before):
            kind.fp32_precision = "none" if precision == inherited else precision
