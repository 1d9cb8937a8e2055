"""The published schedules of radius, loss weight and learning rate."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

import train_mnist
import utils
from locallip.training.schedule import RATES, Schedule


def schedule(epochs=10, warmup=2, rampup=4, epsilon=1.6, lr=1e-2, end_lr=1e-4, constant_epochs=5.0, **shapes):
    return Schedule(epochs, warmup, rampup, epsilon, lr, end_lr, constant_epochs, **shapes)


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


@pytest.mark.parametrize("shape", [{"lr_scheduler": "constant"}, {"constant_epochs": 10.0}, {"constant_epochs": 12.5}])
def test_the_learning_rate_can_stay_constant(shape):
    assert {schedule(**shape).lr_at(epoch) for epoch in range(10)} == {1e-2}


@given(epoch=st.integers(0, 299), batches=st.integers(1, 5000), part=st.floats(0, 1, exclude_max=True))
def test_the_published_learning_rate_is_one_for_a_whole_epoch(epoch, batches, part):
    published = schedule(epochs=300, lr=1e-3, end_lr=5e-6, constant_epochs=175.0)
    decay = (epoch - 174) / 125
    expected = 1e-3 if epoch < 175 else 1e-3 * (5e-6 / 1e-3) ** decay  # as it was computed once an epoch
    assert published.lr_at(epoch + int(part * batches) / batches) == expected


@pytest.mark.parametrize(
    ("shape", "rates"),
    [
        ("linear", [1.0, 0.7525, 0.505, 0.2575, 0.01]),
        ("cosine", [1.0, 0.505 + 0.495 * 0.5**0.5, 0.505, 0.505 - 0.495 * 0.5**0.5, 0.01]),
    ],
)
@pytest.mark.parametrize("warmup", [0.0, 2.0, 2.5])
def test_linear_and_cosine_fall_from_lr_at_the_end_of_the_warm_up_to_end_lr_at_the_end(shape, rates, warmup):
    falls = schedule(lr=1.0, end_lr=0.01, lr_scheduler=shape, lr_warmup=warmup)
    times = [warmup + quarter * (10 - warmup) / 4 for quarter in range(5)]
    assert [falls.lr_at(time) for time in times] == pytest.approx(rates)


@pytest.mark.parametrize("shape", RATES)
def test_a_warm_up_rises_from_0_to_what_there_would_be_without(shape):
    warmed = schedule(lr_scheduler=shape, lr_warmup=2.0)
    assert [warmed.lr_at(time) for time in (0, 0.5, 1, 2)] == pytest.approx([0, 0.25e-2, 0.5e-2, 1e-2])


def test_a_logarithmic_radius_rises_by_equal_factors_from_a_hundredth():
    rises = schedule(epsilon=1.0, epsilon_schedule="log")
    assert [rises.epsilon_at(time) for time in (0, 1.99)] == [0, 0]
    assert [rises.epsilon_at(time) for time in (2, 3, 4, 6, 9)] == pytest.approx([0.01, 0.01 * 10**0.5, 0.1, 1, 1])
    assert rises.kappa_at(3) == 0.75


@pytest.mark.parametrize("epsilon", [0.0, 0.004])
def test_a_logarithmic_radius_never_exceeds_its_end(epsilon):
    assert schedule(epsilon=epsilon, epsilon_schedule="log").epsilon_at(3) == epsilon


@pytest.mark.parametrize(
    ("flags", "constant_epochs"),
    [
        ([], 175),
        (["--more", 0], 150),
        (["--epochs", 12, "--rampup", 6], 7),
        (["--scale", 0.1], 17),
    ],
)
def test_the_schedule_follows_the_command_line(command_line, flags, constant_epochs):
    command_line(*flags)
    args = utils.training_arguments("", ["mnist"], train_mnist.DEFAULTS)
    assert Schedule.from_arguments(args).constant_epochs == constant_epochs


def test_shapes_and_the_warm_up_follow_the_command_line(command_line):
    command_line("--lr_scheduler", "cosine", "--lr_warmup", 5, "--epsilon_schedule", "log", "--scale", 0.1)
    found = Schedule.from_arguments(utils.training_arguments("", ["mnist"], train_mnist.DEFAULTS))
    assert (found.lr_scheduler, found.lr_warmup, found.epsilon_schedule) == ("cosine", 0.5, "log")


@pytest.mark.parametrize("warmup", [1, 3])
def test_a_warm_up_of_all_epochs_is_refused(call, warmup):
    answer = call("train_mnist", "--epochs", 1, "--rampup", 0, "--lr_warmup", warmup)
    assert (answer.code, answer.err) == (2, f"error: --lr_warmup {warmup} leaves none of 1 epochs; lower it\n")


@pytest.mark.parametrize(("scale", "lengths"), [(0.1, (30, 2, 15)), (2, (600, 40, 300)), (1, (300, 20, 150))])
def test_scale_stretches_all_lengths_alike(command_line, scale, lengths):
    command_line("--warmup", 20, "--scale", scale)
    args = utils.training_arguments("", ["mnist"], train_mnist.DEFAULTS)
    assert (args.epochs, args.warmup, args.rampup) == lengths
