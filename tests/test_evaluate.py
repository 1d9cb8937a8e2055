"""What an evaluation asks about which image: no more than leaves it open, and no less."""

import argparse
import json

import numpy as np
import pytest
import torch
from conftest import TINY, read_csv

import evaluate
from local_bound import propagate, worst_logits, worst_margin
from locallip.bound.power_iteration import PowerIteration
from locallip.checkpoints import load_checkpoint, save_checkpoint
from locallip.evaluation import evaluation
from locallip.evaluation.certificates import Estimate, Known
from locallip.evaluation.evaluation import over_radius
from locallip.evaluation.outcome import MULTIPLES
from locallip.images import hold_out

RADII = [0.0, 0.5, 0.75, 1.0, 1.5, 2.0]


def test_only_open_images_are_asked_about():
    radius = torch.tensor([0.0, 0.3, 0.6, 1.0, 1.2, 1.7, 3.0])  # up to which each image holds
    asked = {}

    def answer(places, multiple):
        asked[multiple] = places.tolist()
        return radius[places] >= multiple

    found = over_radius(radius > 0, radius >= 1, answer, RADII)
    assert np.array_equal(found, (radius[:, None] >= torch.tensor(RADII)).numpy() & (radius > 0)[:, None].numpy())
    assert asked == {0.75: [1, 2], 0.5: [1, 2], 1.5: [3, 4, 5, 6], 2.0: [5, 6]}


@pytest.mark.parametrize(("wanted", "known"), [(1, 20), (20, 20), (21, 40), (1000, 60)])
def test_curves_are_made_of_the_first_images_in_whole_batches(wanted, known, digits, tiny_net, command_line, tmp_path):
    small = ["--test_batch_size", 20, "--curve_images", wanted, "--epsilon", 1e-3, "--test_sniter", 2]
    command_line(*TINY, *small, "--saved_model", "net", "--out", tmp_path)
    args = evaluate.arguments()
    certificate = Estimate(tiny_net, args)
    (found,) = evaluate.evaluate(tiny_net.requires_grad_(False), digits[False][:60], args, [certificate])
    outcome = found.outcome
    for curve in (outcome.pgd_over_radius, outcome.certified_over_radius):
        assert np.isnan(curve).any(axis=1).tolist() == [False] * known + [True] * (60 - known)


class Certificate:
    """Certifies all images, the second half by the dual; the product alone up to epsilon, and not the last one."""

    effort = "dual"

    def __call__(self, x, y, fallen, place=0):
        ones = torch.ones(len(x))
        names = ("margin", "worst_margin", "local_bound", "global_bound", "global_radius")
        shares = {"eliminated_rows": ones[:, None], "eliminated_columns": ones[:, None]}
        self.last = x[-1]
        return Known(dict.fromkeys(names, ones) | shares, np.array(["global", "dual"]).repeat(len(x) // 2), {})

    def at(self, x, y, epsilon, effort):
        if effort == "dual":
            return torch.full((len(x),), True)
        return torch.full((len(x),), bool(epsilon < 0.31)) & (x != self.last).flatten(1).any(dim=1)


def test_the_curve_of_the_product_says_at_epsilon_what_the_product_can_do(args, digits, tiny_net):
    """The dual is asked before the best norms, so who decided does not tell."""
    x, y, _ = next(digits[False][:6].batches(6))
    (found,) = evaluation.evaluate_batch(tiny_net, x, y, args, [Certificate()], curve=True)
    by_product = found.outcome.product_over_radius
    assert by_product[:, MULTIPLES == 1].squeeze(1).tolist() == [1, 1, 1, 1, 1, 0]
    assert not by_product[:, MULTIPLES > 1].any()
    assert found.outcome.certified_over_radius.all()


@pytest.fixture
def args(command_line, saved_net):
    command_line(*TINY, "--saved_model", saved_net, "--epsilon", 0.3, "--certificate", "estimate", "--test_sniter", 100)
    return evaluate.arguments()


def test_the_estimate_in_stages_certifies_what_all_iterations_for_all_images_would(digits, args, tiny_net):
    certificate = Estimate(tiny_net, args)
    certified = by_global_norms = images = 0
    for x, _, _ in digits[False][:60].batches(60):
        y = tiny_net(x).argmax(dim=1)  # an untrained net, right by definition
        for epsilon in (5e-4, 2e-3, 5e-3):
            args.epsilon = epsilon
            with torch.no_grad():
                answer = certificate(x, y, torch.zeros_like(y, dtype=torch.bool)).columns
                bound = propagate(tiny_net, x, epsilon, PowerIteration(100, seed=1))
                everything = worst_margin(worst_logits(bound, y, 1000), y)
            found, clear = answer["worst_margin"] > 0, everything.abs() > 1e-6
            assert torch.equal(found[clear], (everything > 0)[clear])
            certified, images = certified + int(found.sum()), images + len(x)
            by_global_norms += int((found & (answer["local_bound"] == answer["global_bound"])).sum())
    assert 0 < by_global_norms < certified < images


def test_a_misclassified_image_is_asked_about_once(digits, args, tiny_net, monkeypatch):
    asked, ask = [], Estimate._ask
    monkeypatch.setattr(Estimate, "_ask", lambda self, x, y: asked.append(len(x)) or ask(self, x, y))
    x, _, _ = next(digits[False][:50].batches(50))
    with torch.no_grad():
        wrong = (tiny_net(x).argmax(dim=1) + 1) % 10
        assert not (Estimate(tiny_net, args)(x, wrong, wrong < 0).columns["worst_margin"] > 0).any()
    assert asked == [50]


def test_both_certificates_share_one_attack(call, saved_net, tmp_path):
    flags = [
        *TINY,
        "--saved_model",
        saved_net,
        "--epsilon",
        1e-3,
        "--images",
        40,
        "--test_sniter",
        20,
        "--out",
        tmp_path,
    ]
    answer = call("evaluate", *flags, "--certificate", "both")
    assert answer.code == 0
    summaries = {kind: json.loads((tmp_path / kind / "summary.json").read_text()) for kind in ("proven", "estimate")}
    for kind, summary in summaries.items():
        assert summary["certificate"]["kind"] == kind
        assert (tmp_path / kind / "images.csv").is_file()
    proven, estimate = (summary["accuracy"] for summary in summaries.values())
    assert (proven["clean"], proven["pgd"]) == (estimate["clean"], estimate["pgd"])
    assert proven["certified"]["count"] <= estimate["certified"]["count"]
    again = call("evaluate", *flags, "--certificate", "both")
    assert (again.code, len(again.err.splitlines())) == (2, 1)


def test_a_proof_by_the_product_is_never_reported_as_the_whole_one(call, saved_net, tmp_path):
    flags = [*TINY, "--saved_model", saved_net, "--epsilon", 1e-3, "--images", 4, "--test_sniter", 2, "--out", tmp_path]
    assert call("evaluate", *flags, "--certificate", "both", "--effort", "product").code == 0
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["estimate", "product"]


# --- held-out training images


@pytest.fixture
def trained_with(saved_net):
    """Makes the tiny net one that says what it was trained with."""

    def train(**arguments):
        save_checkpoint(saved_net, load_checkpoint(saved_net) | {"arguments": arguments})
        return saved_net

    return train


@pytest.mark.parametrize(("validated", "flags"), [(0.25, []), (0.25, ["--epsilon", 0.3]), (1.58, []), (None, [])])
def test_another_radius_than_that_of_the_training_is_named(call, trained_with, validated, flags):
    saved_model = trained_with(**({} if validated is None else {"epsilon": validated}))
    quick = ["--images", 4, "--curve_images", 1, "--certificate", "estimate", "--test_sniter", 2]
    answer = call("evaluate", *TINY, "--saved_model", saved_model, *quick, *flags)
    note = "epsilon is 1.58, the data set's; training validated at 0.25: --epsilon names it"
    assert (note in answer.out) == (validated == 0.25 and not flags)


@pytest.mark.parametrize("trained", [{}, {"data": "digits", "val_split": 30, "seed": 5}])
@pytest.mark.parametrize("count", [20, 30])
def test_the_images_that_a_training_held_out_can_be_evaluated(
    call, digits, trained_with, monkeypatch, tmp_path, trained, count
):
    flags = [*TINY, "--saved_model", trained_with(**trained), "--epsilon", 0.01, "--certificate", "estimate"]
    answer = call("evaluate", *flags, "--held_out", count, "--seed", 5, "--test_sniter", 5, "--out", tmp_path / "out")
    assert (answer.code, answer.err) == (0, "")
    assert answer.out.startswith(f"digits: {count} held-out training images, epsilon 0.01 ")
    training, held_out = hold_out(digits[True], 30, 5)
    labels = [int(row["label"]) for row in read_csv(tmp_path / "out" / "images.csv")]
    assert len(labels) == count
    if count == 30:
        assert labels == held_out.labels.tolist()
    args = argparse.Namespace(**json.loads((tmp_path / "out" / "summary.json").read_text())["arguments"])
    _, images, _, _ = evaluate.load(args)
    known = {image.numpy().tobytes() for image in held_out.images} - {i.numpy().tobytes() for i in training.images}
    assert {image.numpy().tobytes() for image in images.images} <= known


@pytest.mark.parametrize(
    ("trained", "flags", "complaint"),
    [
        ({"val_split": 20, "seed": 2019}, ["--held_out", 21], "--held_out 20 --seed 2019"),
        ({"val_split": 20, "seed": 2019}, ["--held_out", 20, "--seed", 1], "--held_out 20 --seed 2019"),
        ({"val_split": 0, "seed": 2019}, ["--held_out", 20], "drop --held_out"),
        ({"val_split": "many"}, ["--held_out", 20], "does not say what it was trained with: val_split 'many'"),
        ({"data": "mnist", "val_split": 20}, ["--held_out", 20], "was trained on mnist"),
        ({}, ["--held_out", 6000], "leaves none of the 6000"),
        ({}, ["--held_out", -1], "must not be negative"),
    ],
)
def test_images_that_a_network_was_trained_on_are_not_held_out_ones(
    call, trained_with, tmp_path, trained, flags, complaint
):
    answer = call("evaluate", *TINY, "--saved_model", trained_with(**trained), *flags, "--out", tmp_path / "out")
    assert (answer.code, len(answer.err.splitlines())) == (2, 1)
    assert complaint in answer.err
    assert not (tmp_path / "out").exists()
