"""The bound against reference vectors made with the published formulas (three activations, two image sizes, two radii).

`k3` comes from three power iterations, so it pins down every single step; `kinf` from converged norms.
"""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import ROOT
from torch import nn

from local_bound import Bound, bcp_loss, gloro_logits, gloro_loss, propagate, worst_logits
from locallip.bound.layers import ClampGroupSort, ReLU_x
from locallip.bound.power_iteration import PowerIteration

FILES = sorted((ROOT / "tests/golden").glob("*.npz"))
ITERATIONS = {"k3": 3, "kinf": 3000}
ROUNDS = (1, 10, 1000)
ACTIVATIONS = {
    "relux": lambda shape: ReLU_x(shape, init=1),
    "standrelu": lambda shape: nn.ReLU(),
    "clmaxmin": lambda shape: ClampGroupSort(shape, maxthres=1, minthres=-1),
}


class Walk(NamedTuple):
    """One run through the network and what the reference says about it."""

    bound: Bound
    norms: PowerIteration
    expected: dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=FILES, ids=lambda file: file.stem)
def reference(request):
    content = np.load(request.param)
    return {key: str(content[key]) if key == "kind" else torch.from_numpy(content[key]) for key in content.files}


@pytest.fixture(scope="module")
def model(reference):
    return network(reference)


@pytest.fixture(scope="module", params=[True, False], ids=["fused", "plain"])
def fused(request):
    return request.param


@pytest.fixture(scope="module")
def three(reference, model, fused):
    return walk(reference, model, "k3", fused)


@pytest.fixture(scope="module")
def converged(reference, model):
    return walk(reference, model, "kinf", fused=True)  # `three` has both; thousands of iterations tell no more of it


def network(reference):
    activation = ACTIVATIONS[reference["kind"]]
    if reference["x"].shape[1:] == (1, 8, 8):
        layers = [
            *(nn.Conv2d(1, 4, 3, 1, 1), activation((4, 8, 8))),
            *(nn.Conv2d(4, 6, 4, 2, 1), activation((6, 4, 4))),
            nn.Flatten(),
            *(nn.Linear(96, 12), activation((12,))),
            *(nn.Linear(12, 8), activation((8,))),
            nn.Linear(8, 5),
        ]
    else:  # 3x9x9: without padding, the stride of 2 leaves a row and a column unused
        layers = [
            *(nn.Conv2d(3, 4, 3, 1, 1), activation((4, 9, 9))),
            *(nn.Conv2d(4, 6, 4, 2, 0), activation((6, 3, 3))),
            *(nn.Conv2d(6, 8, 3, 1, 1), activation((8, 3, 3))),
            nn.Flatten(),
            *(nn.Linear(72, 10), activation((10,))),
            nn.Linear(10, 7),
        ]
    model = nn.Sequential(*layers).double()
    model.load_state_dict(below("state.", reference))
    return model


def walk(reference, model, run, fused, dtype=torch.float64):
    local = {int(position): start.to(dtype) for position, start in below("local_start.", reference).items()}
    whole = {int(position): start.to(dtype) for position, start in below("global_start.", reference).items()}
    # Those of dense layers are columns (out, 1), on the output side.
    whole = {position: start.T if start.dim() == 2 else start for position, start in whole.items()}
    norms = PowerIteration(ITERATIONS[run], local, whole)
    bound = propagate(model, reference["x"].to(dtype), float(reference["epsilon"]), norms, fused=fused)
    return Walk(bound, norms, below(f"{run}.", reference))


def below(prefix, reference):
    return {key.removeprefix(prefix): value for key, value in reference.items() if key.startswith(prefix)}


def assert_close(actual, expected, relative=1e-6):
    """Relative to the largest entry; an entry that ought to be zero may be off by rounding."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=relative * expected.abs().max().item() + 1e-12, check_dtype=False
    )


def assert_same_walk(walk, y, relative=1e-6):
    bound, expected = walk.bound, walk.expected
    for name in ("center", "lower", "upper"):
        assert_close(getattr(bound, name), expected[f"hidden_{name}"], relative)
    assert_close(bound.radius, expected["radius"], relative)
    for position, norm in below("local_norm.", expected).items():
        assert_close(bound.local_norms[int(position)], norm, relative)
    for position, varying in below("varying.", expected).items():
        assert torch.equal(bound.varying[int(position)], varying.bool())
    for rounds in ROUNDS:
        assert_close(worst_logits(bound, y, rounds), expected[f"worst_logits.bcp.{rounds}"], relative)
        assert_close(gloro_logits(bound, y, rounds), expected[f"worst_logits.gloro.{rounds}"], relative)


def losses(walk, y, rounds):
    worst = worst_logits(walk.bound, y, rounds)
    return {
        "bcp": bcp_loss(walk.bound.logits, worst, y, kappa=0),
        "gloro": gloro_loss(walk.bound.logits, worst, y),
    }


def test_all_reference_files_are_there():
    assert len(FILES) == 12


def test_every_hidden_linear_layer_has_a_reference(three, converged):
    for bound, _, expected in (three, converged):
        positions = {str(position) for position in bound.local_norms}
        assert positions == set(below("local_norm.", expected)) == set(below("local_vector.", expected))
        assert len(positions) == len(below("varying.", expected)) == 4


def test_logits(reference, three):
    assert_close(three.bound.logits, reference["logits"])


def test_three_iterations(reference, three):
    assert_same_walk(three, reference["y"])


def test_singular_vectors_after_three_iterations(three):
    for position, vector in below("local_vector.", three.expected).items():
        assert_close(three.norms.local_vectors[int(position)], vector)


def test_converged_norms(reference, converged):
    assert_same_walk(converged, reference["y"])


@pytest.mark.parametrize("rounds", ROUNDS)
def test_losses(reference, three, converged, rounds):
    for walk in (three, converged):
        for name, loss in losses(walk, reference["y"], rounds).items():
            assert_close(loss, walk.expected[f"loss.{name}.{rounds}"])


@pytest.mark.parametrize("rounds", ROUNDS)
def test_gradients(reference, model, converged, rounds):
    names, parameters = zip(*model.named_parameters())
    for loss_name, loss in losses(converged, reference["y"], rounds).items():
        gradients = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
        for name, gradient in zip(names, gradients):
            assert_close(gradient, reference[f"kinf.grad.{loss_name}.{rounds}.{name}"], relative=1e-4)


def test_float32_agrees(reference, fused):
    model = network(reference).float()
    assert_same_walk(walk(reference, model, "k3", fused, torch.float32), reference["y"], relative=1e-4)


def test_fused_and_plain_agree_to_float32_rounding(reference):
    model = network(reference).float()
    y, parameters = reference["y"], list(model.parameters())
    fast, plain = (walk(reference, model, "k3", fused, torch.float32) for fused in (True, False))
    for position, varying in plain.bound.varying.items():
        assert torch.equal(fast.bound.varying[position], varying)
    for name in ("logits", "center", "lower", "upper", "radius", "hidden_lipschitz"):
        assert_close(getattr(fast.bound, name), getattr(plain.bound, name))
    for rounds in ROUNDS:
        for fast_loss, plain_loss in zip(losses(fast, y, rounds).values(), losses(plain, y, rounds).values()):
            assert_close(fast_loss, plain_loss)
            gradients = (
                torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
                for loss in (fast_loss, plain_loss)
            )
            for ours, theirs in zip(*gradients):
                assert_close(ours, theirs, relative=1e-5)
