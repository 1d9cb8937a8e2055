"""The moving average of the weights: its formula, its validation, what is kept of it."""

import pytest
import torch
from conftest import read_csv, without_seconds

import utils
from locallip import checkpoints
from locallip.files import InputError
from locallip.training import run as training_run
from locallip.training import step as training_step
from locallip.training.averaging import AveragedModel


def test_an_average_follows_the_weights_after_a_start_that_it_soon_forgets(tiny_net):
    average = AveragedModel(tiny_net, 0.2)
    expected = {name: value.clone() for name, value in tiny_net.state_dict().items()}
    for decay in (1 / 10, 2 / 11, 0.2, 0.2):  # 3 / 12 would be larger
        with torch.no_grad():
            for parameter in tiny_net.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update()
        for name, value in tiny_net.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    for name, value in average.state()["state_dict"].items():
        torch.testing.assert_close(value, expected[name])
    assert average.state()["steps"] == 4


def test_all_that_a_network_has_is_averaged():
    for data, models in utils.MODELS.items():
        for model in models:
            network = utils.select_model(data, model, width=0.05, classes=10)
            assert {name for name, _ in network.named_parameters()} == {*network.state_dict()}


def test_an_average_changes_nothing_of_the_training_beside_it(runs):
    with_average, without = runs.train("--ema", 0.9, name="with"), runs.train(name="without")
    rows = without_seconds(with_average.log)
    averaged = [{name: row.pop(name) for name in list(row) if name.startswith("averaged")} for row in rows]
    assert rows == without_seconds(without.log)
    assert all({*row} == {"averaged_clean_error", "averaged_certified_error"} for row in averaged)
    ours, theirs = (checkpoints.load_checkpoint(files.checkpoint) for files in (with_average, without))
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())
    assert {*ours} - {*theirs} == {"averaged"}


def test_the_average_in_the_checkpoint_is_that_of_the_weights_after_each_step(runs, monkeypatch):
    steps, step = [], training_step.Step.__call__

    def record(self, *given):
        found = step(self, *given)
        steps.append([parameter.detach().clone() for parameter in self.loss.model.parameters()])
        return found

    start = []
    monkeypatch.setattr(training_step.Step, "__call__", record)
    monkeypatch.setattr(utils.training_run, "train", starting(start, utils.training_run.train))
    state = checkpoints.load_checkpoint(runs.train("--ema", 0.5).checkpoint)["averaged"]
    (average,) = start
    for number, weights in enumerate(steps):
        decay = min(0.5, (1 + number) / (10 + number))
        average = [decay * a + (1 - decay) * w for a, w in zip(average, weights)]
    assert state["steps"] == len(steps) == 16
    for found, expected in zip(state["state_dict"].values(), average):
        torch.testing.assert_close(found, expected)


def starting(kept, train):
    def keep_and_train(model, *others):
        kept.append([parameter.detach().clone() for parameter in model.parameters()])
        train(model, *others)

    return keep_and_train


def validated(monkeypatch, *errors):
    """Lets each epoch's validation find these certified errors, of the weights and of their average."""
    given = iter(errors)

    def find(run, box):
        weights, average = next(given)
        found = {"validation_clean_error": 0.0, "validation_certified_error": weights}
        return found | {"averaged_clean_error": 0.0, "averaged_certified_error": average}

    monkeypatch.setattr(training_run._Run, "_validate", find)


@pytest.mark.parametrize(
    ("errors", "epoch", "error", "averaged"),
    [
        ([(0.5, 0.6), (0.4, 0.3), (0.35, 0.5), (0.4, 0.4)], 2, 0.3, True),
        ([(0.5, 0.6), (0.4, 0.3), (0.25, 0.5), (0.4, 0.4)], 3, 0.25, False),
        ([(0.5, 0.6), (0.3, 0.3), (0.35, 0.3), (0.4, 0.4)], 2, 0.3, False),
        ([(0.5, 0.6), (0.4, 0.4), (0.4, 0.4), (0.4, 0.2)], 4, 0.2, True),
    ],
)
@pytest.mark.parametrize("parts", [False, True])
def test_the_better_of_weights_and_average_is_kept(runs, monkeypatch, capsys, errors, epoch, error, averaged, parts):
    validated(monkeypatch, *errors)
    train = runs.train_in_two_parts if parts else runs.train
    files = train("--ema", 0.9)
    best = checkpoints.load_checkpoint(files.best)
    assert (best["epoch"], best["err"]) == (epoch, error)
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"epoch {epoch}/")]
    assert len(said) == 1
    assert f"{'averaged' if averaged else 'validation'} clean 0.00% certified {error:.2%} (best)" in said[0]
    assert said[0].count("(best)") == 1
    if epoch == 4:
        last = checkpoints.load_checkpoint(files.checkpoint)
        kept = last["averaged"]["state_dict"] if averaged else last["state_dict"]
        assert all(torch.equal(best["state_dict"][name], value) for name, value in kept.items())


def test_a_best_average_that_a_kill_left_unwritten_is_written_when_the_run_is_resumed(runs, monkeypatch):
    validated(monkeypatch, (0.5, 0.6), (0.4, 0.3))
    runs.train_until(2, "--ema", 0.9)
    files = runs.files()
    before = checkpoints.load_checkpoint(files.best)
    files.best.unlink()
    validated(monkeypatch, (0.9, 0.9), (0.9, 0.9))
    runs.train("--ema", 0.9, "--resume")
    after = checkpoints.load_checkpoint(files.best)
    assert (after["epoch"], after["err"]) == (2, 0.3)
    assert all(torch.equal(after["state_dict"][name], value) for name, value in before["state_dict"].items())


def test_a_resumed_average_is_the_uninterrupted_one_to_the_bit(runs):
    straight = runs.train("--ema", 0.9, name="straight")
    resumed = runs.train_in_two_parts("--ema", 0.9, "--keep_vectors", name="resumed")
    assert without_seconds(resumed.log) == without_seconds(straight.log)
    ours, theirs = (checkpoints.load_checkpoint(files.checkpoint)["averaged"] for files in (resumed, straight))
    assert ours["steps"] == theirs["steps"]
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in theirs["state_dict"].items())


def test_a_run_that_starts_from_weights_averages_from_them(runs):
    first = runs.train(name="first").checkpoint
    flags = ["--epochs", 1, "--rampup", 0, "--lr", 1e-30, "--end_lr", 1e-30, "--ema", 0.9, "--start_from", first]
    average = checkpoints.load_checkpoint(runs.train(*flags, name="second").checkpoint)["averaged"]["state_dict"]
    for name, value in checkpoints.load_checkpoint(first)["state_dict"].items():  # which the rate does not move
        torch.testing.assert_close(average[name], value)


@pytest.mark.parametrize("damage", [None, {}, {"state_dict": {}, "steps": 1}, {"state_dict": 1, "steps": 1}])
def test_a_checkpoint_without_its_average_is_refused(runs, damage):
    files = runs.train("--epochs", 1, "--rampup", 0, "--ema", 0.9)
    checkpoint = checkpoints.load_checkpoint(files.checkpoint)
    del checkpoint["averaged"]
    checkpoints.save_checkpoint(files.checkpoint, checkpoint if damage is None else checkpoint | {"averaged": damage})
    with pytest.raises(InputError, match=r"cannot be resumed|the average in"):
        runs.train("--epochs", 1, "--rampup", 0, "--ema", 0.9, "--resume")


@pytest.mark.parametrize("decay", [0, 1, -0.5, "nan", "much"])
def test_a_decay_that_is_none_is_refused_in_one_line(call, decay):
    answer = call("train_mnist", "--ema", decay)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert "--ema" in answer.err


def test_a_run_with_an_average_is_not_resumed_without(runs):
    runs.train("--epochs", 1, "--rampup", 0, "--ema", 0.9)
    with pytest.raises(InputError, match=r"--ema 0\.9, not None"):
        runs.train("--epochs", 1, "--rampup", 0, "--resume")


def test_the_averaged_errors_are_those_of_the_averaged_weights(runs, monkeypatch, few_digits):
    files = runs.train("--ema", 0.9)
    checkpoint = checkpoints.load_checkpoint(files.checkpoint)
    x, y, _ = next(few_digits[False].batches(64))
    for name in ("validation", "averaged"):
        network = utils.select_model("digits", "relux", width=0.05)
        network.load_state_dict((checkpoint if name == "validation" else checkpoint["averaged"])["state_dict"])
        wrong = (network(x).argmax(dim=1) != y).double().mean().item()
        assert float(read_csv(files.log)[-1][f"{name}_clean_error"]) == pytest.approx(wrong)
