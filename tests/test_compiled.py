"""Compiled passes: once per kind of activation, whatever the layers, the batch and what is done with them."""

import shutil

import pytest
import torch
import torch.nn.functional as F

import utils
from local_bound import propagate
from locallip.bound import tensors, worst_case
from locallip.bound.compiled import as_they_stand, compile_all
from locallip.bound.power_iteration import PowerIteration
from locallip.images import channels_last
from locallip.training.step import Layout, RobustLoss, Step
from locallip.training.vectors import StoredVectors

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
# The centre alone, centre and box, and box of a first layer: for convolutions and for dense layers, and backward.
VERSIONS = 2 * (2 + 3)


@pytest.fixture
def compiled():
    """Compiled passes, put back behind the test, that must not reach the limit of recompilations."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compile_all()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield
    as_they_stand()
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


@pytest.mark.filterwarnings("error:no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_masked", [True, False])
def test_unit_vectors_as_a_gpu_makes_them(compiled, dtype, is_masked):
    torch.manual_seed(0)
    for shape in [(3, 4, 6, 5), (2, 4, 3, 3), (1, 4, 6, 5), (3, 1, 6, 5), (3, 7), (1, 7)]:
        x = torch.randn(shape, dtype=dtype)
        x[-1] = 0
        if len(x) > 2:
            x[0, 0].view(-1)[0] = 3e38  # its square is infinite
        mask = (torch.rand(shape) < 0.8).to(dtype) if is_masked else None
        if len(x) > 2 and is_masked:
            mask[0, 0].view(-1)[0] = 1
        for order in [torch.contiguous_format, torch.channels_last][: x.dim() // 2]:
            given = x.contiguous(memory_format=order)
            vectors, length = tensors._unit_of_rows(given.clone(), mask)
            expected, expected_length = tensors._unit.plain(given.clone(), mask)
            torch.testing.assert_close(vectors, expected, equal_nan=True)
            torch.testing.assert_close(length, expected_length, equal_nan=True)
            assert length[0].isnan() == (len(x) > 2)
    assert 0 < compilations() <= 3  # for one image, whose entries are one channel or more, and for several


@pytest.mark.filterwarnings("error:no compiler")
def test_rounds_of_pinning_as_a_gpu_takes_them(compiled):
    torch.manual_seed(0)
    for images in (4, 3):
        length, depth, pinned = torch.rand(images, 5, 64), torch.rand(images, 5, 64), torch.rand(images, 5, 64) < 0.3
        given = pinned, length, depth, length.square(), depth.square(), 3 + torch.rand(images, 1, 1)
        leaves = worst_case._leaves(*given, pays=True)
        assert 0 < leaves.sum() < leaves.numel()
        assert (leaves != worst_case._leaves(*given, pays=False)).sum() <= 1  # a sum in another order
    assert compilations() == 1
