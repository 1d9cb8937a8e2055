"""Whatever is wrong with the input: one line on stderr, exit code 2, and every file as it was."""

import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from conftest import TINY, spawn

import utils
from data_load import DATA_SETS
from locallip.checkpoints import load_checkpoint, save_checkpoint
from locallip.evaluation.falsification import COLUMNS


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def output_dir(tmp_path):
    """A folder with a finished run that bad input must not touch."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for name in ("digits_relux_best.pth", "digits_relux_checkpoint.pth", "digits_relux_epochs.csv"):
        (folder / name).write_text("precious")
    return folder


def assert_refused(answer, complaint):
    lines = answer.err.splitlines()
    assert (answer.code, len(lines)) == (2, 1), answer.err
    assert complaint in lines[0]


@pytest.fixture
def refused(call, tmp_path, recwarn):
    """Asserts that a script refuses its flags with a complaint, within this process, and that no file changes."""

    def check(complaint, script, *flags):
        before = contents(tmp_path)
        assert_refused(call(script, *TINY, *flags), complaint)
        assert not recwarn.list  # they would be further lines on stderr
        assert contents(tmp_path) == before

    return check


@pytest.fixture
def training_refused(refused, few_digits, output_dir):
    def check(complaint, *flags, overwrite="--overwrite"):
        refused(complaint, "train_mnist", "--output_dir", output_dir, overwrite, *flags)

    return check


@pytest.fixture
def evaluation_refused(refused, tmp_path):
    def check(complaint, saved_model, *flags):
        refused(complaint, "evaluate", "--saved_model", saved_model, "--images", 2, *flags)

    return check


def test_weights_that_do_not_say_their_network_are_told_which_was_assumed(evaluation_refused, tmp_path):
    net = utils.select_model("digits", "c4f3_clmaxmin", width=0.05)
    torch.save(net.state_dict(), tmp_path / "bare.pth")
    evaluation_refused("does not say its network, and --model relux was assumed", tmp_path / "bare.pth")


# --- flags

BAD_FLAGS = [
    (["--model", "alexnet"], "alexnet"),
    (["--data", "letters"], "letters"),
    (["--dta", "digits"], "--dta"),
    (["--dat", "digits"], "--dat"),  # abbreviated
    (["surplus"], "surplus"),
    (["--epsilon", "-1"], "--epsilon"),
    (["--epsilon", "nan"], "--epsilon"),
    (["--epsilon", "inf"], "--epsilon"),
    (["--epsilon", "big"], "--epsilon"),
    (["--epsilon"], "--epsilon"),
    (["--width", "0"], "--width"),
    (["--width", "1000"], "--width"),
    (["--test_batch_size", "0"], "--test_batch_size"),
    (["--test_sniter", "0"], "--test_sniter"),
    (["--seed", "-1"], "--seed"),
    (["--seed", str(2**64)], "--seed"),
    (["--device", "cuda:99"], "cuda:99"),
    (["--device", "tpu"], "tpu"),
    (["--data_dir=~nobody-of-that-name/data"], "--data_dir: there is no home folder '~nobody-of-that-name'"),
    (["--data_dir", ""], "--data_dir: must name a file or folder"),
]
BAD_TRAINING_FLAGS = [
    (["--epsilon_train", "-0.1"], "--epsilon_train"),
    (["--epsilon_train", "nan"], "--epsilon_train"),
    (["--epochs", "0"], "--epochs"),
    (["--epsilon", "36/"], "must be a number such as 0.5 or 36/255, got '36/'"),
    (["--epsilon", "1/0"], "must be a number such as 0.5 or 36/255, got '1/0'"),
    (["--width", "abc"], "must be a number such as 0.5 or 36/255, got 'abc'"),
    (["--epochs", "1.5"], "must be a whole number, got '1.5'"),
    (["--epochs", "10"], "--epochs 10 is less than warm-up and ramp-up"),  # than the default ramp-up
    (["--epochs", "10", "--warmup", "6", "--rampup", "5"], "--epochs 10 is less than warm-up and ramp-up"),
    (["--scale", "0.001"], "--scale 0.001 leaves none of 300 epochs"),
    (["--scale", "nan"], "--scale"),
    (["--scale", "1e307"], "--scale"),
    (["--prefix", "/"], "--prefix"),
    (["--prefix=~nobody-of-that-name/x"], "--prefix: there is no home folder"),
    (["--output_dir=~nobody-of-that-name"], "--output_dir: there is no home folder"),
    (["--prefix", "runs/.."], "--prefix"),
    (["--rampup", "-1"], "--rampup"),
    (["--lr", "0"], "--lr"),
    (["--lr", "inf"], "--lr"),
    (["--batch_size", "0"], "--batch_size"),
    (["--lr_scheduler", "stepwise"], "stepwise"),
    (["--val_split", "-1"], "--val_split"),
    (["--val_split", "128"], "leaves none"),
    (["--resume"], "exclude each other"),  # beside --overwrite
]


@pytest.mark.parametrize(("flags", "complaint"), BAD_FLAGS + BAD_TRAINING_FLAGS)
def test_training_refuses_bad_flags(training_refused, flags, complaint):
    training_refused(complaint, *flags)


@pytest.mark.parametrize(("flags", "complaint"), [*BAD_FLAGS, (["--images", "0"], "--images")])
def test_evaluation_refuses_bad_flags(evaluation_refused, saved_net, flags, complaint):
    evaluation_refused(complaint, saved_net, *flags)


@pytest.mark.parametrize("script", ["evaluate", "falsify"])
@pytest.mark.parametrize("flag", ["--saved_model", "--out"])
def test_paths_below_no_home_folder_are_refused(refused, saved_net, script, flag):
    refused(f"{flag}: there is no home folder", script, "--saved_model", saved_net, f"{flag}=~nobody-of-that-name/x")


def test_evaluation_asks_for_a_model(refused):
    refused("--saved_model", "evaluate")


# --- places and runs


@pytest.mark.parametrize("below", ["", "folder"])
def test_training_refuses_an_output_folder_below_a_file(refused, few_digits, saved_net, below):
    refused("cannot write", "train_mnist", "--output_dir", saved_net / below)


@pytest.mark.parametrize("below", ["", "folder"])
def test_evaluation_refuses_an_output_folder_below_a_file(evaluation_refused, saved_net, below):
    evaluation_refused("cannot write", saved_net, "--out", saved_net / below)


def test_resume_without_a_run_is_refused(refused, few_digits, tmp_path):
    refused("there is nothing to resume", "train_mnist", "--output_dir", tmp_path, "--resume")


def test_resume_from_a_damaged_checkpoint_is_refused(training_refused):
    training_refused("damaged", overwrite="--resume")


def test_a_second_run_on_a_prefix_is_refused(refused, few_digits, output_dir):
    refused("exists", "train_mnist", "--output_dir", output_dir)


@pytest.mark.parametrize("overwrite", ["--overwrite", "--resume"])
def test_a_prefix_that_is_too_long_for_a_file_is_refused(training_refused, overwrite):
    training_refused("too long", "--prefix", "x" * 300, overwrite=overwrite)


def test_a_checkpoint_whose_name_is_too_long_is_refused(evaluation_refused):
    evaluation_refused("too long", "x" * 300)


# --- checkpoints


class Custom:
    """Something that only a pickle can hold."""


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def save_state(path, change):
    state = torch.load(path, weights_only=True)["state_dict"]
    change(state)
    save_checkpoint(path, {"state_dict": state, "err": 1.0, "epoch": 0})


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda path: path.unlink(), "no checkpoint"),
        (lambda path: path.write_bytes(b""), "damaged"),
        (truncate, "damaged"),
        (lambda path: path.write_text("Dear diary,\nthis is\nno checkpoint.\n"), "damaged"),
        (lambda path: path.write_bytes(pickle.dumps([1, 2, 3])), "no checkpoint"),
        (lambda path: path.write_bytes(pickle.dumps(Custom())), "no checkpoint"),
        (lambda path: torch.save([1, 2, 3], path), "no checkpoint"),
        (lambda path: torch.save({"state_dict": {"0.weight": 1}}, path), "no state dict"),
        (lambda path: torch.save({1: torch.zeros(1)}, path), "no"),
        (lambda path: save_state(path, lambda state: state.pop("0.bias")), "another architecture"),
        (lambda path: save_state(path, lambda state: state.update({"0.bias": torch.zeros(7)})), "another architecture"),
        (lambda path: save_state(path, lambda state: state["9.weight"].fill_(torch.nan)), "NaN"),
    ],
    ids=[
        "missing",
        "empty",
        "truncated",
        "text",
        "pickled list",
        "pickled object",
        "saved list",
        "no tensors",
        "keys no names",
        "missing tensor",
        "wrong shape",
        "NaN",
    ],
)
def test_evaluation_refuses_a_file_that_is_no_good_checkpoint(evaluation_refused, saved_net, spoil, complaint):
    spoil(saved_net)
    evaluation_refused(complaint, saved_net)


@pytest.mark.parametrize("flags", [["--model", "standrelu"], ["--width", 0.1]])
def test_evaluation_refuses_a_checkpoint_of_another_architecture(evaluation_refused, saved_net, flags):
    evaluation_refused("another architecture", saved_net, *flags)


def test_evaluation_says_what_a_checkpoint_was_trained_with(evaluation_refused, saved_net):
    checkpoint = torch.load(saved_net, weights_only=True)
    torch.save({**checkpoint, "arguments": {"model": "standrelu", "width": 0.25}}, saved_net)
    complaint = "it was trained with --model standrelu --width 0.25: drop --model and --width"
    evaluation_refused(complaint, saved_net, "--model", "c4f3_maxmin", "--width", 0.1)


def test_evaluation_refuses_a_folder_as_a_checkpoint(evaluation_refused, tmp_path):
    evaluation_refused("no checkpoint", tmp_path)


# --- data


def flip_a_byte(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


@pytest.fixture
def digits_copy(tmp_path, monkeypatch):
    folder = tmp_path / "digits"
    shutil.copytree(DATA_SETS["digits"].folder, folder)
    monkeypatch.setitem(DATA_SETS, "digits", replace(DATA_SETS["digits"], folder=folder))
    return folder


@pytest.mark.parametrize("name", ["t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"])
@pytest.mark.parametrize(
    "damage",
    [flip_a_byte, truncate, lambda path: path.unlink(), lambda path: path.write_bytes(b""), shutil.rmtree],
    ids=["flipped byte", "truncated", "missing", "empty", "folder missing"],
)
def test_damaged_digits_are_refused(evaluation_refused, saved_net, digits_copy, name, damage):
    damage(digits_copy if damage is shutil.rmtree else digits_copy / name)
    evaluation_refused("digits", saved_net)


@pytest.mark.parametrize("spoil", [lambda raw: None, lambda raw: (raw / "t10k-images-idx3-ubyte").touch()])
def test_an_mnist_that_cannot_be_had_is_refused_with_what_to_do(
    evaluation_refused, tmp_path, tiny_net, no_network, spoil
):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    spoil(raw)
    path = tmp_path / "net.pth"
    torch.save(tiny_net.state_dict(), path)
    evaluation_refused("--data_dir", path, "--data", "mnist", "--data_dir", tmp_path)


def test_a_damaged_mnist_is_refused(evaluation_refused, tmp_path, saved_net, no_network):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in ("images-idx3", "labels-idx1"):
        for prefix in ("train", "t10k"):
            (raw / f"{prefix}-{name}-ubyte").write_bytes(b"\0\0\x08\x01\0\0\0\x09short")
    evaluation_refused("MNIST", saved_net, "--data", "mnist", "--data_dir", tmp_path)


def test_a_data_folder_below_a_file_is_refused(evaluation_refused, saved_net):
    evaluation_refused("MNIST", saved_net, "--data", "mnist", "--data_dir", saved_net)


# --- for real


def test_the_training_script_refuses_a_schedule_that_does_not_fit(tmp_path):
    answer = spawn("train_mnist.py", *TINY, "--output_dir", tmp_path / "runs", "--epochs", 3)
    assert_refused(answer, "--epochs 3 is less than")
    assert list(tmp_path.iterdir()) == []


def test_the_evaluation_script_refuses_a_truncated_checkpoint(saved_net):
    truncate(saved_net)
    assert_refused(spawn("evaluate.py", *TINY, "--saved_model", saved_net), "damaged")


def test_a_report_is_not_replaced_unasked(call, saved_net, tmp_path):
    flags = [*TINY, "--saved_model", saved_net, "--images", 2, "--epsilon", 0.01, "--out", tmp_path / "report"]
    assert call("evaluate", *flags).code == 0
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    assert_refused(call("evaluate", *flags), "--overwrite")
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before


def test_a_report_on_attacks_is_not_replaced_unasked(call, saved_net, tmp_path):
    flags = [*TINY, "--saved_model", saved_net, "--images", 8, "--restarts", 1, "--slope_steps", 2]
    flags += ["--out", tmp_path / "report"]
    assert call("falsify", *flags, "--epsilon", 1e-4).code == 0
    before = contents(tmp_path)
    assert_refused(call("falsify", *flags, "--epsilon", 5), "--overwrite")
    assert contents(tmp_path) == before
    assert call("falsify", *flags, "--epsilon", 5, "--overwrite").code == 0
    assert (tmp_path / "report" / "attacks.csv").read_text() == ",".join(COLUMNS) + "\n"


@pytest.mark.parametrize("flags", [["--deployed", "float32"], ["--certificate_seed", 1]], ids=str)
def test_an_estimate_does_not_pretend_to_more(evaluation_refused, saved_net, flags):
    said = f"no part of an estimate, but of a proven certificate: {flags[0]}"
    evaluation_refused(said, saved_net, "--certificate", "estimate", *flags)


def test_a_checkpoint_with_foreign_arguments_is_evaluated_by_the_flags(call, saved_net):
    checkpoint = load_checkpoint(saved_net)
    save_checkpoint(saved_net, checkpoint | {"arguments": "a string"})
    assert call("evaluate", *TINY, "--saved_model", saved_net, "--images", 2, "--epsilon", 0.01).code == 0


@pytest.mark.parametrize("arguments", [{"width": "wide"}, {"model": ["relux"]}, {"data": None}], ids=str)
def test_a_checkpoint_that_says_nonsense_about_its_training_is_refused(call, saved_net, arguments):
    checkpoint = load_checkpoint(saved_net)
    save_checkpoint(saved_net, checkpoint | {"arguments": arguments})
    assert_refused(call("evaluate", "--saved_model", saved_net, "--images", 2), "does not say what")
