"""The attacks on certificates, on an untrained tiny net."""

from dataclasses import replace

import matplotlib.image
import pytest
import torch
from conftest import TINY, read_csv
from torch import nn

import falsify
from locallip.evaluation.attacks import attack_labels, attack_slopes


@pytest.fixture
def attack(call, saved_net):
    def run(*flags):
        fast = ["--images", 32, "--restarts", 1, "--slope_steps", 10]
        return call("falsify", *TINY, "--saved_model", saved_net, *fast, *flags)

    return run


def test_no_proven_certificate_falls(attack, tmp_path):
    answer = attack("--epsilon", 1e-4, "--out", tmp_path / "report")
    assert (answer.code, answer.err) == (0, "")
    rows = read_csv(tmp_path / "report" / "attacks.csv")
    assert f"\n{len(rows)} of 32 images certified" in answer.out
    assert len(rows) > 0
    for row in rows:
        assert row["fallen"] == "False"
        assert 0 < float(row["slope"]) <= float(row["local_bound"]) <= float(row["global_bound"])
    assert matplotlib.image.imread(tmp_path / "report" / "bounds_and_slopes.png").shape[0] > 300


def test_a_certificate_that_falls_ends_with_a_shout(attack, monkeypatch):
    proof = falsify.prove

    def certify_everything(model, x, *rest):
        return replace(proof(model, x, *rest), worst_margin=torch.ones(len(x)))

    monkeypatch.setattr(falsify, "prove", certify_everything)
    answer = attack("--epsilon", 5)
    assert answer.code == 1
    assert answer.err.startswith("BROKEN CERTIFICATE")


def test_nothing_certified_is_no_failure(attack, tmp_path):
    answer = attack("--epsilon", 5, "--out", tmp_path / "report")
    assert answer.code == 0
    assert "\n0 of 32 images certified" in answer.out


def test_there_is_nothing_to_attack_at_radius_zero(attack):
    answer = attack("--epsilon", 0)
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)


def test_the_slope_attack_finds_the_norm_of_a_linear_map():
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Flatten(), nn.Linear(6, 4)).double()
    found = attack_slopes(hidden, torch.rand(3, 1, 2, 3, dtype=torch.float64), 0.1, steps=200)
    norm = torch.linalg.matrix_norm(hidden[1].weight, ord=2)
    assert (found <= norm * (1 + 1e-9)).all()
    assert (found > 0.99 * norm).all()


def test_the_label_attack_breaks_a_linear_net_just_beyond_its_margin():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double()
    net[1].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    net[1].bias.data = torch.tensor([-0.7, 0.7], dtype=torch.float64)
    x = torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float64)  # the classes meet where the first pixel is 0.7
    y = torch.tensor([1])
    assert attack_labels(net, x, y, 0.21, restarts=2).all()
    assert not attack_labels(net, x, y, 0.19, restarts=2).any()
