import pytest
import torch

from locallip.files import InputError
from locallip.images import ImageSet, hold_out


@pytest.fixture
def ten_images():
    """Image number i is filled with 25 i and has the label i."""
    return ImageSet((25 * torch.arange(10)).to(torch.uint8)[:, None, None, None].expand(10, 1, 2, 2), torch.arange(10))


@pytest.mark.parametrize("seed", [None, 0])
@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (10, [10]), (99, [10])])
def test_batches_cover_every_image_once(ten_images, batch_size, sizes, seed):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    batches = list(ten_images.batches(batch_size, generator))
    assert [len(y) for _, y, _ in batches] == sizes
    assert sorted(torch.cat([y for _, y, _ in batches]).tolist()) == list(range(10))


def test_batches_are_floats_in_the_unit_range_with_their_labels_and_indices(ten_images):
    for x, y, indices in ten_images.batches(4, torch.Generator().manual_seed(1)):
        assert x.dtype == torch.float32
        assert torch.equal(x, (25 * indices / 255)[:, None, None, None].expand(-1, 1, 2, 2))
        assert torch.equal(y, ten_images.labels[indices])


def test_white_is_one_and_black_is_zero():
    (x, _, _), *_ = ImageSet(torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1), torch.zeros(2)).batches(2)
    assert x.flatten().tolist() == [0, 1]


def test_batches_come_in_order_without_a_generator(ten_images):
    assert torch.cat([indices for *_, indices in ten_images.batches(3)]).tolist() == list(range(10))


def test_the_generator_alone_decides_the_order(digits):
    def order(seed, global_seed):
        torch.manual_seed(global_seed)
        generator = torch.Generator().manual_seed(seed)
        return torch.cat([indices for *_, indices in digits[False].batches(100, generator)])

    assert torch.equal(order(1, 1), order(1, 2))
    assert not torch.equal(order(1, 1), order(2, 1))


def test_every_epoch_has_another_order(ten_images):
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.cat([i for *_, i in ten_images.batches(4, generator)]) for _ in range(2))
    assert not torch.equal(first, second)


def test_an_image_set_can_be_cut(ten_images):
    assert ten_images[2:5].labels.tolist() == [2, 3, 4]
    assert len(ten_images[torch.tensor([7, 1])]) == 2


def test_hold_out_parts_the_set_in_two(ten_images):
    kept, held_out = hold_out(ten_images, 3, seed=0)
    assert (len(kept), len(held_out)) == (7, 3)
    assert sorted([*kept.labels.tolist(), *held_out.labels.tolist()]) == list(range(10))
    for part in (kept, held_out):
        assert torch.equal(part.images[:, 0, 0, 0], 25 * part.labels)


def test_hold_out_depends_on_the_seed_only(digits):
    first, again, other = (hold_out(digits[False], 100, seed)[1].images for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [10, 11])
def test_hold_out_refuses_to_leave_nothing(ten_images, count):
    with pytest.raises(InputError, match="leaves none"):
        hold_out(ten_images, count, seed=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_lie_in_the_order_in_which_convolutions_are_fastest(channels):
    images = ImageSet(torch.randint(256, (5, channels, 6, 7), dtype=torch.uint8), torch.arange(5))
    x, _, _ = next(images.batches(4))
    assert torch.equal(x, images.images[:4].float() / 255)
    # With one channel every order has these strides but one; only this one makes convolutions keep it.
    assert x.stride() == (channels * 6 * 7, 1, 7 * channels, channels)
    weight = torch.randn(8, channels, 3, 3)
    assert torch.nn.functional.conv2d(x, weight).is_contiguous(memory_format=torch.channels_last)
