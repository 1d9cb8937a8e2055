import gzip
import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from data_load import DATA_SETS, count_classes, load_data
from locallip.files import InputError


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


@pytest.mark.parametrize("name", ["letters", "", "MNIST"])
def test_unknown_names_are_refused(name):
    with pytest.raises(InputError, match="unknown data"):
        load_data(name, "unused", train=True)


def test_data_in_the_home_folder_is_found(mnist_by_hand, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    with pytest.raises(InputError, match=f"files in {tmp_path} are damaged"):
        load_data("mnist", f"~/{tmp_path.name}", train=False)


def test_data_below_no_home_folder_is_refused():
    for ask in (load_data, count_classes):
        with pytest.raises(InputError, match="no home folder '~nobody-of-that-name'"):
            ask("tinyimagenet", "~nobody-of-that-name", **({"train": True} if ask is load_data else {}))


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
    with pytest.raises(InputError, match=r"cannot read.*delete what is incomplete there"):
        load_data("mnist", tmp_path, train=False)


@pytest.mark.parametrize(("data", "folder"), [("mnist", "MNIST"), ("cifar10", "cifar-10-batches-py")])
@pytest.mark.parametrize("below", ["", "typed/wrong"])
def test_a_folder_without_the_data_is_left_as_it_was(data, folder, below, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network:")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    said = rf"\(.*[^:]\); without a network, .* the folder that holds {folder}/ with --data_dir"
    with pytest.raises(InputError, match=said):
        load_data(data, tmp_path / below, train=False)
    assert list(tmp_path.iterdir()) == []


def test_mnist_passes_when_its_content_has_the_known_md5(mnist_by_hand, tmp_path, monkeypatch):
    images, labels = np.zeros((10, 28, 28), np.uint8), np.arange(10, dtype=np.uint8)
    known = tuple(hashlib.md5(array.tobytes()).hexdigest() for array in (images, labels))
    monkeypatch.setitem(DATA_SETS, "mnist", replace(DATA_SETS["mnist"], fingerprints={False: known}))
    assert load_data("mnist", tmp_path, train=False).labels.tolist() == list(range(10))


def test_digits_of_other_images_are_refused_as_damaged(tmp_path, monkeypatch):
    monkeypatch.setitem(DATA_SETS, "digits", replace(DATA_SETS["digits"], folder=tmp_path))
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((10, 28, 28)))))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.arange(10))))
    with pytest.raises(InputError, match="damaged"):
        load_data("digits", "unused", train=False)
