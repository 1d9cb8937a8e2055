"""Singular vectors kept between the epochs."""

import pytest
import torch
from torch import nn

from locallip.training.vectors import StoredVectors

SHAPES = {0: torch.Size([2, 3, 3]), "7": torch.Size([5])}


@pytest.fixture
def stored():
    return StoredVectors(10, SHAPES, torch.device("cpu"))


def unit_vectors(count):
    return {position: nn.functional.normalize(torch.randn(count, *shape)) for position, shape in SHAPES.items()}


def test_what_was_written_is_read_in_half_precision(stored):
    indices, vectors = torch.tensor([7, 0, 3]), unit_vectors(3)
    stored.write(indices, vectors)
    read = stored.read(indices.flip(0))
    assert read.keys() == SHAPES.keys()
    for position, vector in vectors.items():
        assert read[position].dtype == torch.float32
        torch.testing.assert_close(read[position].flip(0), vector, rtol=0, atol=2e-3)


def test_other_images_keep_their_vectors(stored):
    others = torch.tensor([1, 2, 4, 5, 6, 8, 9])
    before = stored.read(others)
    stored.write(torch.tensor([7, 0, 3]), unit_vectors(3))
    after = stored.read(others)
    assert all(torch.equal(before[position], after[position]) for position in SHAPES)


def test_reading_changes_nothing(stored):
    indices = torch.arange(10)
    for vector in stored.read(indices).values():
        vector.zero_()
    first, second = stored.read(indices), stored.read(indices)
    assert all(torch.equal(first[position], second[position]) and first[position].any() for position in SHAPES)


def test_start_vectors_have_a_length_near_one(stored):
    for vector in stored.read(torch.arange(10)).values():
        lengths = vector.flatten(1).norm(dim=1)
        assert ((lengths > 0.3) & (lengths < 3)).all()


def test_no_entry_starts_at_zero_even_if_it_was_masked_out(stored):
    indices = torch.arange(10)
    stored.write(indices, {position: torch.zeros(10, *shape) for position, shape in SHAPES.items()})
    assert all(vector.all() for vector in stored.read(indices).values())


def test_bytes_are_two_for_every_entry(stored):
    assert stored.bytes == 10 * (18 + 5) * 2


def test_the_seed_decides_the_stored_start():
    device, index = torch.device("cpu"), torch.tensor([0])
    first, same, other = (StoredVectors(1, SHAPES, device, seed).read(index)[0] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
