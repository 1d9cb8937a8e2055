"""Whole norms that outlive a call: one image at a time would spend nearly all of its time on measuring them anew.

A norm is kept under what makes the operator: its type, shapes and geometry, and a SHA-256 of its weight. A weight that
changes, by whatever way, is another key, and the network itself is not held.

What is kept of a norm that was drawn (see `lanczos`) is what the iteration reached, not the upper end: that is made
anew for the failure probability of every call. The draw is one, and for each probability p it fails with probability p
at most. So the statement of every call holds as it stands, and calls that share a network share its one chance.
"""

from __future__ import annotations

import hashlib
import secrets
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from locallip.bound.lanczos import inflation
from locallip.bound.norms import Bracket
from locallip.bound.operators import LinearOperator

# Some hundred bytes each.
_MOST = 10_000


@dataclass(frozen=True)
class Measured:
    """A whole norm and how it was found, as numbers, which are the same on every device.

    Attributes:
        lower: the norm is no smaller.
        reached: what Lanczos reached, rounded up; nothing more may have been missed than `lanczos.inflation` says.
        sure: the norm is no larger, without chance.
        absolute: || |W| || is no larger, without chance.
        dimension, steps: of the Lanczos iteration; 0 steps: nothing was drawn, and `sure` is the upper end.
    """

    lower: float
    reached: float
    sure: float
    absolute: float
    dimension: int = 0
    steps: int = 0

    def bracket(self, probability: float, like: Tensor) -> Bracket:
        """Both ends as scalars like a tensor; the upper one fails with at most this probability."""
        upper = self.sure
        if self.steps:
            dimension = torch.tensor([float(self.dimension)], dtype=torch.float64, device="cpu")
            upper = min(upper, self.reached * inflation(dimension, self.steps, probability).item())
        return Bracket(scalar(self.lower, like), scalar(upper, like))


def scalar(value: float, like: Tensor) -> Tensor:
    """A number as a tensor of the dtype and on the device of another."""
    return torch.full((), value, dtype=like.dtype, device=like.device)


class KeptNorms:
    """Norms by what makes their operators, the least recently used of more than 10,000 given up.

    Attributes:
        generator: of the start vectors, seeded by the operating system.
    """

    def __init__(self) -> None:
        self.generator = np.random.default_rng(secrets.randbits(128))
        self._known: OrderedDict[Hashable, Measured] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def clear(self) -> None:
        """Forget all norms."""
        self._known.clear()

    def find(self, key: Hashable) -> Measured | None:
        """What is known under a key of `key_of`."""
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def keep(self, key: Hashable, measured: Measured) -> None:
        """Remember a norm, once it is measured to the end."""
        self._known[key] = measured
        if len(self._known) > _MOST:
            self._known.popitem(last=False)


# Of all calls of this process.
KEPT = KeptNorms()


def key_of(operator: LinearOperator, whole_steps: int) -> Hashable | None:
    """What makes an operator, and how its norm is measured; None where the weight may not be all that there is."""
    kind = type(operator)
    if not vars(kind).get("told_by_weight", False):
        return None
    weight = operator.weight.detach().cpu().contiguous()
    digest = hashlib.sha256(weight.numpy()).digest()
    shapes = tuple(operator.input_shape), tuple(operator.output_shape), tuple(weight.shape)
    return kind, shapes, operator.geometry(), digest, whole_steps
