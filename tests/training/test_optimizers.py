"""Muon: what its steps are, which parameters it has, and that a run with it is resumed as it was."""

import pytest
import torch
from conftest import read_csv, without_seconds
from torch import nn

from locallip import checkpoints
from locallip.files import InputError
from locallip.training import optimizers
from locallip.training.optimizers import Joined, Muon, orthogonalized, set_rate


def network():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 6), nn.ReLU(), nn.Linear(6, 4)]
    return nn.Sequential(*layers)


def with_gradients(model):
    model.zero_grad()
    model(torch.randn(5, 3, 6, 6)).square().sum().backward()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 40), (40, 6), (12, 12), (1, 9)])
def test_singular_values_come_near_one_and_vectors_stay(shape, dtype):
    torch.manual_seed(0)
    left, _ = torch.linalg.qr(torch.randn(shape[0], min(shape)))
    right, _ = torch.linalg.qr(torch.randn(shape[1], min(shape)))
    values = torch.linspace(1, 10, min(shape))
    found = orthogonalized(7 * left @ values.diag() @ right.T, dtype)
    assert found.dtype == torch.float32
    found = left.T @ found @ right
    assert found.diagonal().min() > 0.6
    assert found.diagonal().max() < 1.3
    assert (found - found.diagonal().diag()).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)


def test_it_is_the_quintic_iteration_on_the_singular_values():
    torch.manual_seed(0)
    matrix = torch.randn(5, 7)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    torch.testing.assert_close(orthogonalized(matrix), left @ values.diag() @ right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_of_low_rank_does_not_explode(dtype):
    torch.manual_seed(0)
    matrix = torch.randn(96, 3) @ torch.randn(3, 200)
    assert torch.linalg.matrix_norm(orthogonalized(matrix, dtype), 2) < 1.3


@pytest.mark.parametrize("shape", [(8, 27), (8, 72), (16, 256)])
def test_in_low_precision_a_matrix_led_by_few_directions_comes_out_nearly_the_same(shape):
    torch.manual_seed(0)
    for power in (1, 2, 3):
        for _ in range(40):
            left, _ = torch.linalg.qr(torch.randn(shape[0], shape[0]))
            right, _ = torch.linalg.qr(torch.randn(shape[1], shape[0]))
            matrix = left @ torch.logspace(0, -1.5 * power, shape[0]).diag() @ right.T
            exact, found = (orthogonalized(matrix, dtype) for dtype in (torch.float32, torch.bfloat16))
            assert (found - exact).norm() < 0.5 * exact.norm()
            assert torch.linalg.matrix_norm(found, 2) < 1.3


def test_nothing_comes_of_no_gradient_and_nan_of_nan():
    assert torch.equal(orthogonalized(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert orthogonalized(torch.full((3, 4), torch.nan)).isnan().all()


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_a_step_is_the_direction_of_the_momentum_as_long_as_the_start_weights_say(order):
    model = network().to(memory_format=order)
    weights = [model[0].weight, model[3].weight]
    optimizer = Muon(weights, 0.1, momentum=0.9)
    scales = [weight.detach().flatten(1).norm() / min(weight.flatten(1).shape) ** 0.5 for weight in weights]
    averages = [torch.zeros_like(weight) for weight in weights]
    for _ in range(3):
        with_gradients(model)
        before = [weight.detach().clone() for weight in weights]
        optimizer.step()
        for number, (weight, scale) in enumerate(zip(weights, scales)):
            averages[number] = 0.9 * averages[number] + 0.1 * weight.grad
            ahead = 0.1 * weight.grad + 0.9 * averages[number]
            step = orthogonalized(ahead.flatten(1)).view_as(weight)
            torch.testing.assert_close(weight.detach(), before[number] - 0.1 * scale * step)


def test_a_weight_without_a_gradient_stays():
    weight = torch.ones(3, 4, requires_grad=True)
    Muon([weight], 0.1).step()
    assert torch.equal(weight.detach(), torch.ones(3, 4))


def test_muon_has_the_hidden_weights_and_adam_the_rest_at_its_share_of_the_rate():
    model = network()
    optimizer = optimizers.muon(model, 0.02, torch.float32)
    *ours, adams = optimizer.param_groups
    assert [group["params"] for group in ours] == [[model[0].weight], [model[3].weight]]
    rest = [model[0].bias, model[3].bias, model[5].weight, model[5].bias]
    assert all(a is b for a, b in zip(adams["params"], rest, strict=True))
    assert adams["lr"] == pytest.approx(0.02 * optimizers._ADAMS_SHARE)
    set_rate(optimizer, 0.01)
    assert [group["lr"] for group in optimizer.param_groups] == [
        0.01 * group["share"] for group in optimizer.param_groups
    ]
    before = [parameter.detach().clone() for parameter in with_gradients(model).parameters()]
    optimizer.step()
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_scale_of_the_start_weights_is_kept_with_the_state():
    model = network()
    optimizer = optimizers.muon(model, 0.02, torch.float32)
    with_gradients(model)
    optimizer.step()
    state = optimizer.state_dict()
    with torch.no_grad():
        model[3].weight.mul_(3)
    later = optimizers.muon(model, 0.02, torch.float32)
    assert later.param_groups[1]["share"] == pytest.approx(3 * optimizer.param_groups[1]["share"], rel=0.2)
    later.load_state_dict(state)
    assert [group["share"] for group in later.param_groups] == [group["share"] for group in optimizer.param_groups]
    with pytest.raises(ValueError, match="zip"):
        Joined(*optimizer.optimizers[:1]).load_state_dict(state)


MUON = ["--optimizer", "muon", "--lr", 0.02, "--global_epochs", 4]


def test_a_resumed_run_with_muon_is_the_uninterrupted_one(runs):
    straight = runs.train(*MUON, name="straight")
    resumed = runs.train_in_two_parts(*MUON, name="resumed")
    assert without_seconds(resumed.log) == without_seconds(straight.log)
    ours, theirs = (checkpoints.load_checkpoint(files.checkpoint)["state_dict"] for files in (straight, resumed))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_its_steps_bring_a_loss_down():
    model = network()
    optimizer, x, y = optimizers.muon(model, 0.05, torch.float32), torch.randn(32, 3, 6, 6), torch.arange(32) % 4
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.2 < 1 < losses[0]


def test_the_log_has_the_rate_of_the_flags(runs):
    assert [float(row["lr"]) for row in read_csv(runs.train(*MUON).log)[:2]] == [0.02, 0.02]


def test_a_run_of_one_optimizer_is_not_resumed_with_another(runs):
    runs.train_until(2, *MUON)
    with pytest.raises(InputError, match="it ran with --optimizer muon, not adam"):
        runs.train("--resume", "--lr", 0.02, "--global_epochs", 4)


def test_from_the_weights_of_another_run_steps_are_as_long_as_those_weights_say(runs, monkeypatch):
    start = runs.train(name="start").checkpoint
    shares, make = [], optimizers.muon

    def look(model, lr, dtype):
        shares.append((optimizers._scale(model[0].weight), made := make(model, lr, dtype)))
        return made

    monkeypatch.setitem(optimizers.OPTIMIZERS, "muon", look)
    runs.train(*MUON, "--start_from", start, name="behind")
    ((expected, made),) = shares
    weights = checkpoints.load_checkpoint(start)["state_dict"]
    assert made.param_groups[0]["share"] == expected == pytest.approx(optimizers._scale(next(iter(weights.values()))))
