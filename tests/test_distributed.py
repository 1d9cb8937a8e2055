"""Runs in several processes: they do what one does on the union of the batches, and one that dies takes all along."""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import distributed_worker as worker
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, Answer, read_csv
from forks import environments_of, run_at_once

import utils
from locallip import checkpoints, devices, distributed
from locallip.files import InputError
from locallip.images import batch_sizes
from locallip.training import run as training_run
from locallip.training.shares import count_batches, loss_weights


@contextmanager
def started(processes, *command):
    """A script in several processes in the repository's folder; nothing it starts outlives the block."""
    line = [sys.executable, "-m", "locallip.start", "--standalone", f"--nproc_per_node={processes}", *command]
    with subprocess.Popen(
        [str(word) for word in line],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # Shells ignore Ctrl-C in what they start in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def launch(processes, *command):
    """Run a script in several processes to its end."""
    with started(processes, *command) as process:
        out, err = process.communicate(timeout=100)
    return Answer(process.returncode, out, err)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process finds."""
    pgd, arguments = worker.evaluation_module.pgd, sys.argv
    try:
        return worker.everything(tmp_path_factory.mktemp("alone"))
    finally:
        worker.evaluation_module.pgd, sys.argv = pgd, arguments


@pytest.fixture(scope="module", params=[2, 4])
def together(request, tmp_path_factory):
    """How many processes, and what they find."""
    folder = tmp_path_factory.mktemp(f"together{request.param}")
    for answer in run_at_once(environments_of(request.param), worker.main, folder):
        assert answer.code == 0, answer.err
    return request.param, torch.load(folder / "found.pt", weights_only=False)


@pytest.mark.parametrize("loss", worker.LOSSES)
def test_processes_have_the_loss_gradients_and_counts_of_one_on_the_union(alone, together, loss):
    one, several = alone[loss], together[1][loss]
    assert several["loss"].item() == pytest.approx(one["loss"].item(), rel=1e-9)
    assert several["means"] == pytest.approx(one["means"], rel=1e-9)
    for name in ("gradients", "parameters"):
        for found, expected in zip(several[name], one[name]):
            assert (found - expected).abs().max() <= 1e-9 * max(1, expected.abs().max())


def test_the_losses_are_different_ones(alone):
    assert len({round(alone[loss]["loss"].item(), 9) for loss in worker.LOSSES}) == len(worker.LOSSES)


@pytest.mark.parametrize("certificate", ["proven", "estimate"])
def test_evaluation_counts_every_image_once_and_in_its_place(alone, together, certificate):
    one, several = alone[certificate]["outcome"], together[1][certificate]["outcome"]
    assert 0 < one.certified.sum() < one.clean.sum() < 60
    for name in ("label", "prediction", "clean", "certified"):
        assert np.array_equal(getattr(several, name), getattr(one, name)), name
    assert np.allclose(several.margin, one.margin, rtol=1e-4, atol=1e-5)


def test_several_processes_find_what_one_does_to_the_last_digit(alone, together):
    for certificate in ("proven", "estimate"):
        one, several = alone[certificate], together[1][certificate]
        for name, column in vars(one["outcome"]).items():
            np.testing.assert_array_equal(column, getattr(several["outcome"], name), f"{certificate}, {name}")
        for description in (one["description"], several["description"]):
            description.pop("stage_seconds", None)
        assert several["description"] == one["description"]


def test_a_proof_by_several_processes_is_one_with_one_seed_and_one_failure_probability(together):
    description = together[1]["proven"]["description"]
    assert description["seed"] == 5
    assert len(together[1]["proven"]["outcome"].decided_by) == 60
    assert description["failure_probability"] == 1e-6


def test_values_travel_between_processes(together):
    processes, found = together
    assert found["exchange"]["gathered"] == list(range(processes))
    assert found["exchange"]["shared"] == "from 0"
    assert found["exchange"]["smallest"].item() == 6 - processes
    assert found["exchange"]["shards"] == {2: [3, 3], 4: [2, 2, 1, 1]}[processes]


@pytest.mark.parametrize("batch_size", [1, 3, 9])
def test_every_process_visits_its_own_part_once_an_epoch_in_as_many_steps_as_the_others(together, batch_size):
    processes, found = together
    visits = found["visits"][batch_size]
    steps = {len(batches) for batches in visits}
    assert len(steps) == 1
    half = steps.pop() // 2
    for rank, batches in enumerate(visits):
        assert all(batches)
        for epoch in (batches[:half], batches[half:]):
            assert sorted(image for batch in epoch for image in batch) == list(range(rank, 37, processes))
        assert batches[:half] != batches[half:]


@pytest.mark.parametrize("images", [[7], [4, 3], [10, 9, 9, 9], [33, 32], [2, 1, 1], [1, 1]])
@pytest.mark.parametrize("batch_size", [1, 2, 3, 32])
def test_weights_make_every_image_count_alike(images, batch_size):
    batches = count_batches(images, batch_size)
    weights = loss_weights(images, batch_size, batches)
    for batch in range(batches):
        sizes = [batch_sizes(count, batch_size, batches)[batch] for count in images]
        assert min(sizes) > 0
        per_image = [row[batch] / len(images) / size for row, size in zip(weights, sizes)]
        assert per_image == pytest.approx([1 / sum(sizes)] * len(images))


@pytest.mark.parametrize(
    ("images", "batch_size", "sizes"), [(7, 3, [3, 3, 1]), (6, 3, [3, 3]), (0, 3, []), (1, 9, [1])]
)
def test_one_process_has_full_batches_and_a_rest(images, batch_size, sizes):
    assert batch_sizes(images, batch_size) == sizes


def test_more_processes_than_images_are_refused():
    with pytest.raises(InputError, match="3 processes are more"):
        count_batches([1, 1, 0], 4)


# --- flags


@pytest.fixture
def launched(monkeypatch):
    """As if torchrun had started this process as one of four on this machine."""
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 29500}
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_WORLD_SIZE": 4, "LOCAL_RANK": 1, **meeting}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize(("device", "complaint"), [("cuda", "4 processes have 2 GPUs"), ("cuda:1", "one GPU for all")])
def test_every_process_needs_a_gpu_of_its_own(launched, monkeypatch, device, complaint):
    monkeypatch.setattr(devices, "select_device", torch.device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(InputError, match=complaint):
        distributed.select_device(device)


def test_without_torchrun_a_gpu_is_the_one_named(monkeypatch):
    monkeypatch.setattr(devices, "select_device", torch.device)
    assert distributed.select_device("cuda:1") == torch.device("cuda:1")


def test_apex_is_refused_where_there_is_none(call, few_digits, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", None)
    answer = call("train_mnist", *TINY, "--output_dir", tmp_path, "--ddp", "apex")
    assert answer.code == 2
    assert len(answer.err.splitlines()) == 1
    assert "25.05" in answer.err


@pytest.mark.parametrize(("flags", "complaint"), [(["--indices", "0,1"], "names 1"), (["--indices", "0,x"], "0,x")])
def test_layers_that_do_not_exist_are_refused(call, few_digits, tmp_path, flags, complaint):
    answer = call("train_mnist", *TINY, "--output_dir", tmp_path, *flags)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert complaint in answer.err


def test_singular_vectors_that_do_not_fit_are_refused_with_what_would_help(call, few_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(devices, "available_memory", lambda: 100_000)
    answer = call("train_mnist", *TINY, "--output_dir", tmp_path)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "--indices" in answer.err
    monkeypatch.setattr(devices, "available_memory", lambda: None)
    few = ["--epochs", 1, "--rampup", 0, "--test_sniter", 2, "--overwrite"]
    assert call("train_mnist", *TINY, "--output_dir", tmp_path, *few).code == 0


def test_local_norms_at_fewer_layers_keep_fewer_vectors(call, few_digits, tmp_path, monkeypatch):
    kept, make = [], training_run.make_room

    def record(*given):
        kept.append(make(*given))
        return kept[-1]

    monkeypatch.setattr(training_run, "make_room", record)
    few = ["--epochs", 1, "--rampup", 0, "--test_sniter", 2, "--overwrite", "--output_dir", tmp_path]
    for flags in (["--indices", "9,11"], ["--indices", "0,9,11"], []):
        assert call("train_mnist", *TINY, *few, *flags).code == 0
    # In half precision, on the smaller side of each layer: 2 bytes times 128 images times units.
    units = {position: layer.weight.shape[0] for position, layer in enumerate(kept_net()) if position in (9, 11)}
    assert kept[0].bytes == 2 * 128 * sum(units.values())
    assert kept[0].bytes < kept[1].bytes < kept[2].bytes


def kept_net():
    return utils.select_model("digits", "relux", width=TINY[3])


# --- for real

RUN = [*TINY, "--epochs", 2, "--rampup", 1, "--batch_size", 8, "--epsilon", 0.1, "--epsilon_train", 0.1]
RUN += ["--test_sniter", 2, "--sniter", 1]
FEW_DIGITS = """
import os, signal, sys
sys.path.insert(0, {root!r})
import locallip.files, train_mnist, utils
from locallip.training.step import Step

load_data, step = utils.load_data, Step.__call__
steps = 0

def die_in_the_second_epoch(self, *given):
    global steps
    steps += 1
    if os.environ["RANK"] == {victim!r} and steps == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *given)

Step.__call__ = die_in_the_second_epoch
utils.load_data = lambda data, data_dir, train: load_data(data, data_dir, train)[: 66 if train else 21]
locallip.files.run_script(train_mnist.main)
"""


def few_digits_script(folder, victim):
    path = folder / "train_few.py"
    path.write_text(FEW_DIGITS.format(root=str(ROOT), victim=victim))
    return path


def test_death_of_a_process_ends_all_names_its_rank_and_the_run_can_be_resumed(tmp_path):
    files = ["--output_dir", tmp_path, "--prefix", "few", "--keep_vectors"]
    started = time.monotonic()
    answer = launch(2, few_digits_script(tmp_path, "1"), *RUN, *files)
    assert time.monotonic() - started < 60
    assert answer.code == 1
    assert re.findall("^error: .*", answer.err, re.M) == ["error: rank 1: ended by SIGKILL"], answer.err
    assert "66 training images, 21 test images" in answer.out
    assert "in each of 2 processes" in answer.out
    checkpoint = checkpoints.load_checkpoint(tmp_path / "few_checkpoint.pth")
    assert (checkpoint["epoch"], len(checkpoint["shuffle"])) == (1, 2)
    first = read_csv(tmp_path / "few_epochs.csv")
    kept = sorted(path.name for path in tmp_path.glob("*_vectors*"))
    assert kept == [f"few_vectors_{rank}.pth" for rank in range(2)]

    answer = launch(2, few_digits_script(tmp_path, "nobody"), *RUN, *files, "--resume")
    assert answer.code == 0, answer.err
    assert answer.out.count("resuming after epoch 1 of 2") == 1
    assert "anew" not in answer.out
    rows = read_csv(tmp_path / "few_epochs.csv")
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert rows[:1] == first
    shuffles = checkpoints.load_checkpoint(tmp_path / "few_checkpoint.pth")["shuffle"]
    assert not torch.equal(shuffles, checkpoint["shuffle"])

    # Another number of processes would have other shards.
    with pytest.raises(InputError, match="2 processes, not 1"):
        resume_alone(tmp_path)


def resume_alone(folder):
    args = checkpoints.load_checkpoint(folder / "few_checkpoint.pth")["arguments"]
    args = worker.argparse.Namespace(**args | {"resume": True})
    model = utils.select_model("digits", "relux", width=args.width)
    training_run.train(model, worker.first_digits(9), worker.first_digits(9), args)


def test_evaluation_in_two_processes_prints_one_report(saved_net, tmp_path):
    flags = ["--saved_model", saved_net, "--images", 9, "--epsilon", 0.01, "--out", tmp_path / "report"]
    answer = launch(2, "evaluate.py", *TINY, *flags)
    assert answer.code == 0, answer.err
    assert answer.out.count("digits: 9 test images") == 1
    rows = read_csv(tmp_path / "report" / "images.csv")
    assert [int(row["index"]) for row in rows] == list(range(9))


THREADS_AFTER_A_GROUP = """
import pathlib, sys
sys.path.insert(0, {root!r})
from locallip import distributed

def names():
    return [path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")]

with distributed.process_group("cpu"):
    import torch._dynamo
    distributed.gather(1)
    during = names()
assert "gloo" in str(during)
assert "gloo" not in str(names())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks at threads as Linux shows them")
def test_no_thread_of_the_connection_outlives_it(tmp_path):
    """Such a thread may ask for the interpreter while it shuts down, and abort the process."""
    (tmp_path / "threads.py").write_text(THREADS_AFTER_A_GROUP.format(root=str(ROOT)))
    answer = launch(2, tmp_path / "threads.py")
    assert answer.code == 0, answer.err


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_several_processes_that_are_stopped_end_without_a_traceback(tmp_path, sent):
    with started(2, "train_mnist.py", *TINY, "--output_dir", tmp_path, "--prefix", "few", "--epochs", 300) as process:
        while not (tmp_path / "few_checkpoint.pth").exists() and process.poll() is None:
            time.sleep(0.2)
        process.send_signal(sent)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 128 + sent
    assert "Traceback" not in err
    checkpoints.load_checkpoint(tmp_path / "few_checkpoint.pth")


def test_bad_input_of_several_processes_is_one_line(tmp_path):
    answer = launch(2, "train_mnist.py", *TINY, "--output_dir", tmp_path, "--epochs", 3)
    assert answer.code == 2
    assert "error: rank 0: --epochs 3 is less than" in answer.err
    assert len(answer.err.splitlines()) == 1
