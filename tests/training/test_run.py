"""Training runs of tiny nets: losses, logs, checkpoints, accidents."""

import math
import os
import signal

import pytest
import torch
from conftest import losses, read_csv, without_seconds
from forks import Fork

import train_mnist
import utils
from locallip import checkpoints
from locallip.bound.walk import propagate, walk_through
from locallip.files import InputError
from locallip.training import run as training_run
from locallip.training import step as training_step
from locallip.training import validation
from locallip.training.losses import LOSSES, Loss
from locallip.training.run import TrainingDiverged


def watch_bounds(monkeypatch, look):
    """Shows `look` what every bound of training and validation is asked for: images, radius, norms, options."""

    def look_and_propagate(model, x, epsilon, norms, **options):
        look(x, epsilon, norms, **options)
        return propagate(model, x, epsilon, norms, **options)

    def look_and_walk(graph, x, epsilon, norms, **options):
        assert (epsilon == epsilon[0]).all()
        look(x, float(epsilon[0]), norms, **options)
        return walk_through(graph, x, epsilon, norms, **options)

    for module in (validation, training_step):
        monkeypatch.setattr(module, "propagate", look_and_propagate)
    monkeypatch.setattr(training_step, "walk_through", look_and_walk)


@pytest.mark.parametrize("loss", LOSSES)
def test_training_lowers_the_loss_and_logs_every_epoch(runs, loss):
    # At a constant epsilon and loss, so that the epochs can be compared.
    log = runs.train("--loss", loss, "--rampup", 0, "--lr_scheduler", "constant").log
    assert [row["epoch"] for row in read_csv(log)] == ["1", "2", "3", "4"]
    assert losses(log)[-1] < losses(log)[0]


def test_validation_looks_for_underflow_in_full_precision_and_training_does_not(runs, monkeypatch):
    asked = set()

    def look(x, epsilon, norms, **options):
        rounds = norms.arithmetic.factors is not None
        asked.add((torch.is_grad_enabled(), norms.arithmetic.looks_for_underflow, rounds))

    watch_bounds(monkeypatch, look)
    runs.train("--epochs", 1, "--rampup", 0, "--bfloat16")
    # Beside training and validation stands the look at the layout, which computes no norm that counts.
    assert asked == {(True, False, True), (False, True, False)}


@pytest.mark.parametrize("choice", ["auto", "no"])
def test_on_a_cpu_a_step_is_not_recorded(runs, choice, monkeypatch):
    kinds = set()
    finish = training_run._Run._finish_epoch
    monkeypatch.setattr(
        training_run._Run, "_finish_epoch", lambda run, *found: (kinds.add(type(run.step)), finish(run, *found))
    )
    runs.train("--epochs", 1, "--rampup", 0, "--cuda_graph", choice)
    assert kinds == {training_step.Step}


def test_the_losses_are_different_ones(runs):
    short = ["--epochs", 1, "--rampup", 0]
    found = {name: losses(runs.train(*short, "--loss", name, name=name).log)[0] for name in LOSSES}
    assert len({*found.values()}) == len(LOSSES)
    assert losses(runs.train(*short, name="default").log)[0] == found["bcp"]
    assert losses(runs.train(*short, "--gloro", name="short form").log)[0] == found["gloro"]


@pytest.mark.parametrize("loss", ["gloro-kl", "margin", "cll"])
def test_a_weight_is_the_default_of_its_loss_unless_another_is_given(runs, loss):
    short = ["--epochs", 1, "--rampup", 0, "--loss", loss]
    default, same, other = (
        losses(runs.train(*short, *weight, name=str(number)).log)[0]
        for number, weight in enumerate([[], ["--loss_weight", LOSSES[loss].weight], ["--loss_weight", 0.7]])
    )
    assert default == same != other


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--loss", "hinge"], "invalid choice: 'hinge'"),
        (["--loss", "margin", "--gloro"], "not allowed with argument --loss"),
        (["--loss_weight", 1], "--loss bcp has no --loss_weight; those that have one are gloro-kl, margin, cll"),
        (["--loss", "cll", "--loss_weight", 1], "must be smaller than 1, got 1"),
        (["--loss", "gloro-kl", "--loss_weight", 0], "must be greater than 0"),
        (["--loss", "gloro-kl", "--loss_weight", "nan"], "must be a finite number"),
        (["--loss", "cll", "--epsilon_train", 0], "--epsilon_train, which must be greater than 0"),
    ],
)
def test_a_loss_that_cannot_be_is_refused_in_one_line(call, flags, complaint):
    answer = call("train_mnist", *flags)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert complaint in answer.err


def test_the_log_follows_the_schedule(runs):
    rows = read_csv(runs.train().log)
    assert [float(row["epsilon"]) for row in rows] == [0.15, 0.3, 0.3, 0.3]
    assert [float(row["kappa"]) for row in rows] == [0.5, 0, 0, 0]
    assert [float(row["lr"]) for row in rows[:2]] == [5e-3, 5e-3]
    assert float(rows[-1]["lr"]) == pytest.approx(5e-6)


def test_a_linear_rate_falls_from_step_to_step(runs, monkeypatch):
    rates, step = [], training_step.Step.__call__

    def record(self, *given):
        rates.append(self.optimizer.param_groups[0]["lr"])
        return step(self, *given)

    monkeypatch.setattr(training_step.Step, "__call__", record)
    rows = read_csv(runs.train("--lr_scheduler", "linear", "--end_lr", 0.001, "--lr_warmup", 1).log)
    expected = [5e-3 * min(1, step / 4) - 4e-3 * max(0, step - 4) / 12 for step in range(16)]  # 4 batches an epoch
    assert rates == pytest.approx(expected)
    assert [float(row["lr"]) for row in rows] == rates[3::4]


def test_epsilon_rises_from_batch_to_batch(runs, monkeypatch):
    radii = []

    def look(x, epsilon, norms, **options):
        if torch.is_grad_enabled():
            radii.append(epsilon)

    watch_bounds(monkeypatch, look)
    runs.train()
    assert radii == pytest.approx([0.3 * min(batch / 8, 1) for batch in range(16)])  # 4 batches an epoch


def test_the_same_seed_gives_the_same_run(runs):
    first, again = runs.train(name="first"), runs.train(name="again")
    assert without_seconds(first.log) == without_seconds(again.log)
    states = [checkpoints.load_checkpoint(files.checkpoint)["state_dict"] for files in (first, again)]
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
    state = checkpoints.load_checkpoint(files.checkpoint)["state_dict"]
    thresholds = torch.cat([value.flatten() for key, value in state.items() if key.endswith("threshold")])
    assert thresholds.min() == 0


def test_val_split_holds_out_training_images_and_leaves_the_test_set_alone(runs, few_digits, monkeypatch):
    given_sets = []
    monkeypatch.setattr(training_run, "train", lambda model, *sets_and_args: given_sets.extend(sets_and_args[:2]))
    runs.train("--val_split", 28)
    assert [len(images) for images in given_sets] == [100, 28]
    pixels = sorted(image.numpy().tobytes() for images in given_sets for image in images.images)
    assert pixels == sorted(image.numpy().tobytes() for image in few_digits[True].images)


def test_without_val_split_the_test_set_picks_the_best_epoch(runs, few_digits, monkeypatch):
    given_sets = []
    monkeypatch.setattr(training_run, "train", lambda model, *sets_and_args: given_sets.extend(sets_and_args[:2]))
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


# --- accidents


def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_checkpoints(runs, monkeypatch):
    runs.train_until(1)
    before = runs.contents()
    bcp, batches = LOSSES["bcp"], iter(range(1, 5))

    def nan_in_batch_3(situation):
        return bcp.compute(situation) * (math.nan if next(batches) == 3 else 1)

    monkeypatch.setitem(LOSSES, "bcp", Loss(nan_in_batch_3))
    with pytest.raises(TrainingDiverged, match=r"epoch 2, batch 3, at epsilon 0\.225;"):
        runs.train("--resume")
    assert runs.contents() == before


def die_while_saving():
    save = torch.save

    def save_half_and_die(checkpoint, path):
        save(checkpoint, path)
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save_half_and_die
    train_mnist.main()


def test_kill_during_save_leaves_the_earlier_checkpoint(runs):
    runs.train_until(1)
    before = runs.contents()
    answer = Fork(die_while_saving, *runs.flags(), "--resume").end()
    assert answer.code == -signal.SIGKILL, answer.err
    after = runs.contents()
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1  # the half-written temporary file
    assert [row["epoch"] for row in read_csv(runs.train("--resume").log)] == ["1", "2", "3", "4"]


def test_weights_that_are_not_finite_are_never_saved(runs, monkeypatch):
    runs.train("--epochs", 1, "--rampup", 0)
    before = runs.contents()
    step = training_step.Step.__call__

    def spoil_the_last_step(self, *given):
        loss, *others = step(self, *given)
        self.loss.model[0].weight.data[0] = torch.nan
        return loss * 0 + 1, *others

    monkeypatch.setattr(training_step.Step, "__call__", spoil_the_last_step)
    monkeypatch.setattr(training_run._Run, "_validate", lambda run, box: {})
    with pytest.raises(TrainingDiverged, match="epoch 1"):
        runs.train("--epochs", 1, "--rampup", 0, "--overwrite")
    assert runs.contents() == before


# --- convolutions in bfloat16


@pytest.mark.parametrize("flags", [[], ["--bfloat16"], ["--bfloat16", "--global_epochs", 4]])
def test_training_rounds_where_asked_to_and_validation_never_does(runs, monkeypatch, flags):
    seen = []

    def look(x, epsilon, norms, **options):
        if x.shape[0] > 1:
            seen.append((torch.is_grad_enabled(), norms.arithmetic.factors))

    watch_bounds(monkeypatch, look)
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
    seen = []
    watch_bounds(monkeypatch, lambda *args, box=True, **options: seen.append(box))
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
