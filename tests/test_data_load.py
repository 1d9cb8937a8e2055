import gzip
import hashlib

import numpy as np
import pytest
import torch

import data_load
from data_load import ImageSet, hold_out, load_data
from utils import InputError


@pytest.mark.parametrize(("train", "per_class"), [(True, 600), (False, 100)])
def test_digits_are_balanced_uint8_images(digits, train, per_class):
    images, labels = digits[train].images, digits[train].labels
    assert images.shape == (10 * per_class, 1, 28, 28)
    assert images.dtype == torch.uint8
    assert (images.min(), images.max()) == (0, 255)
    assert labels.dtype == torch.int64
    assert labels.bincount().tolist() == [per_class] * 10


def test_digits_for_training_and_for_testing_share_no_image(digits):
    def fingerprints(train):
        return {hashlib.md5(image.numpy().tobytes()).hexdigest() for image in digits[train].images}

    assert fingerprints(True).isdisjoint(fingerprints(False))


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


@pytest.mark.parametrize("name", ["letters", "", "MNIST"])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError, match="unknown data"):
        load_data(name, "unused", train=True)


# --- files that are not what they should be


def idx(array):
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def mnist_by_hand(tmp_path):
    """Where torchvision looks for MNIST: well-formed files of ten black images per set."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for prefix in ("train", "t10k"):
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(idx(np.zeros((10, 28, 28))))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(10)))
    return raw


@pytest.mark.parametrize("train", [True, False])
def test_an_mnist_of_other_images_is_refused_as_damaged(mnist_by_hand, tmp_path, train):
    with pytest.raises(InputError, match="damaged"):
        load_data("mnist", tmp_path, train)


def test_a_truncated_mnist_is_refused(mnist_by_hand, tmp_path):
    images = mnist_by_hand / "t10k-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot read"):
        load_data("mnist", tmp_path, train=False)


def test_mnist_passes_when_its_content_has_the_known_md5(mnist_by_hand, tmp_path, monkeypatch):
    images, labels = np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8)
    known = tuple(hashlib.md5(array.tobytes()).hexdigest() for array in (images, labels))
    monkeypatch.setitem(data_load._FINGERPRINTS, ("mnist", False), known)
    assert load_data("mnist", tmp_path, train=False).labels.tolist() == list(range(10))


def test_digits_of_other_images_are_refused_as_damaged(tmp_path, monkeypatch):
    monkeypatch.setattr(data_load, "DIGITS_DIR", tmp_path)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((10, 28, 28)))))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(10))))
    with pytest.raises(InputError, match="damaged"):
        load_data("digits", "unused", train=False)


@pytest.mark.parametrize("channels", [1, 3])
def test_batches_lie_in_the_order_in_which_convolutions_are_fastest(channels):
    images = ImageSet(torch.randint(256, (5, channels, 6, 7), dtype=torch.uint8), torch.arange(5))
    x, _, _ = next(images.batches(4))
    assert torch.equal(x, images.images[:4].float() / 255)
    # With one channel every order has these strides but one; only this one makes convolutions keep it.
    assert x.stride() == (channels * 6 * 7, 1, 7 * channels, channels)
    weight = torch.randn(8, channels, 3, 3)
    assert torch.nn.functional.conv2d(x, weight).is_contiguous(memory_format=torch.channels_last)
