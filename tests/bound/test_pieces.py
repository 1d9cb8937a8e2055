"""Many images and classes, a few at a time: the same answers, bounded memory, a bar, and Ctrl-C breaks nothing."""

import builtins
import functools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from oracles import CLASSES, IMAGES, ExactNorms, ExactProvenNorms, images, settled
from torch import nn

from local_bound import PowerIteration, certified_radius, certify, local_lipschitz, propagate
from locallip.bound import certificates, inquiry, pieces, worst_case
from locallip.bound.dual import classes
from locallip.bound.kept_norms import KEPT
from locallip.bound.proof import decide
from locallip.bound.proven_norms import ProvenNorms
from locallip.bound.stages import ProductStage
from locallip.bound.worst_case import worst_logits


@pytest.fixture(autouse=True)
def _seed(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("locallip.bound.inquiry.ESTIMATE_ITERATIONS", 300)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return settled(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES))


@pytest.fixture
def x():
    return torch.cat([images(12), images(12) * 0.9])


@pytest.fixture
def pieces_of(monkeypatch):
    """Makes calls take so many images at a time, and counts how many they took."""
    taken = []

    def change(size):
        monkeypatch.setattr(inquiry, "images_at_a_time", lambda graph, x: size)

    ask = pieces.in_pieces

    def counting(about, *args):
        return ask(lambda part: taken.append(len(part)) or about(part), *args)

    monkeypatch.setattr(inquiry, "in_pieces", counting)
    change.taken = taken
    return change


SIZES = (1, 3, 8)


# --- the same answers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("certificate", "effort"), [("proven", "product"), ("proven", "dual"), ("estimate", "product")]
)
def test_certificates_do_not_depend_on_the_size_of_the_pieces(model, x, pieces_of, certificate, effort):
    y = model(x).argmax(dim=1)
    y[5] = (y[5] + 1) % CLASSES
    pieces_of(8)
    radius = certified_radius(model, x, y, 4e-3, certificate, effort=effort)
    epsilon = radius * torch.tensor([0.8, 1.3] * 4)
    epsilon[5] = 0.1
    pieces_of(3)
    del pieces_of.taken[:]
    assert certify(model, x, y, epsilon, certificate, effort=effort).tolist() == [True, False, True, False] * 2
    assert pieces_of.taken == [3, 3, 2]
    other = certified_radius(model, x, y, 4e-3, certificate, effort=effort)
    # What chance may do to norms, and the search then to a radius.
    torch.testing.assert_close(other, radius, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("certificate", ["proven", "estimate"])
@pytest.mark.parametrize("epsilon", [0.1, torch.linspace(0.01, 0.5, 8).double()], ids=["one", "each its own"])
def test_bounds_do_not_depend_on_the_size_of_the_pieces(model, x, pieces_of, certificate, epsilon):
    found = []
    for size in SIZES:
        pieces_of(size)
        found.append(local_lipschitz(model, x, epsilon, certificate))
    for other in found[:-1]:
        torch.testing.assert_close(other.lipschitz, found[-1].lipschitz, rtol=2e-3, atol=0)
        torch.testing.assert_close(other.global_lipschitz, found[-1].global_lipschitz, rtol=1e-6, atol=0)
        for position, norm in found[-1].local_norms.items():
            torch.testing.assert_close(other.local_norms[position], norm, rtol=2e-3, atol=0)
            torch.testing.assert_close(
                other.global_norms[position], found[-1].global_norms[position], rtol=1e-6, atol=0
            )


def test_norms_of_ones_own_are_asked_about_all_images_at_once_as_they_are(model, x, pieces_of):
    pieces_of(3)
    norms = PowerIteration(50)
    certify(model, x, model(x).argmax(dim=1), 0.1, norms)
    assert pieces_of.taken == [8]
    assert {len(vectors) for vectors in norms.local_vectors.values()} == {8}


def test_proven_norms_of_ones_own_spend_one_budget_over_all_pieces(model, x, pieces_of):
    pieces_of(3)
    y = model(x).argmax(dim=1)
    norms = ProvenNorms(1e-6, planned=8 * 2 * 3)
    certify(model, x, y, 0.5, norms)
    assert pieces_of.taken == [3, 3, 2]
    assert norms.budget._wholes_left == 998


def test_the_failure_probability_is_that_of_all_pieces_together(model, x, pieces_of, monkeypatch):
    """A budget for all of them, not one for each."""
    made, make = [], inquiry.proven_norms
    monkeypatch.setattr(
        "locallip.bound.inquiry.proven_norms", lambda *args, **more: made.append(args[2]) or make(*args, **more)
    )
    pieces_of(1)
    certify(model, x, model(x).argmax(dim=1), 0.2)
    assert made == [8]


# --- worst cases -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norms", [ExactNorms(), ExactProvenNorms()], ids=["exact", "with rounding"])
@pytest.mark.parametrize("memory", [1, 2_000, 10_000])
@pytest.mark.parametrize("rounds", [1, 1000])
def test_worst_cases_class_by_class_are_those_of_all_classes(monkeypatch, norms, memory, rounds):
    many = 37
    model, x = settled(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, many)), images(12)
    y = torch.tensor([0, many - 1, 5, 36])
    with torch.no_grad():
        bound = propagate(model, x, 0.3, norms)
        whole = worst_logits(bound, y, rounds)
        monkeypatch.setattr(worst_case, "_MEMORY", memory)
        parts = worst_logits(bound, y, rounds)
    torch.testing.assert_close(parts, whole, rtol=1e-13, atol=1e-15)
    assert parts.shape == (IMAGES, many)


def test_a_step_of_training_is_not_split(monkeypatch):
    model, x = settled(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 5)), images(12)
    y = torch.zeros(IMAGES, dtype=torch.long)
    monkeypatch.setattr(worst_case, "_MEMORY", 1)
    monkeypatch.setattr(worst_case, "_take", None)
    worst_logits(propagate(model, x, 0.3, PowerIteration(5)), y).sum().backward()
    assert model[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("memory", [1, 2**28])
def test_questions_of_the_dual_are_searched_alike_however_many_at_a_time(monkeypatch, memory):
    model, x = settled(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5)), images(12)
    y = model(x).argmax(dim=1)
    radius = certified_radius(model, x, y)
    monkeypatch.setattr(classes, "_MEMORY", memory)
    assert certify(model, x, y, 0.9 * radius).all()
    torch.testing.assert_close(certified_radius(model, x, y), radius, rtol=0, atol=5e-3)


# --- memory ----------------------------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys, torch
from torch import nn
import locallip
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Flatten(), nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 1000)).eval()
x = torch.rand(int(sys.argv[1]), 1, 16, 16)
y = model(x).argmax(dim=1)
locallip.certify(model, x[:1], y[:1], 1e-4, effort="product")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
locallip.certify(model, x, y, 1e-4, effort="product")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is the system's")
def test_sixty_four_images_with_a_thousand_classes_take_less_than_half_a_gigabyte():
    command = [sys.executable, "-c", _MEASURE, "64"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 5e8  # all classes at once would take 2 GB


def test_pieces_get_smaller_as_networks_get_larger_and_never_empty():
    def at_a_time(side):
        graph = pieces.Graph.of(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * side**2, 5)))
        return pieces.images_at_a_time(graph, torch.zeros(1, 3, side, side))

    sizes = [at_a_time(side) for side in (4, 16, 64)]
    assert sizes[0] > 10 * sizes[1] > 100 * sizes[2] > 0
    assert pieces.fitting(2**60, 1) == 1


# --- the bar ---------------------------------------------------------------------------------------------------------

ASK = {
    "certify": lambda model, x, **more: certify(model, x, torch.zeros(len(x), dtype=torch.long), 0.1, **more),
    "certified_radius": functools.partial(certified_radius, tolerance=0.05, effort="product"),
    "local_lipschitz": lambda model, x, **more: local_lipschitz(model, x, 0.1, **more),
}
every = pytest.mark.parametrize("ask", ASK.values(), ids=ASK)


@every
def test_a_bar_counts_the_images_on_request(ask, model, x, capsys):
    ask(model, x)
    assert capsys.readouterr().err == ""
    ask(model, x, progress=True)
    shown = capsys.readouterr()
    assert "8/8" in shown.err
    assert "image" in shown.err
    assert shown.out == ""


@every
def test_without_tqdm_the_bar_is_refused_before_any_work_and_nothing_else_needs_it(ask, model, x, monkeypatch):
    def without(name, *args):
        if name == "tqdm":
            raise ImportError(name)
        return real(name, *args)

    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", without)
    ask(model, x)
    monkeypatch.setattr(certificates, "propagate", None)
    monkeypatch.setattr(certificates, "prove", None)
    with pytest.raises(ImportError, match=r"pip install tqdm"):
        ask(model, x, progress=True)


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize("when", [0, 1])
@pytest.mark.parametrize("where", ["whole norm", "masked norm"])
def test_after_ctrl_c_everything_is_as_before_and_the_next_call_answers(
    ask, model, x, pieces_of, monkeypatch, where, when
):
    KEPT.clear()
    pieces_of(3)
    name = "_measured" if where == "whole norm" else "masked"
    answer, count = getattr(ProvenNorms, name), [0]

    def interrupted(self, *args):
        count[0] += 1
        if count[0] > when:
            raise KeyboardInterrupt
        return answer(self, *args)

    settings = torch.backends.mkldnn.matmul.fp32_precision, torch.is_grad_enabled()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(ProvenNorms, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            ask(model, x, progress=True)
    assert (torch.backends.mkldnn.matmul.fp32_precision, torch.is_grad_enabled()) == settings
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    after = ask(model, x)
    KEPT.clear()
    again = ask(model, x)
    if ask is ASK["local_lipschitz"]:
        after, again = after.lipschitz, again.lipschitz
    torch.testing.assert_close(after, again, rtol=5e-3, atol=5e-3)


def test_the_images_of_a_decision_may_be_none_at_all():
    model, x = settled(nn.Linear(12, 5)), images(12)[:0]
    proof = decide([ProductStage("exact", ExactNorms())], model, x, torch.zeros(0, dtype=torch.long), 0.1)
    assert proof.stage.shape == (0,)
