"""Centre and box through an activation in one autograd function, against the same operation by operation."""

import math
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from local_bound import bcp_loss, propagate, worst_logits
from locallip.bound import compiled, fused, worst_case
from locallip.bound.activations import Clip, ClippedMaxMin
from locallip.bound.fused import activation, through_activation
from locallip.bound.layers import ClampGroupSort, MaxMin, ReLU_x
from locallip.bound.power_iteration import PowerIteration
from locallip.images import channels_last
from locallip.training.step import Layout, RobustLoss, Step
from locallip.training.vectors import StoredVectors

IMAGES = 6
SHAPES = {"map": (4, 3, 5), "dense": (8,)}
KINDS = ["relu", "relux", "maxmin", "clmaxmin"]


def make_clip(kind, shape):
    """Thresholds in the midst of the values; never two values the same, where autograd would share out gradients."""
    if kind == "relu":
        return Clip(0.0, math.inf)
    if kind == "relux":
        return Clip(0.0, torch.rand(1, *shape).double().add(0.1).requires_grad_())
    if kind == "maxmin":
        return ClippedMaxMin(-math.inf, math.inf)
    half = (1, shape[0] // 2, *shape[1:])
    low, high = -torch.rand(half).double(), torch.rand(half).double()
    return ClippedMaxMin(low.requires_grad_(), high.requires_grad_())


def layer_of(clip):
    """The activation in operations that autograd knows."""
    if not isinstance(clip.high, torch.Tensor):
        return MaxMin() if clip.pairs else torch.relu
    if not clip.pairs:
        return lambda x: torch.minimum(torch.relu(x), clip.high)
    return lambda x: torch.cat(
        [
            torch.minimum(torch.maximum(*x.chunk(2, dim=1)), clip.high),
            torch.maximum(torch.minimum(*x.chunk(2, dim=1)), clip.low),
        ],
        dim=1,
    )


def plain(stack, half, reach, clip):
    """What the walk does where it does not fuse."""
    center, middle = stack[: len(half)], stack[-len(half) :]
    lower = torch.maximum(middle - half, center - reach)
    upper = torch.minimum(middle + half, center + reach)
    layer = layer_of(clip)
    center, varying, lower, upper = layer(center), clip.varying(lower, upper), layer(lower), layer(upper)
    return torch.cat([center, (upper + lower) / 2]), (upper - lower) / 2, varying


def make_inputs(shape, copies=2):
    generator = torch.Generator().manual_seed(0)

    def random(count, *size):
        return torch.randn(count, *size, generator=generator, dtype=torch.float64)

    stack, half = random(copies * IMAGES, *shape), random(IMAGES, *shape).abs()
    reach = random(IMAGES, shape[0], *[1] * (len(shape) - 1)).abs()
    return [x.requires_grad_() for x in (stack, half, reach)]


@pytest.fixture(params=SHAPES.values(), ids=SHAPES)
def shape(request):
    return request.param


@pytest.mark.parametrize("copies", [1, 2], ids=["center is middle", "center and middle"])
@pytest.mark.parametrize("kind", KINDS)
def test_values_masks_and_gradients_are_those_of_the_plain_operations(shape, kind, copies):
    inputs, clip = make_inputs(shape, copies), make_clip(kind, shape)
    learnt = [x for x in (clip.low, clip.high) if isinstance(x, torch.Tensor)]
    ours, theirs = through_activation(*inputs, clip), plain(*inputs, clip)
    assert torch.equal(ours[2], theirs[2])
    assert ours[2].any()
    assert ours[2].all() == (kind == "maxmin")  # whose outputs can always vary
    for our, their in zip(ours[:2], theirs[:2]):
        torch.testing.assert_close(our, their)
    weights = [torch.randn_like(x) for x in ours[:2]]
    gradients = (
        torch.autograd.grad(sum((w * x).sum() for w, x in zip(weights, outputs)), [*inputs, *learnt])
        for outputs in (ours, theirs)
    )
    for our, their in zip(*gradients):
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("kind", KINDS)
def test_memory_order_changes_nothing(kind):
    shape = SHAPES["map"]
    inputs, clip = make_inputs(shape), make_clip(kind, shape)
    in_order = [x.contiguous(memory_format=torch.channels_last) for x in inputs]
    for ours, theirs in zip(through_activation(*in_order, clip), through_activation(*inputs, clip)):
        assert torch.equal(ours, theirs)
    assert through_activation(*in_order, clip)[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_activation_alone_has_the_values_and_gradients_of_plain_operations(kind, shape):
    clip, x = make_clip(kind, shape), torch.randn(IMAGES, *shape).double().requires_grad_()
    wanted = [x, *(threshold for threshold in (clip.low, clip.high) if isinstance(threshold, torch.Tensor))]
    ours, theirs = activation(x, clip), layer_of(clip)(x)
    assert torch.equal(ours, theirs)
    for our, their in zip(*(torch.autograd.grad(y.square().sum(), wanted) for y in (ours, theirs))):
        torch.testing.assert_close(our, their)


def test_an_activation_passes_nan_on():
    x = torch.tensor([[torch.nan, 1.0, 1.0, torch.nan]])
    assert activation(x, Clip(0.0, torch.ones(1, 4))).isnan().tolist() == [[True, False, False, True]]
    assert activation(x, ClippedMaxMin(-torch.ones(1, 2), torch.ones(1, 2))).isnan().all()


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4, 4), (1, 4)])
def test_gradients_have_the_shapes_of_what_was_broadcast(shape):
    layer, x = ReLU_x(4, 0.1), torch.rand(shape, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == shape
    assert layer.threshold.grad.shape == (1, 4)
    assert layer.threshold.grad.sum() + x.grad.sum() == x.numel()


def test_thresholds_of_other_dimensions_broadcast_as_they_do_in_the_layer():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), ReLU_x(4, 0.1), nn.Flatten(), nn.Linear(64, 3))
    net[1].threshold.data = torch.rand(1, 4)  # along the width, not the channels
    x = torch.rand(2, 1, 6, 6)
    assert torch.allclose(propagate(net, x, 0.1, PowerIteration(5)).logits, net(x))


def test_an_output_varies_where_nothing_is_known():
    nan = torch.full((1, 4), torch.nan)
    for clip in (Clip(0.0, math.inf), Clip(0.0, torch.ones(1, 4)), ClippedMaxMin(-torch.ones(1, 2), torch.ones(1, 2))):
        assert through_activation(torch.cat([nan, nan]), nan, nan, clip)[2].all()
        assert clip.varying(nan, nan).all()


# --- compiled --------------------------------------------------------------------------------------------------------


@pytest.fixture
def compilable():
    """What can be compiled, as it stands again behind the test."""
    yield compiled
    compiled.as_they_stand()


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("kind", ["relux", "maxmin", "clmaxmin"])
def test_compiled_passes_compute_the_same(compilable, kind):
    shape = SHAPES["map"]
    inputs, clip = [x.float().detach().requires_grad_() for x in make_inputs(shape)], make_clip(kind, shape)
    clip = type(clip)(*(x.float().detach() if isinstance(x, torch.Tensor) else x for x in (clip.low, clip.high)))
    results = []
    for compiles in (False, True):
        if compiles:
            compilable.compile_all()
        stack, half, varying = through_activation(*inputs, clip)
        results.append([stack, half, varying, *torch.autograd.grad((stack.sum() + half.square().sum()), inputs)])
        alone = activation(inputs[0], clip)
        results[-1] += [alone, *torch.autograd.grad(alone.square().sum(), inputs[0])]
    assert fused._FORWARD.compiled  # not given up for want of a compiler
    for result, plainly in zip(*results):
        torch.testing.assert_close(result, plainly)


WITHOUT_COMPILER = """
import torch, warnings
from locallip.bound import compiled, fused
from locallip.bound.activations import Clip
compiled.compile_all()
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for _ in range(2):
        x = torch.ones(2, 4, requires_grad=True)
        out, half, varying = fused.through_activation(x, x, x, Clip(0.0, float("inf")))
        out.sum().backward()
print([str(w.message) for w in seen if "compiler" in str(w.message)], out.shape, x.grad.shape)
"""


def test_without_a_compiler_the_passes_run_as_they_stand(tmp_path):
    environment = {"CXX": str(tmp_path / "none"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_COMPILER], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("no compiler") == 1
    assert "torch.Size([4, 4]) torch.Size([2, 4])" in done.stdout


# --- a step on a GPU does not wait -----------------------------------------------------------------------------------


class NoLooks(TorchDispatchMode):
    """Raises where the host would have to wait for a device to know a value or a size."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero):
            raise AssertionError(f"{function} makes the host wait")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ascend", [False, True])
@pytest.mark.parametrize("loss", ["gloro", "bcp"])
def test_a_step_as_on_a_gpu_never_looks_at_a_value(tiny_net, loss, ascend, monkeypatch):
    monkeypatch.setitem(worst_case._ROUNDS_PER_LOOK, "cpu", worst_case._ROUNDS_PER_LOOK["cuda"])
    norms = PowerIteration(2, ascend=ascend, looks_for_underflow=False)
    x = channels_last(torch.rand(4, 1, 28, 28))
    stored = StoredVectors(4, Layout.of(tiny_net, x[:1]).vectors, x.device)
    # The optimizer of a CPU reads its own step counter there, which a GPU's does not.
    optimizer = torch.optim.SGD(tiny_net.parameters(), lr=0.1)
    step = Step(RobustLoss(tiny_net, norms, 10, loss), norms, stored, optimizer)
    with NoLooks():
        loss, _, _ = step(x, torch.arange(4), torch.arange(4), 0.1, 0.5)
    assert loss.isfinite()


# --- in the walk -----------------------------------------------------------------------------------------------------


def test_a_linear_layer_right_behind_another_gets_the_box_cut_by_the_ball():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    x = torch.rand(3, 6)
    ours, theirs = (propagate(net, x, 0.3, PowerIteration(50), fused=fused) for fused in (True, False))
    for name in ("lower", "upper"):
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name))


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ReLU(), nn.Flatten(), nn.Linear(32, 6)],
        [nn.Conv2d(2, 4, 3), ReLU_x((4, 2, 2), 0.3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 6)],
        [nn.Conv2d(2, 4, 3), nn.Flatten(), ReLU_x((16,), 0.2), nn.Linear(16, 6)],
        [nn.Conv2d(2, 4, 4), ClampGroupSort((4, 1, 1), 0.2, -0.2), nn.Flatten(), nn.Linear(4, 6)],
    ],
    ids=["first", "twice", "behind Flatten", "one entry a map"],
)
@pytest.mark.parametrize("clip", [None, (0.0, 1.0)])
def test_fused_and_plain_agree_wherever_an_activation_stands(layers, clip):
    torch.manual_seed(0)
    net, x, y = nn.Sequential(*layers, nn.ReLU(), nn.Linear(6, 3)), torch.rand(3, 2, 4, 4), torch.arange(3)
    epsilon = torch.tensor([0.0, 0.2, 0.5])
    found = []
    for in_one_pass in (True, False):
        bound = propagate(net, x, epsilon, PowerIteration(30), clip, fused=in_one_pass)
        loss = bcp_loss(bound.logits, worst_logits(bound, y), y, 0.3)
        gradients = torch.autograd.grad(loss, list(net.parameters()), materialize_grads=True)
        found.append([bound.lower, bound.upper, bound.radius, loss, *gradients])
    for ours, theirs in zip(*found):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)
