import math
import signal
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, read_csv, spawn
from hypothesis import given
from hypothesis import strategies as st

import train_mnist
import training
import utils
from training import Schedule, Tally, TrainingDiverged
from utils import InputError

# --- schedules


def schedule(epochs=10, warmup=2, rampup=4, epsilon=1.6, lr=1e-2, end_lr=1e-4, constant_epochs=5.0):
    return Schedule(epochs, warmup, rampup, epsilon, lr, end_lr, constant_epochs)


@pytest.mark.parametrize(
    ("time", "ramp"), [(0, 0), (1.99, 0), (2, 0), (2.5, 0.125), (3, 0.25), (4, 0.5), (5.75, 0.9375), (6, 1), (10, 1)]
)
def test_epsilon_rises_and_kappa_falls_linearly_after_the_warm_up(time, ramp):
    assert schedule().epsilon_at(time) == pytest.approx(1.6 * ramp)
    assert schedule().kappa_at(time) == pytest.approx(1 - ramp)


def test_without_warm_up_the_ramp_starts_at_once():
    assert [schedule(warmup=0).epsilon_at(time) for time in (0, 0.5, 4)] == pytest.approx([0, 0.2, 1.6])


def test_without_ramp_up_epsilon_is_full_right_after_the_warm_up():
    steep = schedule(rampup=0)
    assert [steep.epsilon_at(time) for time in (0, 1.99, 2, 10)] == [0, 0, 1.6, 1.6]
    assert [steep.kappa_at(time) for time in (0, 1.99, 2, 10)] == [1, 1, 0, 0]


def test_without_warm_up_and_ramp_up_epsilon_is_full_from_the_start():
    assert schedule(warmup=0, rampup=0).epsilon_at(0) == 1.6


@given(warmup=st.integers(0, 5), rampup=st.integers(0, 5), times=st.lists(st.floats(0, 20), min_size=2))
def test_epsilon_never_falls_and_stays_in_its_range(warmup, rampup, times):
    radii = [schedule(warmup=warmup, rampup=rampup).epsilon_at(time) for time in sorted(times)]
    assert radii == sorted(radii)
    assert 0 <= radii[0] <= radii[-1] <= 1.6


def test_the_published_learning_rate_is_constant_for_175_of_300_epochs_then_falls_exponentially():
    published = schedule(epochs=300, lr=1e-3, end_lr=5e-6, constant_epochs=300 / 2 + 25)
    rates = [published.lr_at(epoch) for epoch in range(300)]
    assert rates[:175] == [1e-3] * 175
    assert [b / a for a, b in pairwise(rates[174:])] == pytest.approx([(5e-6 / 1e-3) ** (1 / 125)] * 125)
    assert rates[299] == pytest.approx(5e-6)


@given(epochs=st.integers(1, 400), more=st.integers(0, 250))
def test_the_last_epoch_has_end_lr_unless_the_rate_stays_constant(epochs, more):
    constant = epochs / 2 + more
    last = schedule(epochs=epochs, constant_epochs=constant).lr_at(epochs - 1)
    assert last == pytest.approx(1e-4 if epochs - 1 >= constant else 1e-2)


@pytest.mark.parametrize("constant_epochs", [None, 10.0, 12.5])
def test_the_learning_rate_can_stay_constant(constant_epochs):
    assert {schedule(constant_epochs=constant_epochs).lr_at(epoch) for epoch in range(10)} == {1e-2}


@pytest.mark.parametrize(
    ("flags", "constant_epochs"),
    [
        ([], 175),
        (["--more", 0], 150),
        (["--epochs", 12, "--rampup", 6], 7),
        (["--scale", 0.1], 17),
        (["--lr_scheduler", "constant"], None),
    ],
)
def test_the_schedule_follows_the_command_line(command_line, flags, constant_epochs):
    command_line(*flags)
    args = utils.training_arguments("", ["mnist"], train_mnist.DEFAULTS)
    assert Schedule.from_arguments(args).constant_epochs == constant_epochs


@pytest.mark.parametrize(("scale", "lengths"), [(0.1, (30, 2, 15)), (2, (600, 40, 300)), (1, (300, 20, 150))])
def test_scale_stretches_all_lengths_alike(command_line, scale, lengths):
    command_line("--warmup", 20, "--scale", scale)
    args = utils.training_arguments("", ["mnist"], train_mnist.DEFAULTS)
    assert (args.epochs, args.warmup, args.rampup) == lengths


# --- counting

RIGHT, WRONG, TIE, NAN = [3.0, 1.0, 0.0], [1.0, 3.0, 0.0], [2.0, 2.0, 0.0], [2.0, math.nan, 0.0]


def tally_of(*batches):
    tally = Tally(torch.device("cpu"))
    for loss, logits, worst in batches:
        label = torch.zeros(len(logits), dtype=torch.long)
        tally.add(torch.tensor(loss), torch.tensor(logits), torch.tensor(worst), label)
    return tally


def test_tally_weighs_every_image_alike_whatever_its_batch():
    tally = tally_of((1.0, [RIGHT, RIGHT, RIGHT], [RIGHT, RIGHT, WRONG]), (5.0, [WRONG], [WRONG]))
    assert tally.means() == pytest.approx((2.0, 0.25, 0.5))


@pytest.mark.parametrize("worst", [WRONG, TIE, NAN])
def test_tally_certifies_by_a_strict_and_finite_margin_only(worst):
    assert tally_of((0.0, [RIGHT, RIGHT], [RIGHT, worst])).means() == (0, 0, 0.5)


def test_an_empty_tally_has_means():
    assert tally_of().means() == (0, 0, 0)


# --- training runs

FLAGS = [*TINY, "--epochs", 4, "--rampup", 2, "--batch_size", 32, "--epsilon", 0.2, "--epsilon_train", 0.3]
FLAGS += ["--lr", 5e-3, "--test_sniter", 5]


class Runs:
    """Training runs with tiny nets below one folder, one subfolder each."""

    def __init__(self, folder, command_line, monkeypatch):
        self.folder, self.command_line, self.monkeypatch = folder, command_line, monkeypatch

    def files(self, name="run"):
        best, checkpoint, log = (
            self.folder / name / f"tiny{ending}" for ending in ("_best.pth", "_checkpoint.pth", "_epochs.csv")
        )
        return SimpleNamespace(best=best, checkpoint=checkpoint, log=log)

    def contents(self, name="run"):
        return {path.name: path.read_bytes() for path in (self.folder / name).iterdir()}

    def flags(self, name="run"):
        return [*FLAGS, "--output_dir", self.folder / name, "--prefix", "tiny"]

    def train(self, *flags, name="run"):
        self.command_line(*self.flags(name), *flags)
        train_mnist.main()
        return self.files(name)

    def train_until(self, epoch, *flags, name="run"):
        """As if somebody pressed Ctrl-C just after an epoch was saved."""
        finish_epoch = training._Run._finish_epoch

        def finish_epoch_and_stop(run, finished, row):
            finish_epoch(run, finished, row)
            if finished + 1 == epoch:
                raise KeyboardInterrupt

        with self.monkeypatch.context() as patch:
            patch.setattr(training._Run, "_finish_epoch", finish_epoch_and_stop)
            with pytest.raises(KeyboardInterrupt):
                self.train(*flags, name=name)

    def train_in_two_parts(self, *flags, name="run"):
        self.train_until(2, *flags, name=name)
        return self.train("--resume", *flags, name=name)


@pytest.fixture
def runs(tmp_path, command_line, monkeypatch, few_digits):
    return Runs(tmp_path, command_line, monkeypatch)


def without_seconds(log):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_csv(log)]


def losses(log):
    return [float(row["loss"]) for row in read_csv(log)]


@pytest.mark.parametrize("loss", [[], ["--gloro"]], ids=["bcp", "gloro"])
def test_training_lowers_the_loss_and_logs_every_epoch(runs, loss):
    # At a constant epsilon and loss, so that the epochs can be compared.
    log = runs.train(*loss, "--rampup", 0, "--lr_scheduler", "constant").log
    assert [row["epoch"] for row in read_csv(log)] == ["1", "2", "3", "4"]
    assert losses(log)[-1] < losses(log)[0]


def test_bcp_and_gloro_are_different_losses(runs):
    assert losses(runs.train(name="bcp").log)[0] != losses(runs.train("--gloro", name="gloro").log)[0]


def test_the_log_follows_the_schedule(runs):
    rows = read_csv(runs.train().log)
    assert [float(row["epsilon"]) for row in rows] == [0.15, 0.3, 0.3, 0.3]
    assert [float(row["kappa"]) for row in rows] == [0.5, 0, 0, 0]
    assert [float(row["lr"]) for row in rows[:2]] == [5e-3, 5e-3]
    assert float(rows[-1]["lr"]) == pytest.approx(5e-6)


def test_epsilon_rises_from_batch_to_batch(runs, monkeypatch):
    radii, propagate = [], training.propagate

    def record(model, x, epsilon, norms, **options):
        if torch.is_grad_enabled():
            radii.append(epsilon)
        return propagate(model, x, epsilon, norms, **options)

    monkeypatch.setattr(training, "propagate", record)
    runs.train()
    assert radii == pytest.approx([0.3 * min(batch / 8, 1) for batch in range(16)])  # 4 batches an epoch


def test_the_same_seed_gives_the_same_run(runs):
    first, again = runs.train(name="first"), runs.train(name="again")
    assert without_seconds(first.log) == without_seconds(again.log)
    states = [utils.load_checkpoint(files.checkpoint)["state_dict"] for files in (first, again)]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_another_seed_gives_another_run(runs):
    assert losses(runs.train(name="first").log) != losses(runs.train("--seed", 1, name="other").log)


def test_checkpoints_have_the_published_layout(runs):
    files = runs.train()
    for path in (files.best, files.checkpoint):
        checkpoint = torch.load(path, weights_only=True)
        assert checkpoint.keys() >= {"state_dict", "err", "epoch"}
        assert "0.weight" in checkpoint["state_dict"]
    assert checkpoint["epoch"] == 4


def test_the_best_checkpoint_is_of_the_epoch_with_the_smallest_certified_error(runs):
    files = runs.train()
    errors = [float(row["validation_certified_error"]) for row in read_csv(files.log)]
    best = torch.load(files.best, weights_only=True)
    assert best["err"] == min(errors)
    assert best["epoch"] == 1 + errors.index(min(errors))


def test_thresholds_never_become_negative(runs):
    # They start so low, and the steps are so long, that many would cross zero.
    files = runs.train("--init", 0.01, "--lr", 0.05)
    state = utils.load_checkpoint(files.checkpoint)["state_dict"]
    thresholds = torch.cat([value.flatten() for key, value in state.items() if key.endswith("threshold")])
    assert thresholds.min() == 0


def test_val_split_holds_out_training_images_and_leaves_the_test_set_alone(runs, few_digits, monkeypatch):
    given_sets = []
    monkeypatch.setattr(training, "train", lambda model, *sets_and_args: given_sets.extend(sets_and_args[:2]))
    runs.train("--val_split", 28)
    assert [len(images) for images in given_sets] == [100, 28]
    pixels = sorted(image.numpy().tobytes() for images in given_sets for image in images.images)
    assert pixels == sorted(image.numpy().tobytes() for image in few_digits[True].images)


def test_without_val_split_the_test_set_picks_the_best_epoch(runs, few_digits, monkeypatch):
    given_sets = []
    monkeypatch.setattr(training, "train", lambda model, *sets_and_args: given_sets.extend(sets_and_args[:2]))
    runs.train()
    assert [len(images) for images in given_sets] == [128, 64]
    assert torch.equal(given_sets[1].images, few_digits[False].images)


# --- a run that is there already


def test_a_second_run_on_a_prefix_is_refused_and_changes_nothing(runs):
    runs.train("--epochs", 1, "--rampup", 0)
    before = runs.contents()
    with pytest.raises(InputError, match="--overwrite"):
        runs.train()
    assert runs.contents() == before


def test_overwrite_starts_afresh(runs):
    fresh = runs.train(name="fresh")
    runs.train("--seed", 1)
    assert without_seconds(runs.train("--overwrite").log) == without_seconds(fresh.log)


# --- resuming


@pytest.mark.parametrize("loss", [[], ["--gloro"]], ids=["bcp", "gloro"])
def test_a_resumed_run_agrees_with_an_uninterrupted_one(runs, loss):
    straight = runs.train(*loss, name="straight")
    resumed = runs.train_in_two_parts(*loss, name="resumed")
    assert [row["epoch"] for row in read_csv(resumed.log)] == ["1", "2", "3", "4"]
    assert losses(resumed.log)[:2] == losses(straight.log)[:2]
    # The singular vectors are re-estimated, closer to the true ones than the short warm-started iterations were.
    assert losses(resumed.log)[2:] == pytest.approx(losses(straight.log)[2:], rel=0.05)


def test_but_for_the_singular_vectors_a_resumed_run_is_the_uninterrupted_one(runs, monkeypatch):
    straight = runs.train(name="straight")
    kept, make = [], training._Run._make_room
    monkeypatch.setattr(training, "RESUME_ITERATIONS", 1)
    monkeypatch.setattr(training._Run, "_make_room", lambda run, layout: kept[0] if kept else keep(make(run, layout)))

    def keep(vectors):
        kept.append(vectors)
        return vectors

    resumed = runs.train_in_two_parts(name="resumed")
    assert without_seconds(resumed.log) == without_seconds(straight.log)


def test_a_resumed_run_goes_on_with_the_order_of_the_images_and_the_schedule(runs, monkeypatch):
    visits, step = [], training.Step.__call__

    def record(self, x, y, indices, epsilon, kappa, *more):
        visits.append((epsilon, kappa, indices.tolist()))
        return step(self, x, y, indices, epsilon, kappa, *more)

    monkeypatch.setattr(training.Step, "__call__", record)
    runs.train(name="straight")
    straight = visits.copy()
    visits.clear()
    runs.train_in_two_parts(name="resumed")
    assert visits == straight


def test_a_resumed_run_keeps_the_best_epoch_of_before(runs, monkeypatch):
    errors = iter([0.5, 0.3, 0.4, 0.35])
    monkeypatch.setattr(
        training._Run,
        "_validate",
        lambda run, box: {"validation_clean_error": 0.0, "validation_certified_error": next(errors)},
    )
    best = torch.load(runs.train_in_two_parts().best, weights_only=True)
    assert (best["err"], best["epoch"]) == (0.3, 2)


def test_resuming_a_finished_run_changes_nothing(runs):
    runs.train()
    before = runs.contents()
    runs.train("--resume")
    assert runs.contents() == before


@pytest.mark.parametrize(
    "flags", [["--lr", 0.1], ["--epochs", 5], ["--gloro"], ["--seed", 1], ["--val_split", 28], ["--width", 0.1]]
)
def test_resume_refuses_other_arguments(runs, flags):
    runs.train("--epochs", 1, "--rampup", 0)
    before = runs.contents()
    with pytest.raises(InputError, match=flags[0]):
        runs.train("--epochs", 1, "--rampup", 0, *flags, "--resume")
    assert runs.contents() == before


def test_a_refused_resume_names_the_run_to_begin_instead(runs):
    checkpoint = runs.train("--epochs", 1, "--rampup", 0).checkpoint
    with pytest.raises(InputError, match=f"another --prefix --start_from {checkpoint}$"):
        runs.train("--epochs", 2, "--rampup", 0, "--resume")
    with pytest.raises(InputError, match=r"another --prefix$"):  # the weights would not fit
        runs.train("--epochs", 1, "--rampup", 0, "--width", 0.1, "--resume")


def test_resume_refuses_a_prefix_without_a_run(runs):
    with pytest.raises(InputError, match="no checkpoint"):
        runs.train("--resume")


def test_resume_refuses_a_checkpoint_without_what_resuming_needs(runs, tiny_net):
    path = runs.files().checkpoint
    utils.save_checkpoint(path, {"state_dict": tiny_net.state_dict(), "err": 0.5, "epoch": 1})
    with pytest.raises(InputError, match=r"cannot be resumed: it has no .*optimizer"):
        runs.train("--resume")


# --- starting from the weights of another run


def test_a_run_starts_from_the_weights_of_another(runs):
    first = runs.train(name="first").checkpoint
    trained = utils.load_checkpoint(first)["state_dict"]
    one_epoch = ["--epochs", 1, "--rampup", 0, "--lr", 1e-30, "--start_from", first]
    again = utils.load_checkpoint(runs.train(*one_epoch, name="again").checkpoint)
    assert all(torch.equal(again["state_dict"][key], trained[key]) for key in trained)  # lr 1e-30 moves nothing
    assert again["arguments"]["start_from"] == str(first)
    assert (again["epoch"], len(again["rows"])) == (1, 1)
    assert max(state["step"] for state in again["optimizer"]["state"].values()) == 4  # batches of one epoch


def test_a_run_that_started_from_weights_remembers_it_when_resumed(runs):
    first = runs.train("--epochs", 1, "--rampup", 0, name="first").best
    runs.train_until(2, "--start_from", first, name="parts")
    parts = runs.train("--resume", name="parts")
    assert utils.load_checkpoint(parts.checkpoint)["arguments"]["start_from"] == str(first)
    assert len(read_csv(parts.log)) == 4


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--width", 0.1], "of another architecture"),
        (["--start_from", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--resume"], "excludes --start_from"),
    ],
)
def test_weights_that_cannot_be_started_from_are_refused_and_nothing_is_written(runs, saved_net, flags, complaint):
    with pytest.raises(InputError, match=complaint):
        runs.train("--start_from", saved_net, *flags)
    assert not [path for path in runs.folder.rglob("tiny*") if path.is_file()]


# --- accidents


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoints(runs, monkeypatch):
    runs.train_until(1)
    before = runs.contents()
    bcp_loss, batches = training.bcp_loss, iter(range(1, 5))

    def nan_in_batch_3(*arguments):
        return bcp_loss(*arguments) * (math.nan if next(batches) == 3 else 1)

    monkeypatch.setattr(training, "bcp_loss", nan_in_batch_3)
    with pytest.raises(TrainingDiverged, match=r"epoch 2, batch 3, at epsilon 0\.225;"):
        runs.train("--resume")
    assert runs.contents() == before


DIE_WHILE_SAVING = """
import os, signal
import torch, train_mnist, training

load_data, save = training.load_data, torch.save

def save_half_and_die(checkpoint, path):
    save(checkpoint, path)
    os.truncate(path, os.path.getsize(path) // 2)
    os.kill(os.getpid(), signal.SIGKILL)

torch.save = save_half_and_die
training.load_data = lambda data, data_dir, train: load_data(data, data_dir, train)[: 128 if train else 64]
train_mnist.main()
"""


def test_kill_during_save_leaves_the_earlier_checkpoint(runs):
    runs.train_until(1)
    before = runs.contents()
    answer = spawn("-c", DIE_WHILE_SAVING, *runs.flags(), "--resume")
    assert answer.code == -signal.SIGKILL, answer.err
    after = runs.contents()
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1  # the half-written temporary file
    assert [row["epoch"] for row in read_csv(runs.train("--resume").log)] == ["1", "2", "3", "4"]


def test_weights_that_are_not_finite_are_never_saved(runs, monkeypatch):
    runs.train("--epochs", 1, "--rampup", 0)
    before = runs.contents()
    step = training.Step.__call__

    def spoil_the_last_step(self, *given):
        loss, *others = step(self, *given)
        self.loss.model[0].weight.data[0] = torch.nan
        return loss * 0 + 1, *others

    monkeypatch.setattr(training.Step, "__call__", spoil_the_last_step)
    monkeypatch.setattr(training._Run, "_validate", lambda run, box: {})
    with pytest.raises(training.TrainingDiverged, match="epoch 1"):
        runs.train("--epochs", 1, "--rampup", 0, "--overwrite")
    assert runs.contents() == before


# --- convolutions in bfloat16


@pytest.mark.parametrize("flags", [[], ["--bfloat16"], ["--bfloat16", "--global_epochs", 4]])
def test_training_rounds_where_asked_to_and_validation_never_does(runs, monkeypatch, flags):
    seen, propagate = [], training.propagate

    def watch(model, x, epsilon, norms, **kwargs):
        if isinstance(epsilon, float) and x.shape[0] > 1:
            seen.append((model.training, norms.factors))
        return propagate(model, x, epsilon, norms, **kwargs)

    monkeypatch.setattr(training, "propagate", watch)
    runs.train(*flags)
    assert set(seen) == {(True, torch.bfloat16 if flags else None), (False, None)}


def test_training_in_bfloat16_learns_what_training_in_float32_does(runs):
    exact = without_seconds(runs.train(name="exact").log)[-1]
    rounded = without_seconds(runs.train("--bfloat16", name="rounded").log)[-1]
    assert float(rounded["loss"]) != float(exact["loss"])
    assert float(rounded["loss"]) == pytest.approx(float(exact["loss"]), rel=0.05)


# --- epochs with the ball alone


def watch_boxes(monkeypatch):
    """Whether training and validation had a box, in the order of the batches."""
    seen, propagate = [], training.propagate

    def watch(*args, box=True, **kwargs):
        seen.append(box)
        return propagate(*args, box=box, **kwargs)

    monkeypatch.setattr(training, "propagate", watch)
    return seen


def test_the_first_epochs_can_go_without_a_box(runs, monkeypatch):
    seen = watch_boxes(monkeypatch)
    runs.train("--global_epochs", 2)
    batches = (len(seen) - 1) // 4  # training and validation; the first look lays out the singular vectors
    assert seen == [True] + [False] * 2 * batches + [True] * 2 * batches


def test_without_any_box_no_singular_vectors_are_kept(runs, capsys):
    runs.train("--global_epochs", 4)
    assert "singular vectors: 0.0 MB" in capsys.readouterr().out


def test_scale_shortens_the_epochs_without_a_box_too(command_line):
    command_line("--global_epochs", 300, "--scale", 0.1)
    assert utils.training_arguments("", ["mnist"], train_mnist.DEFAULTS).global_epochs == 30


def test_a_run_resumed_among_the_epochs_without_a_box_is_the_uninterrupted_one(runs):
    flags = ["--global_epochs", 4, "--orthogonal"]
    resumed = runs.train_in_two_parts(*flags, name="two parts")
    whole = runs.train(*flags, name="whole")
    for ours, theirs in zip(without_seconds(resumed.log), without_seconds(whole.log)):
        for name in ours:
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=0.02), name
