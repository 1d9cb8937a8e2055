"""A recorded step does what the step does: by CUDA graphs where there is a GPU, and by what stands in for them."""

import copy

import pytest
import torch
from recorder import record

import utils
from locallip.bound import worst_case
from locallip.bound.power_iteration import PowerIteration
from locallip.files import InputError, ScriptError
from locallip.training.losses import LOSSES
from locallip.training.optimizers import OPTIMIZERS, set_rate
from locallip.training.recording import RecordedStep, ahead, in_cuda_graph
from locallip.training.step import Layout, RobustLoss, Step
from locallip.training.vectors import StoredVectors

IMAGES = 24
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))


@pytest.fixture(autouse=True)
def looks_as_rarely_as_on_a_gpu(monkeypatch):
    monkeypatch.setitem(worst_case._ROUNDS_PER_LOOK, "cpu", worst_case._ROUNDS_PER_LOOK["cuda"])


def make(device, loss, optimizer, local):
    torch.manual_seed(0)
    model = utils.select_model("mnist", "c4f3_clmaxmin", 1.0, 0.25, 10, True).to(device)
    norms = PowerIteration(2, local_positions=None if local else [], looks_for_underflow=False)
    layout = Layout.of(model, torch.rand(1, 1, 28, 28, device=device), norms.local_positions)
    stored = StoredVectors(IMAGES, layout.vectors, torch.device(device))
    return model, Step(
        RobustLoss(model, norms, loss=loss), norms, stored, OPTIMIZERS[optimizer](model, 1e-3, torch.float32)
    )


def batches(device):
    """Steps of two kinds of batch, as an epoch has them, with rates and radii that change."""
    torch.manual_seed(1)
    for number in range(6):
        for size in (8, 8, 5):  # the first kind is recorded while the second is not, and both go on for a while
            indices = torch.randperm(IMAGES)[:size].to(device)
            x, y = torch.rand(size, 1, 28, 28, device=device), torch.randint(10, (size,), device=device)
            yield (x, y, indices), (0.01 * number, 1 - 0.1 * number, size / 8), 1e-3 / (1 + number)


def run(step, device, box):
    results = []
    for batch, numbers, rate in batches(device):
        set_rate(step.step.optimizer if isinstance(step, RecordedStep) else step.optimizer, rate)
        results.append([result.clone() for result in step(*batch, *numbers, box)])
    return results


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("box", [True, False])
@pytest.mark.parametrize(("loss", "optimizer"), [(name, "adam") for name in LOSSES] + [("emma", "muon")])
def test_a_recorded_step_does_what_the_step_does(loss, optimizer, box, device):
    close = 1e-3 if device == "cpu" else 0.05  # a GPU adds up in an order of its own, and Adam makes much of little
    model, step = make(device, loss, optimizer, box)
    recorded_model, recorded = make(device, loss, optimizer, box)
    recorded_step = RecordedStep(recorded, record if device == "cpu" else in_cuda_graph)
    for own, expected in zip(run(recorded_step, device, box), run(step, device, box), strict=True):
        for a, b in zip(own, expected):
            assert (a - b).norm() <= close * b.norm()
    for a, b in zip(recorded_model.parameters(), model.parameters()):
        assert (a - b).norm() <= close * b.norm()
    kept = recorded.norms.global_vectors
    assert kept.keys() == step.norms.global_vectors.keys()
    for position, vector in step.norms.global_vectors.items():
        assert (vector * kept[position]).sum() > 0.999 * vector.norm() * kept[position].norm()


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_the_optimizers_state_is_that_of_any_other_run(device):
    _, step = make(device, "gloro", "adam", False)
    before = copy.deepcopy(step.optimizer.state_dict()["param_groups"])
    run(RecordedStep(step, record if device == "cpu" else in_cuda_graph), device, False)
    set_rate(step.optimizer, 1e-3)
    assert step.optimizer.state_dict()["param_groups"] == before


def test_a_step_that_cannot_be_recorded_names_the_way_out():
    def fail(function):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    _, step = make("cpu", "gloro", "adam", False)
    with pytest.raises(ScriptError, match=r"when stream is capturing\); train with --cuda_graph no$"):
        run(RecordedStep(step, fail), "cpu", False)


def test_without_a_gpu_there_is_nothing_to_record(runs):
    with pytest.raises(InputError, match="--cuda_graph yes needs one process, on a GPU"):
        runs.train("--cuda_graph", "yes", "--device", "cpu")
    assert runs.contents() == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_batches_made_ahead_are_the_same():
    device = torch.device("cuda")

    def made():
        for number in range(200):
            yield tuple((torch.full((100_000,), 3 * number, device=device) + k).sort().values for k in range(3))

    for number, batch in enumerate(ahead(made(), device)):
        assert [int(tensor[0]) for tensor in batch] == [3 * number, 3 * number + 1, 3 * number + 2]
