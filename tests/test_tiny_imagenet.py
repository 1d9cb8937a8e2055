"""Tiny ImageNet: its files, real or made up, the cache of them, the 8C2F nets, the sparsity loss, and the scripts."""

import hashlib
import os
import shlex
import shutil
import subprocess
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import train_tinyimagenet
from conftest import ROOT, Answer, read_csv
from PIL import Image
from torch import nn

import data_load
import evaluate
import utils
from data_load import count_classes, load_data
from local_bound import propagate
from locallip import tiny_imagenet
from locallip.bound.layers import ClampGroupSort, ReLU_x
from locallip.bound.power_iteration import PowerIteration
from locallip.checkpoints import save_checkpoint

WNIDS = ["n03", "n01", "n02"]  # not in the order of the labels
PER_CLASS = {True: 4, False: 2}

# --- files


def picture(seed, grey=False):
    """Blocks of colour, which survive the JPEG."""
    shape = (8, 8) if grey else (8, 8, 3)
    blocks = np.random.default_rng(seed).integers(256, size=shape, dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


@pytest.fixture
def data_dir(tmp_path):
    """A folder with made-up files of three classes in the official layout; the first image of each is grey."""
    folder = tmp_path / "data" / "tiny-imagenet-200"
    annotations = []
    for number, wnid in enumerate(WNIDS):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        for i in range(PER_CLASS[True]):
            picture(10 * number + i, grey=i == 0).save(folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG")
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text("no image")
    (folder / "val" / "images").mkdir(parents=True)
    for i in range(PER_CLASS[False] * len(WNIDS)):
        picture(100 + i).save(folder / "val" / "images" / f"val_{i}.JPEG")
        annotations.append(f"val_{i}.JPEG\t{WNIDS[i % 3]}\t0\t0\t9\t9\n")
    (folder / "val" / "val_annotations.txt").write_text("".join(annotations))
    (folder / "wnids.txt").write_text("\n".join(WNIDS))
    return folder.parent


def sort_into_class_folders(data_dir, below):
    val = data_dir / "tiny-imagenet-200" / "val"
    for line in (val / "val_annotations.txt").read_text().splitlines():
        name, wnid = line.split("\t")[:2]
        (val / wnid / below).mkdir(parents=True, exist_ok=True)
        (val / "images" / name).rename(val / wnid / below / name)
    (val / "images").rmdir()


def load(data_dir, train):
    return load_data("tinyimagenet", data_dir, train)


def same(one, other):
    return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)


@pytest.mark.parametrize("train", [True, False])
def test_labels_are_places_in_the_sorted_list_of_wnids(data_dir, train):
    images = load(data_dir, train)
    assert images.images.shape == (3 * PER_CLASS[train], 3, 64, 64)
    assert images.images.dtype == torch.uint8
    expected = [0] * 4 + [1] * 4 + [2] * 4 if train else [2, 0, 1, 2, 0, 1]
    assert images.labels.tolist() == expected
    assert count_classes("tinyimagenet", data_dir) == 3


def test_pixels_are_those_of_the_files_and_grey_ones_have_three_equal_channels(data_dir):
    images = load(data_dir, True).images
    for place, (number, i) in enumerate((number, i) for number in (1, 2, 0) for i in range(4)):
        expected = np.asarray(picture(10 * number + i, grey=i == 0).convert("RGB")).transpose(2, 0, 1)
        assert np.abs(images[place].numpy().astype(int) - expected).mean() < 20
        assert (images[place] == images[place][0]).all() == (i == 0)


@pytest.mark.parametrize("below", ["", "images"])
def test_both_layouts_give_the_same_set(data_dir, below):
    official = load(data_dir, False)
    official = data_load.ImageSet(official.images.clone(), official.labels)
    sort_into_class_folders(data_dir, below)
    assert same(load(data_dir, False), official)
    (data_dir / "tiny-imagenet-200" / "val" / "val_annotations.txt").unlink()
    assert same(load(data_dir, False), official)


def test_a_second_start_decodes_nothing(data_dir, monkeypatch):
    first = load(data_dir, True)
    monkeypatch.setattr(tiny_imagenet, "_decode", None)
    assert same(load(data_dir, True), first)
    assert len(load(data_dir, False)) == 6
    assert {path.name for path in data_dir.iterdir()} == {"tiny-imagenet-200", "tiny-imagenet-200.cache"}


def test_the_loaded_set_can_be_changed_without_changing_the_cache(data_dir):
    first = load(data_dir, True).images
    kept = first.clone()
    first.zero_()
    assert torch.equal(load(data_dir, True).images, kept)


def flip_a_byte(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF
    path.write_bytes(content)


DAMAGES = {
    "pixel": lambda path: flip_a_byte(path, 5000),
    "label": lambda path: flip_a_byte(path, -1),
    "header": lambda path: flip_a_byte(path, 0),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "empty": lambda path: path.write_bytes(b""),
    "other layout": lambda path: path.write_bytes(path.read_bytes().replace(b'"layout": 1', b'"layout": 0')),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_rebuilt(data_dir, damage):
    sets = {train: load(data_dir, train).images.clone() for train in (True, False)}
    DAMAGES[damage](data_dir / "tiny-imagenet-200.cache")
    for train in (True, False):
        assert torch.equal(load(data_dir, train).images, sets[train])


def test_a_cache_of_other_files_is_rebuilt(data_dir):
    load(data_dir, True)
    image = data_dir / "tiny-imagenet-200" / "train" / "n01" / "images" / "n01_3.JPEG"
    image.unlink()
    assert len(load(data_dir, True)) == 11
    picture(999).save(image)
    restored = load(data_dir, True)
    assert len(restored) == 12
    kept = restored.images.clone()
    picture(998).save(image)
    assert not torch.equal(load(data_dir, True).images, kept)


# --- what other programs leave in folders

LITTER = {
    "notebook": lambda folder: (folder / ".ipynb_checkpoints").mkdir(),
    "notebook with an image": lambda folder: copy_of_an_image(folder / ".ipynb_checkpoints" / "n01_0-checkpoint.JPEG"),
    "macOS archive": lambda folder: copy_of_an_image(folder / "__MACOSX" / "images" / "._n01_0.JPEG"),
    "Finder": lambda folder: (folder / ".DS_Store").write_bytes(b"Bud1"),
    "Windows": lambda folder: (folder / "Thumbs.db").write_bytes(b"thumbs"),
    "Synology": lambda folder: copy_of_an_image(folder / "@eaDir" / "n01_0.JPEG"),
    "companion": lambda folder: (folder / "._val_0.JPEG").write_bytes(b"Mac OS X"),
    "hidden image": lambda folder: picture(7).save(folder / ".hidden.JPEG"),
}


def copy_of_an_image(path):
    path.parent.mkdir(parents=True)
    picture(7).save(path)


def tiny(data_dir):
    return data_dir / "tiny-imagenet-200"


@pytest.mark.parametrize("litter", LITTER)
@pytest.mark.parametrize("layout", ["official", "sorted"])
@pytest.mark.parametrize("listed", [True, False], ids=["wnids.txt", "no wnids.txt"])
def test_litter_is_no_data(data_dir, litter, layout, listed):
    if layout == "sorted":
        sort_into_class_folders(data_dir, "")
    if not listed:
        (tiny(data_dir) / "wnids.txt").unlink()
    clean = {train: load(data_dir, train) for train in (True, False)}
    clean = {train: data_load.ImageSet(images.images.clone(), images.labels) for train, images in clean.items()}
    for folder in [data_dir, *(path for path in tiny(data_dir).rglob("*") if path.is_dir())]:
        LITTER[litter](folder)
    LITTER[litter](tiny(data_dir))
    for train in (True, False):
        assert same(load(data_dir, train), clean[train])
    assert count_classes("tinyimagenet", data_dir) == 3


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_lists_written_on_windows_are_read(data_dir, ending):
    clean = load(data_dir, False)
    for path in (tiny(data_dir) / "wnids.txt", tiny(data_dir) / "val" / "val_annotations.txt"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_text().replace("\n", ending).encode())
    assert same(load(data_dir, False), clean)


# --- files that are not what they should be


def sort_and_lose_a_class(data_dir):
    sort_into_class_folders(data_dir, "images")
    shutil.rmtree(tiny(data_dir) / "val" / "n02")


def empty_a_class(data_dir, listed=True):
    if not listed:
        (tiny(data_dir) / "wnids.txt").unlink()
    for path in (tiny(data_dir) / "train" / "n02" / "images").iterdir():
        path.unlink()


BROKEN = {
    "a class without images": (empty_a_class, "class n02 has no images in"),
    "an unlisted class without images": (lambda d: empty_a_class(d, listed=False), "class n02 has no images in"),
    "a stray folder": (
        lambda d: ((tiny(d) / "wnids.txt").unlink(), (tiny(d) / "train" / "backup").mkdir()),
        "class backup has no images in",
    ),
    "a listed stray folder": (lambda d: (tiny(d) / "train" / "backup").mkdir(), "train has 4; backup is not in both"),
    "a class not validated": (sort_and_lose_a_class, "class n02 has no images in"),
    "a list in UTF-16": (lambda d: (tiny(d) / "wnids.txt").write_text("n01", encoding="utf-16"), "wnids.txt"),
    "no folder": (lambda d: shutil.rmtree(tiny(d)), "tinyimagenet-data"),
    "no training images": (lambda d: [p.unlink() for p in tiny(d).glob("train/*/images/*")], "no training images"),
    "a class missing": (lambda d: shutil.rmtree(tiny(d) / "train" / "n02"), "lists 3 classes, train has 2; n02 is not"),
    "no validation images": (lambda d: shutil.rmtree(tiny(d) / "val"), "no validation images"),
    "no annotations": (lambda d: (tiny(d) / "val" / "val_annotations.txt").unlink(), "val_annotations.txt"),
    "an image missing": (lambda d: (tiny(d) / "val" / "images" / "val_3.JPEG").unlink(), "val_3.JPEG is not there"),
    "an unknown image": (
        lambda d: picture(0).save(tiny(d) / "val" / "images" / "val_99.JPEG"),
        "val_99.JPEG is not in val_annotations.txt",
    ),
    "an unknown class": (
        lambda d: (tiny(d) / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\n"),
        "class n99",
    ),
    "two classes for an image": (
        lambda d: (tiny(d) / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn01\nval_0.JPEG\tn02\n"),
        "val_0.JPEG in two classes, n01 and n02",
    ),
    "a dangling link": (
        lambda d: (tiny(d) / "train" / "n01" / "images" / "n01_9.JPEG").symlink_to("nowhere"),
        "n01_9.JPEG",
    ),
    "a list that is no text": (lambda d: (tiny(d) / "wnids.txt").write_bytes(b"\xff\xfe\x81"), "wnids.txt"),
    "no image": (lambda d: (tiny(d) / "train" / "n01" / "images" / "n01_1.JPEG").write_text("text"), "n01_1.JPEG"),
    "a truncated image": (
        lambda d: (tiny(d) / "val" / "images" / "val_0.JPEG").write_bytes(
            (tiny(d) / "val" / "images" / "val_0.JPEG").read_bytes()[:-200]
        ),
        "val_0.JPEG",
    ),
    "another size": (
        lambda d: Image.new("RGB", (32, 64)).save(tiny(d) / "val" / "images" / "val_0.JPEG"),
        "32x64 pixels, not 64x64",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_missing_and_damaged_files_are_refused_with_one_line(data_dir, call, tmp_path, case):
    spoil, complaint = BROKEN[case]
    spoil(data_dir)
    answer = call("train_tinyimagenet", "--data_dir", data_dir, "--device", "cpu", "--output_dir", tmp_path / "runs")
    assert (answer.code, len(answer.err.splitlines())) == (2, 1), answer.err
    assert complaint in answer.err
    assert not list(data_dir.glob("*.cache"))
    assert not list(data_dir.glob(".*tmp"))


REAL = Path(os.environ.get("LOCAL_LIP_DATA", "TinyImagenet/data"))


@pytest.mark.skipif(
    not (REAL / "tiny-imagenet-200").is_dir(), reason="no Tiny ImageNet in $LOCAL_LIP_DATA or TinyImagenet/data/"
)
def test_the_real_tiny_imagenet_loads():
    classes = count_classes("tinyimagenet", REAL)
    for train, per_class in ((True, 500), (False, 50)):
        assert load(REAL, train).labels.bincount().tolist() == [per_class] * classes


# --- the script that fetches them


@pytest.fixture
def fetch(tmp_path, data_dir):
    """Runs a copy of the script, for which an archive of the made-up files is the official one."""
    archive = tmp_path / "archive.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(data_dir.rglob("*")):
            file.write(path, path.relative_to(data_dir))
    folder = tmp_path / "fetched"
    folder.mkdir()
    script = shutil.copy(ROOT / "TinyImagenet" / "data" / "tinyimagenet.sh", folder)
    md5 = subprocess.run(["md5sum", archive], capture_output=True, text=True, check=True).stdout.split()[0]

    def run(*arguments, url=f"file://{archive}", md5=md5):
        environment = os.environ | {"TINY_IMAGENET_URL": url, "TINY_IMAGENET_MD5": md5}
        line = ["bash", script, *arguments]
        done = subprocess.run(line, cwd=tmp_path, env=environment, capture_output=True, text=True)
        return Answer(done.returncode, done.stdout, done.stderr)

    run.archive, run.folder = archive, folder
    return run


def test_the_archive_is_fetched_once_and_unpacked(fetch):
    assert "unpacked to" in fetch().out
    assert len(load(fetch.folder, True)) == 12
    (fetch.folder / "tiny-imagenet-200.zip").unlink()
    answer = fetch(url="file:///no/such/archive.zip")
    assert (answer.code, answer.err) == (0, "")
    assert "there already" in answer.out


def test_an_interrupted_download_goes_on(fetch):
    content = fetch.archive.read_bytes()
    (fetch.folder / "tiny-imagenet-200.zip").write_bytes(content[: len(content) // 2])
    assert fetch().code == 0
    assert (fetch.folder / "tiny-imagenet-200.zip").read_bytes() == content


def test_an_archive_on_disk_is_taken(fetch):
    assert fetch("archive.zip", url="file:///no/such/archive.zip").code == 0
    assert len(load(fetch.folder, False)) == 6


def test_an_archive_in_the_home_folder_is_taken(fetch, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch("~/archive.zip", url="file:///no/such/archive.zip").code == 0
    assert len(load(fetch.folder, False)) == 6


def test_what_an_archive_of_macos_has_beside_the_folder_is_dropped(fetch):
    with zipfile.ZipFile(fetch.archive, "a") as file:
        file.writestr("__MACOSX/tiny-imagenet-200/._wnids.txt", "Mac OS X")
    assert fetch(md5=hashlib.md5(fetch.archive.read_bytes()).hexdigest()).code == 0
    assert {path.name for path in fetch.folder.iterdir() if path.is_dir()} == {"tiny-imagenet-200"}


def test_an_archive_of_something_else_is_refused(fetch):
    with zipfile.ZipFile(fetch.archive, "w") as file:
        file.writestr("other/wnids.txt", "n01")
    answer = fetch(md5=hashlib.md5(fetch.archive.read_bytes()).hexdigest())
    assert answer.code == 2
    assert "holds no folder tiny-imagenet-200" in answer.err.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "named", "complaint"),
    [
        ([], {"url": "file:///no/such/archive.zip"}, "cannot download file:///no/such/archive.zip"),
        ([], {"md5": "0" * 32}, "damaged"),
        (["archive.zip"], {"md5": "0" * 32}, "archive.zip is not tiny-imagenet-200.zip, or is damaged"),
        (["absent.zip"], {}, "cannot read"),
        (["no/folder/absent.zip"], {}, "no/folder/absent.zip"),
        (["~nobody-of-that-name/absent.zip"], {}, "cannot read"),
        (["a.zip", "b.zip"], {}, "one argument at most"),
    ],
)
def test_what_cannot_be_fetched_leaves_no_set(fetch, arguments, named, complaint):
    answer = fetch(*arguments, **named)
    assert answer.code == 2
    assert complaint in answer.err.splitlines()[-1]
    assert not (fetch.folder / "tiny-imagenet-200").exists()


# --- architectures and the sparsity loss


@pytest.mark.parametrize("name", ["tinyimagenet_relux", "tiny_clmaxmin"])
def test_8c2f_has_the_published_layers(name):
    state = utils.select_model("tinyimagenet", name).state_dict()
    channels = [len(state[f"{position}.weight"]) for position in (0, 2, 4, 6, 8, 10, 12, 14, 17, 19)]
    assert channels == [64, 64, 64, 128, 128, 128, 256, 256, 256, 200]
    assert state["17.weight"].shape == (256, 256 * 6 * 6)
    assert utils.select_model("tinyimagenet", name, width=0.05, classes=7)(torch.rand(2, 3, 64, 64)).shape == (2, 7)


def test_clipped_maxmin_of_8c2f_starts_at_the_published_values():
    layers = [
        layer for layer in utils.select_model("tinyimagenet", "tiny_clmaxmin") if isinstance(layer, ClampGroupSort)
    ]
    starts = [0.8, 1.0, 1.4, 1.4, 1.4, 1.6, 2.0, 3.0, 1.6]
    assert [layer.max.unique().item() for layer in layers] == pytest.approx(starts)
    assert [layer.min.unique().item() for layer in layers] == pytest.approx([-start for start in starts])


def test_the_sparsity_term_of_clipped_relu_is_of_the_box_before_it():
    # One dense layer that is the identity: the box before the activation is x plus and minus epsilon.
    layer, last = nn.Linear(4, 4), nn.Linear(4, 2)
    layer.weight.data, layer.bias.data = torch.eye(4), torch.zeros(4)
    x, epsilon = torch.tensor([[-1.0, 0.5, 2.0, 0.0], [0.2, 0.3, -0.1, 5.0]]), 0.25
    bound = propagate(nn.Sequential(layer, ReLU_x(4, 1.0), last), x, epsilon, PowerIteration(50), sparse_threshold=0.1)
    above, below = (x + epsilon).clamp(min=0).mean(), (1.0 - (x - epsilon)).clamp(min=0).mean()
    assert bound.sparsity.item() == pytest.approx((above + 0.1 * below).item(), rel=1e-5)
    plain = propagate(nn.Sequential(layer, nn.ReLU(), last), x, epsilon, PowerIteration(50), sparse_threshold=0.1)
    assert plain.sparsity.item() == pytest.approx(above.item(), rel=1e-5)


def test_the_sparsity_term_of_clipped_maxmin_is_of_the_box_behind_it():
    layer, last, activation = nn.Linear(4, 4), nn.Linear(4, 2), ClampGroupSort(4, 1.0, -0.5)
    layer.weight.data, layer.bias.data = torch.eye(4), torch.zeros(4)
    x, epsilon = torch.tensor([[-1.0, 0.5, 2.0, 0.0], [0.2, 0.3, -0.1, -5.0]]), 0.25
    bound = propagate(nn.Sequential(layer, activation, last), x, epsilon, PowerIteration(50), sparse_threshold=0.1)
    lower, upper = activation(x - epsilon), activation(x + epsilon)
    expected = (1.0 - lower[:, :2]).clamp(min=0).mean() + (upper[:, 2:] + 0.5).clamp(min=0).mean()
    assert bound.sparsity.item() == pytest.approx(expected.item(), rel=1e-5)


def test_the_sparsity_term_is_a_sum_over_layers_with_gradients_and_absent_unless_asked_for():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), ReLU_x(6), nn.Linear(6, 4), ReLU_x(4), nn.Linear(4, 3))
    x = torch.rand(5, 4)
    assert propagate(model, x, 0.1, PowerIteration(50)).sparsity is None
    whole = propagate(model, x, 0.1, PowerIteration(50), sparse_threshold=0.3).sparsity
    first = propagate(model[:3], x, 0.1, PowerIteration(50), sparse_threshold=0.3).sparsity
    assert 0 < first < whole
    whole.backward()
    assert all(parameter.grad.any() for parameter in [*model[:2].parameters(), model[2].weight, model[3].threshold])


def test_other_layers_than_the_local_ones_have_the_global_norm_and_no_vectors():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), ReLU_x(6), nn.Linear(6, 4), ReLU_x(4), nn.Linear(4, 3))
    norms = PowerIteration(100, local_positions=[2])
    bound = propagate(model, torch.rand(5, 4), 0.1, norms)
    assert sorted(norms.local_vectors) == [2]
    assert (bound.local_norms[0] == bound.global_norms[0]).all()
    assert (bound.local_norms[2] < bound.global_norms[2]).all()


# --- command lines and scripts

SHARED = "--batch_size 32 --rampup 125 --epochs 250 --sparse 0.01 --indices 0,6,12,14,17 --data tinyimagenet"
SHARED += " --warmup 0 --test_batch_size 32 --epsilon_train 0.16 --lr_scheduler exp"
PUBLISHED = {
    "--model tinyimagenet_relux --sniter 1 --init 1.0 --lr 2.5e-4 --prefix 'relu/tiny_8C2F'": {
        "model": "tinyimagenet_relux",
        "sniter": 1,
        "lr": 2.5e-4,
    },
    "--model tiny_clmaxmin --sniter 3 --lr 1e-4 --prefix 'maxmin/tiny_8C2F_maxmin'": {
        "model": "tiny_clmaxmin",
        "sniter": 3,
        "lr": 1e-4,
    },
}


@pytest.mark.parametrize("line", PUBLISHED)
def test_the_published_training_lines_parse(command_line, monkeypatch, line):
    runs = []
    monkeypatch.setattr(utils, "train", runs.append)
    command_line(*shlex.split(f"{SHARED} {line}"))
    train_tinyimagenet.main()
    expected = {
        "indices": [0, 6, 12, 14, 17],
        "sparse": 0.01,
        "sp_thres": 0.1,
        "end_lr": 5e-7,
        "more": 25,
        "seed": 2019,
    }
    expected |= {"epsilon": 36 / 255, "opt_iter": 1, "loss": "bcp"} | PUBLISHED[line]
    assert vars(runs[0]) | expected == vars(runs[0])


def test_the_published_evaluation_line_parses(command_line):
    command_line(
        *shlex.split(
            "--data 'tinyimagenet' --epsilon 0.141 --model 'tinyimagenet_relux' --test_batch_size 32 "
            "--test_sniter 2000 --saved_model 'pretrained/relu/tiny_8C2F'"
        )
    )
    args = evaluate.arguments({"data": "tinyimagenet", "test_batch_size": 32})
    assert (args.data, args.model, args.epsilon, args.test_sniter) == (
        "tinyimagenet",
        "tinyimagenet_relux",
        0.141,
        2000,
    )


@pytest.mark.parametrize("model", ["tinyimagenet_relux", "tiny_clmaxmin"])
def test_training_and_evaluation_run_on_a_part_of_the_set(data_dir, call, tmp_path, model):
    few = ["--data_dir", data_dir, "--model", model, "--width", 0.02, "--device", "cpu"]
    schedule = ["--epochs", 2, "--rampup", 1, "--batch_size", 5, "--test_sniter", 2]
    answer = call("train_tinyimagenet", *few, *schedule, "--output_dir", tmp_path / "runs", "--prefix", "net")
    assert answer.code == 0, answer.err
    assert "12 training images, 6 test images" in answer.out
    assert [row["epoch"] for row in read_csv(tmp_path / "runs" / "net_epochs.csv")] == ["1", "2"]

    flags = ["--saved_model", tmp_path / "runs" / "net", "--epsilon", 0.001, "--images", 4]
    answer = call("evaluate_tinyimagenet", *few[:2], "--device", "cpu", *flags)
    assert answer.code == 0, answer.err
    assert "tinyimagenet: 4 test images" in answer.out


def test_a_net_for_all_classes_is_not_evaluated_on_a_part_of_them(data_dir, call, tmp_path):
    model = utils.select_model("tinyimagenet", "tinyimagenet_relux", width=0.02)
    save_checkpoint(tmp_path / "net.pth", {"state_dict": model.state_dict()})
    flags = ["--width", 0.02, "--model", "tinyimagenet_relux", "--saved_model", tmp_path / "net.pth"]
    answer = call("evaluate_tinyimagenet", "--data_dir", data_dir, "--device", "cpu", *flags)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "'19.weight' is (200," in answer.err
