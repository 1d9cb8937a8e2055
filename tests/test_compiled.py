"""Compiled passes: once per kind of activation, whatever the layers, the batch and what is done with them."""

import shutil

import pytest
import torch
import torch.nn.functional as F

import utils
from local_bound import propagate
from locallip.bound import fused
from locallip.bound.power_iteration import PowerIteration
from locallip.images import channels_last
from locallip.training.step import Layout, RobustLoss, Step
from locallip.training.vectors import StoredVectors

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# The centre alone, centre and box, and box of a first layer: for convolutions and for dense layers, and backward.
VERSIONS = 2 * (2 + 3)


@pytest.fixture
def compiled(monkeypatch):
    """Compiled passes, put back behind the test, that must not reach the limit of recompilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    monkeypatch.setattr(fused, "_PASSES", dict(fused._PASSES))
    fused.compile_activations()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield dict(fused._PASSES)
    torch._dynamo.reset()


def compilations():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.filterwarnings("error:no compiler")
def test_a_training_compiles_once_per_kind_of_activation_and_not_per_layer_or_batch(compiled):
    torch.manual_seed(0)
    model = utils.select_model("cifar10", "c6f2_clmaxmin", 1.0, 0.125).to(memory_format=torch.channels_last)
    images, y = channels_last(torch.rand(5, 3, 32, 32)), torch.arange(5)
    norms = PowerIteration(1)
    stored = StoredVectors(5, Layout.of(model, images[:1]).vectors, images.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = Step(RobustLoss(model, norms), norms, stored, optimizer)

    def train(count):
        batch = images[:count]
        step(batch, y[:count], y[:count], 0.1, 0.5)
        step(batch, y[:count], y[:count], 0.1, 0.5, box=False)
        F.cross_entropy(model(batch.contiguous()), y[:count]).backward()
        with torch.no_grad():
            propagate(model, batch, 0.1, norms)

    train(5)
    assert 4 < compilations() <= VERSIONS
    known = compilations()
    train(3)
    train(1)
    assert compilations() == known
    assert compiled == fused._PASSES
