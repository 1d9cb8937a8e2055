"""CIFAR-10: architectures, augmentation, data, the published command lines, and the scripts on a few made-up images."""

import hashlib
import json
import os
import pickle
import shlex
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import WIDTH, read_csv
from torch import nn

import evaluate
import train_cifar10
import utils
from data_load import DATA_SETS, load_data
from locallip.bound.layers import ClampGroupSort, ReLU_x
from locallip.checkpoints import save_checkpoint
from locallip.dependencies import torchvision_datasets
from locallip.files import InputError
from locallip.images import ImageSet, crop_and_flip
from locallip.training import run as training_run

MODELS = ("relux", "c6f2_relux", "c6f2_clmaxmin", "c6f2_maxmin", "standrelu")
CLIPPED = ("relux", "c6f2_relux")

# --- architectures


def count(model, *names):
    return sum(value.numel() for key, value in model.state_dict().items() if key.endswith(names))


@pytest.mark.parametrize(
    ("name", "weights", "thresholds"),
    [
        ("relux", 2_466_858, 62_464),
        ("c6f2_relux", 2_250_378, 111_104),
        ("c6f2_clmaxmin", 2_250_378, 111_104),
        ("c6f2_maxmin", 2_250_378, 0),
        ("standrelu", 2_250_378, 0),
    ],
)
def test_nets_have_the_published_number_of_parameters(name, weights, thresholds):
    model = utils.select_model("cifar10", name)
    assert count(model, "weight", "bias") == weights
    assert count(model, "threshold", "min", "max") == thresholds


@pytest.mark.parametrize("name", MODELS)
def test_nets_map_colour_images_to_ten_logits(name):
    model = utils.select_model("cifar10", name, width=WIDTH)
    assert isinstance(model, nn.Sequential)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_6c2f_has_the_published_state_dict_layout():
    state = utils.select_model("cifar10", "c6f2_clmaxmin").state_dict()
    linear, clipped = (0, 2, 4, 6, 8, 10, 13, 15), (1, 3, 5, 7, 9, 11, 14)
    expected = {f"{i}.{name}" for i in linear for name in ("weight", "bias")}
    assert state.keys() == expected | {f"{i}.{name}" for i in clipped for name in ("min", "max")}
    assert state["1.min"].shape == state["1.max"].shape == (1, 16, 32, 32)
    assert state["14.max"].shape == (1, 256)


def test_clipped_maxmin_starts_at_the_published_values_layer_by_layer():
    layers = [layer for layer in utils.select_model("cifar10", "c6f2_clmaxmin") if isinstance(layer, ClampGroupSort)]
    values = [(layer.max.unique().tolist(), layer.min.unique().tolist()) for layer in layers]
    starts = ((0.1, -0.1), (0.1, -0.15), (0.15, -0.15), (0.15, -0.15), (0.2, -0.2), (0.3, -0.3), (1.2, -1.2))
    assert values == [(pytest.approx([high]), pytest.approx([low])) for high, low in starts]


@pytest.mark.parametrize("name", CLIPPED)
def test_init_reaches_every_threshold(name):
    model = utils.select_model("cifar10", name, init=2.5, width=WIDTH)
    thresholds = [layer.threshold for layer in model if isinstance(layer, ReLU_x)]
    assert len(thresholds) == {"relux": 6, "c6f2_relux": 7}[name]
    assert all((threshold == 2.5).all() for threshold in thresholds)


@pytest.mark.parametrize("name", CLIPPED)
def test_the_flag_init_reaches_every_clipped_net(command_line, monkeypatch, name):
    nets = []
    monkeypatch.setattr(training_run, "train", lambda model, *others: nets.append(model))
    monkeypatch.setattr(utils, "load_data", lambda *names, **train: few_images(1, seed=0))
    command_line("--model", name, "--init", 0.75, "--width", WIDTH, "--device", "cpu")
    train_cifar10.main()
    assert all((layer.threshold == 0.75).all() for layer in nets[0] if isinstance(layer, ReLU_x))


@pytest.mark.parametrize("name", ["c6f2_clmaxmin", "c6f2_maxmin"])
@pytest.mark.parametrize("width", [1e-6, 0.03, 0.1, 1 / 3, 0.7, 1.1])
def test_any_width_leaves_maxmin_pairs_of_channels(width, name):
    model = utils.select_model("cifar10", name, width=width)
    sizes = [len(layer.weight) for layer in model[:-1] if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert all(size >= 2 and size % 2 == 0 for size in sizes)
    assert model(torch.rand(1, 3, 32, 32)).shape == (1, 10)


# --- augmentation

PLACES = [(row, column, mirrored) for row in range(9) for column in range(9) for mirrored in (False, True)]


def few_images(number, seed, size=32):
    """Images in which every pixel is noise, so that no two crops look alike."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 256, (number, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(number) % 10)


def crops_of(image):
    """All that augmentation may make of an image: (162, C, H, W), in the order of PLACES."""
    _, height, width = image.shape
    padded = F.pad(image, [4] * 4)
    crops = (padded[:, row : row + height, column : column + width] for row, column, _ in PLACES)
    return torch.stack([crop.flip(2) if mirrored else crop for crop, (*_, mirrored) in zip(crops, PLACES)])


def places(image, augmented):
    """Which of PLACES each of the augmented images (N, C, H, W) is: (N,). All places look different."""
    same = (augmented[:, None] == crops_of(image)).flatten(2).all(dim=2)
    assert (same.sum(dim=1) == 1).all()
    return same.int().argmax(dim=1)


def test_augmented_images_are_crops_of_the_padded_ones_or_their_mirror_images():
    originals = few_images(20, seed=0).images
    augmented = crop_and_flip(originals, torch.Generator().manual_seed(1))
    assert augmented.dtype == torch.uint8
    assert augmented.shape == originals.shape
    found = [places(image, result[None]).item() for image, result in zip(originals, augmented)]
    assert len(set(found)) > 10


def test_every_offset_and_mirror_is_equally_likely():
    # 162 cases, 400 expected of each: chi-square has mean 161 and deviation 18.
    image = few_images(1, seed=0, size=5).images[0]
    draws = 400 * len(PLACES)
    found = crop_and_flip(image.expand(draws, -1, -1, -1), torch.Generator().manual_seed(0))
    counts = torch.cat([places(image, part) for part in found.split(5000)]).bincount(minlength=len(PLACES))
    assert (counts > 0).all()
    assert ((counts - 400) ** 2 / 400).sum() < 161 + 5 * 18


def test_without_padding_images_are_mirrored_alone():
    originals = few_images(20, seed=0).images
    augmented = crop_and_flip(originals, torch.Generator().manual_seed(1), padding=0)
    kept = (augmented == originals).flatten(1).all(dim=1)
    assert torch.equal(augmented[~kept], originals[~kept].flip(3))
    assert 0 < kept.sum() < len(kept)


def test_the_generator_alone_decides_crops_and_flips():
    originals = few_images(20, seed=0).images

    def augmented(seed, global_seed):
        torch.manual_seed(global_seed)
        return crop_and_flip(originals, torch.Generator().manual_seed(seed))

    assert torch.equal(augmented(1, 1), augmented(1, 2))
    assert not torch.equal(augmented(1, 1), augmented(2, 1))


def test_images_need_not_be_square():
    originals = few_images(5, seed=0).images[:, :, :20]
    assert crop_and_flip(originals, torch.Generator().manual_seed(0)).shape == (5, 3, 20, 32)


def test_batches_augment_only_when_asked_and_leave_the_set_as_it_is():
    images = few_images(8, seed=0)
    kept = images.images.clone()
    for augment in (None, crop_and_flip):
        for x, _, indices in images.batches(3, torch.Generator().manual_seed(0), augment):
            assert torch.equal(x, images.images[indices] / 255) == (augment is None)
            assert (x.min() >= 0) & (x.max() <= 1)
    assert torch.equal(images.images, kept)


# --- command lines

TRAINING = {
    "--model relux --sniter 2 --init 2.0 --end_lr 1e-6": {"model": "relux", "loss": "bcp", "init": 2.0},
    "--model c6f2_relux --sniter 2 --init 2.0 --end_lr 1e-6 --prefix 'relu/cifar_6C2F'": {
        "model": "c6f2_relux",
        "loss": "bcp",
        "init": 2.0,
        "prefix": "relu/cifar_6C2F",
    },
    "--model c6f2_relux --sniter 2 --init 2.0 --end_lr 1e-6 --gloro": {"model": "c6f2_relux", "loss": "gloro"},
    "--model c6f2_clmaxmin --sniter 2 --end_lr 1e-6 --prefix 'maxmin/cifar_6C2F_maxmin'": {
        "model": "c6f2_clmaxmin",
        "prefix": "maxmin/cifar_6C2F_maxmin",
    },
}
DEFAULTS = {"data": "cifar10", "epochs": 800, "warmup": 20, "rampup": 400, "epsilon": 36 / 255, "epsilon_train": 0.1551}
DEFAULTS |= {"lr": 1e-3, "end_lr": 1e-6, "lr_scheduler": "exp", "more": 25, "sniter": 2, "opt_iter": 1}
DEFAULTS |= {"batch_size": 256, "seed": 2019, "no_augmentation": False, "val_split": 0, "width": 1.0}


@pytest.mark.parametrize("line", ["", *TRAINING])
def test_the_published_training_lines_parse_with_the_papers_defaults(command_line, monkeypatch, line):
    runs = []
    monkeypatch.setattr(utils, "train", runs.append)
    command_line(*shlex.split(line))
    train_cifar10.main()
    (args,) = map(vars, runs)
    expected = DEFAULTS | TRAINING.get(line, {})
    assert {name: args[name] for name in expected} == expected


EVALUATION = {"relux": "relu/cifar_4C3F", "c6f2_relux": "relu/cifar_6C2F", "c6f2_clmaxmin": "maxmin/cifar_6C2F_maxmin"}


@pytest.mark.parametrize("model", EVALUATION)
def test_the_published_evaluation_lines_parse(command_line, model):
    effort = "--epsilon 0.141 --test_batch_size 256 --test_sniter 2000"
    line = f"--data 'cifar10' --model '{model}' {effort} --saved_model 'pretrained/{EVALUATION[model]}'"
    command_line(*shlex.split(line))
    args = evaluate.arguments()
    assert (args.data, args.model, args.epsilon) == ("cifar10", model, 0.141)
    assert (args.test_batch_size, args.test_sniter) == (256, 2000)
    assert args.saved_model == f"pretrained/{EVALUATION[model]}"


def test_evaluation_takes_from_the_checkpoint_and_the_paper_what_is_not_given(command_line, tmp_path, monkeypatch):
    trained = {"data": "cifar10", "model": "c6f2_clmaxmin", "width": 0.1}
    state = utils.select_model(**trained).state_dict()
    save_checkpoint(tmp_path / "net.pth", {"state_dict": state, "arguments": trained})
    monkeypatch.setattr(evaluate, "load_data", lambda *_, **__: ImageSet(torch.zeros(1, 3, 32, 32), torch.zeros(1)))
    command_line("--saved_model", tmp_path / "net.pth", "--device", "cpu")
    args = evaluate.arguments()
    evaluate.load(args)
    assert vars(args) | trained | {"epsilon": 36 / 255} == vars(args)


# --- the official files, made up

BATCHES = {True: [f"data_batch_{i}" for i in range(1, 6)], False: ["test_batch"]}


def md5(content):
    return hashlib.md5(content).hexdigest()


@pytest.fixture
def official_files(tmp_path, monkeypatch, no_network):
    """A folder of official files with six images per batch, which torchvision takes for the real ones."""
    folder = tmp_path / "data" / "cifar-10-batches-py"
    folder.mkdir(parents=True)

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return [name, md5((folder / name).read_bytes())]

    random = np.random.default_rng(0)
    fingerprints = {}
    for train, names in BATCHES.items():
        pixels = random.integers(256, size=(len(names), 6, 3 * 32 * 32), dtype=np.uint8)
        labels = random.integers(10, size=(len(names), 6)).tolist()
        listed = [write(name, {"data": p, "labels": y}) for name, p, y in zip(names, pixels, labels)]
        monkeypatch.setattr(torchvision_datasets().CIFAR10, "train_list" if train else "test_list", listed)
        fingerprints[train] = md5(pixels.tobytes()), md5(np.array(labels, dtype=np.uint8).tobytes())
    monkeypatch.setitem(DATA_SETS, "cifar10", replace(DATA_SETS["cifar10"], fingerprints=fingerprints))
    name, known = write("batches.meta", {"label_names": list("abcdefghij")})
    monkeypatch.setattr(torchvision_datasets().CIFAR10, "meta", {"filename": name, "key": "label_names", "md5": known})
    return folder


@pytest.mark.parametrize("train", [True, False])
def test_official_files_are_read_as_uint8_maps_of_colours(official_files, train):
    images = load_data("cifar10", official_files.parent, train)
    first = pickle.loads((official_files / BATCHES[train][0]).read_bytes())
    assert images.images.shape == (6 * len(BATCHES[train]), 3, 32, 32)
    assert images.images.dtype == torch.uint8
    assert images.images[:6].flatten(1).tolist() == first["data"].tolist()
    assert images.labels[:6].tolist() == first["labels"]


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch"])
@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, lambda path: path.write_bytes(path.read_bytes()[:-100]), Path.unlink],
    ids=["flipped byte", "truncated", "missing"],
)
def test_a_damaged_batch_is_refused_with_one_line(official_files, call, tmp_path, name, damage):
    damage(official_files / name)
    answer = call("train_cifar10", *FEW, "--data_dir", official_files.parent, "--output_dir", tmp_path / "runs")
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1
    assert "CIFAR-10" in answer.err


def test_files_of_other_images_are_refused_as_damaged(official_files, monkeypatch):
    fingerprints = {False: (md5(b""), md5(b""))}
    monkeypatch.setitem(DATA_SETS, "cifar10", replace(DATA_SETS["cifar10"], fingerprints=fingerprints))
    with pytest.raises(InputError, match="damaged"):
        load_data("cifar10", official_files.parent, train=False)


REAL = Path(os.environ.get("LOCAL_LIP_DATA", "data"))


@pytest.mark.skipif(not (REAL / "cifar-10-batches-py").is_dir(), reason="no CIFAR-10 in $LOCAL_LIP_DATA or data/")
@pytest.mark.parametrize(("train", "per_class"), [(True, 5000), (False, 1000)])
def test_the_real_cifar10_loads(train, per_class, no_network):
    images = load_data("cifar10", REAL, train)
    assert images.images.shape == (10 * per_class, 3, 32, 32)
    assert images.labels.bincount().tolist() == [per_class] * 10


@pytest.mark.skipif(not (REAL / "MNIST").is_dir(), reason="no MNIST in $LOCAL_LIP_DATA or data/")
@pytest.mark.parametrize(("train", "number"), [(True, 60_000), (False, 10_000)])
def test_the_real_mnist_loads(train, number):
    images = load_data("mnist", REAL, train)
    assert images.images.shape == (number, 1, 28, 28)
    assert images.labels.unique().tolist() == list(range(10))


# --- the scripts

FEW = ["--width", WIDTH, "--device", "cpu", "--epochs", 2, "--warmup", 0, "--rampup", 1, "--batch_size", 10]
FEW += ["--test_sniter", 5]


@pytest.mark.parametrize(
    ("model", "flags"), [("c6f2_relux", []), ("c6f2_relux", ["--gloro", "--val_split", 6]), ("c6f2_clmaxmin", [])]
)
def test_training_and_evaluation_run_on_official_files(official_files, call, tmp_path, model, flags):
    net = ["--model", model, "--data_dir", official_files.parent]
    answer = call("train_cifar10", *FEW, *net, *flags, "--output_dir", tmp_path / "runs", "--prefix", "a/net")
    assert answer.code == 0, answer.err
    assert ("held out" if flags else "paper's protocol") in answer.out
    assert [row["epoch"] for row in read_csv(tmp_path / "runs" / "a" / "net_epochs.csv")] == ["1", "2"]

    small = ["--data", "cifar10", "--width", WIDTH, "--device", "cpu", "--epsilon", 0.01, "--test_sniter", 20]
    saved = ["--saved_model", tmp_path / "runs" / "a" / "net", "--out", tmp_path / "report"]
    answer = call("evaluate", *small, *net, *saved)
    assert answer.code == 0, answer.err
    assert "cifar10: 6 test images" in answer.out
    summary = json.loads((tmp_path / "report" / "summary.json").read_text())
    assert summary["images"] == len(read_csv(tmp_path / "report" / "images.csv")) == 6
    assert summary["checkpoint"]["training"]["model"] == model


def test_training_augments_unless_and_until_told_not_to(official_files, call, tmp_path, monkeypatch):
    batches = []

    def record(images, generator, padding):
        batches.append((len(images), padding))
        return images

    monkeypatch.setattr("utils.crop_and_flip", record)
    epoch = [(10, 4)] * 3
    for flags, expected in (
        (["--no_augmentation"], []),
        ([], 4 * epoch),
        (["--crop_padding", 0], 4 * [(10, 0)] * 3),
        (["--unaugmented_epochs", 1], 3 * epoch),
        (["--unaugmented_epochs", 4], []),
        (["--unaugmented_epochs", 2, "--scale", 0.5], epoch),
        (["--unaugmented_epochs", 1, "--no_augmentation"], []),
    ):
        batches.clear()
        few = [*FEW, "--epochs", 4, "--rampup", 0, *flags, "--data_dir", official_files.parent]
        assert call("train_cifar10", *few, "--output_dir", tmp_path, "--overwrite").code == 0
        assert batches == expected
