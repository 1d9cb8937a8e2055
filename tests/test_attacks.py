"""The attacks on certificates, on an untrained tiny net."""

from dataclasses import replace

import matplotlib.image
import pytest
import torch
from conftest import TINY, read_csv
from torch import nn

from locallip.bound.walk import propagate
from locallip.evaluation import falsification
from locallip.evaluation.attacks import attack_slopes, descend, margins


@pytest.fixture
def attack(call, saved_net):
    def run(*flags):
        fast = ["--images", 32, "--restarts", 1, "--slope_steps", 10]
        return call("falsify", *TINY, "--saved_model", saved_net, *fast, *flags)

    return run


@pytest.mark.parametrize("flags", [[], ["--clip"]], ids=["whole ball", "valid images"])
def test_no_proven_certificate_falls(attack, tmp_path, flags):
    answer = attack("--epsilon", 1e-4, "--out", tmp_path / "report", *flags)
    assert (answer.code, answer.err) == (0, "")
    rows = read_csv(tmp_path / "report" / "attacks.csv")
    assert f"\n{len(rows)} of 32 images certified" in answer.out
    assert len(rows) > 0
    assert len({row["image"] for row in rows}) == len(rows)
    for row in rows:
        number = {name: float(row[name]) for name in row if name != "fallen"}
        assert row["fallen"] == "False"
        assert 0 < number["slope"] <= number["local_bound"] <= number["global_bound"]
        assert 0 < number["worst_margin"] <= number["attained_margin"] <= number["clean_margin"]
        assert 0 < number["attained_drop"] <= min(number["product_drop"], number["dual_drop"])
        for kind in ("product", "dual"):
            ratio = number[f"{kind}_drop"] / number["attained_drop"]
            assert number[f"{kind}_over_attained"] == pytest.approx(ratio)
            assert ratio >= 1
    for picture in ("bounds_and_slopes", "bound_over_attained"):
        assert matplotlib.image.imread(tmp_path / "report" / f"{picture}.png").shape[0] > 300
    quantiles = [line.split(": ")[1].split(", ") for line in answer.out.splitlines() if line.startswith("  ")]
    assert [len(values) for values in quantiles] == [5, 5]
    assert all(values == sorted(values) for values in quantiles)


def test_the_seeds_that_a_run_names_repeat_it(attack):
    first = attack("--epsilon", 1e-4)
    seeds = first.out.splitlines()[0].split()
    assert seeds[::2] == ["--certificate_seed", "--seed"]
    assert attack("--epsilon", 1e-4, *seeds).out == first.out


def certify_everything(model, x, *rest):
    return replace(PROVE(model, x, *rest), worst_margin=torch.ones(len(x)).double())


PROVE, TIGHT, WORST = falsification.prove, falsification._tight, falsification.worst_logits
LIES = {
    "a certified margin": ("prove", certify_everything, 5),
    "a bound by the dual": ("_tight", lambda chain, y, other: (TIGHT(chain, y, other)[0] + 1, []), 1e-4),
    "a bound by the product": ("worst_logits", lambda bound, y, rounds: bound.logits, 1e-4),
    "a Lipschitz constant": (
        "propagate",
        lambda *arguments, **settings: _shrunk(propagate(*arguments, **settings)),
        1e-4,
    ),
}


def _shrunk(bound):
    return replace(bound, hidden_lipschitz=bound.hidden_lipschitz / 100)


@pytest.mark.parametrize("lie", LIES)
def test_a_certificate_that_falls_ends_with_a_shout(attack, monkeypatch, tmp_path, lie):
    name, replacement, epsilon = LIES[lie]
    monkeypatch.setattr(falsification, name, replacement)
    answer = attack("--epsilon", epsilon, "--out", tmp_path / "report")
    assert answer.code == 1
    assert answer.err.startswith("BROKEN CERTIFICATE")
    assert any(row["fallen"] == "True" for row in read_csv(tmp_path / "report" / "attacks.csv"))


def test_a_point_outside_of_the_ball_breaks_nothing(attack, monkeypatch):
    monkeypatch.setattr(falsification, "descend", lambda model, x, *rest: torch.ones_like(x))
    assert attack("--epsilon", 1e-4).code == 0


def test_where_the_dual_cannot_be_asked_the_product_is_attacked_alone(attack, monkeypatch, tmp_path):
    monkeypatch.setattr(falsification, "chain_of", lambda *arguments: None)
    answer = attack("--epsilon", 1e-4, "--out", tmp_path / "report")
    assert answer.code == 0
    assert "  product:" in answer.out
    assert "  dual:" not in answer.out
    assert {row["dual_drop"] for row in read_csv(tmp_path / "report" / "attacks.csv")} == {"nan"}


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


def test_descent_breaks_a_linear_net_just_beyond_its_margin():
    net = nn.Sequential(nn.Flatten(), nn.Linear(2, 2)).double()
    net[1].weight.data = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    net[1].bias.data = torch.tensor([-0.7, 0.7], dtype=torch.float64)
    x = torch.tensor([[[[0.5, 0.5]]]], dtype=torch.float64)  # the classes meet where the first pixel is 0.7
    y = torch.tensor([1])
    for epsilon, breaks in ((0.21, True), (0.19, False)):
        step = descend(net, x, y, torch.tensor([epsilon]).double())
        assert (margins(net(x + step), y).amin() < 0).item() == breaks
