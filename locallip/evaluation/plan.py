"""How a set of images is cut into batches, and which random numbers belong to each.

A batch is known by its place in the whole set. Its random numbers depend on that and on the seed alone, so that neither
a restart nor the number of processes changes what is found.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from locallip.evaluation.outcome import MULTIPLES


@dataclass(frozen=True)
class Plan:
    """The batches of a set; its length is their number.

    Attributes:
        images: in the set.
        batch_size: images in every batch but the last, which may be smaller.
        curve_images: the first so many, in whole batches, are asked about at all radii.
    """

    images: int
    batch_size: int
    curve_images: int = 0

    @classmethod
    def of(cls, args: argparse.Namespace, images: int) -> Plan:
        """The plan for so many images that the flags ask for."""
        return cls(images, args.test_batch_size, args.curve_images if args.out else 0)

    def __len__(self) -> int:
        return -(-self.images // self.batch_size)

    def span(self, place: int) -> slice:
        """Where the images of a batch stand in the set."""
        return slice(place * self.batch_size, (place + 1) * self.batch_size)

    def size(self, place: int) -> int:
        """Number of images of a batch."""
        return len(range(self.images)[self.span(place)])

    def has_curve(self, place: int) -> bool:
        """Whether a batch is asked about at all radii."""
        return place * self.batch_size < self.curve_images

    def questions(self) -> int:
        """How many times a certificate is asked about an image at a radius, at most."""
        in_curve = sum(self.size(place) for place in range(len(self)) if self.has_curve(place))
        return self.images + 2 * len(MULTIPLES) * in_curve  # the curves of the product and of all stages


def seed_of(seed: int, place: int) -> int:
    """The seed of what is random in a batch, below 2**63."""
    return int(np.random.SeedSequence(seed, spawn_key=(place,)).generate_state(1, np.uint64)[0] >> np.uint64(1))
