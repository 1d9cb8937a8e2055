"""Proven certificates: no norm too small, no margin too large, not one certified image that falls."""

import json

import pytest
import torch
from conftest import TINY, WIDTH
from hypothesis import settings
from hypothesis import strategies as st
from oracles import ExactNorms as PublishedWalk
from oracles import clipped_relu, dense_matrix
from torch import nn

import utils
from local_bound import Arithmetic, propagate, prove, worst_logits, worst_margin
from locallip.bound.operators import Conv, Dense
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proven_norms import ProvenNorms

examples = settings(max_examples=60, deadline=None, derandomize=True, database=None)
SURELY = 1e-6  # failure probability


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def norm_of(matrix):
    return torch.linalg.matrix_norm(matrix, ord=2)


def matrix_of(operator):
    return dense_matrix(operator.apply, operator.input_shape)


class ExactNorms(PublishedWalk):
    """Brute force: singular values of dense matrices, on the walk of the proof."""

    local_ball = True


EXACT = ExactNorms()


def test_a_proof_takes_no_rounded_factors():
    with pytest.raises(ValueError, match="cannot round"):
        Arithmetic(own=2.0**-53, factors=torch.bfloat16)


# --- whole norms -----------------------------------------------------------------------------------------------------


@st.composite
def convolutions(draw, kernel=None):
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    size, stride, dilation = draw(pair if kernel is None else kernel), draw(pair), draw(pair)
    padding = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
    groups = draw(st.sampled_from([1, 1, 2]))
    # No smaller than what the kernel needs.
    sides = [d * (k - 1) + 1 + draw(st.integers(0, 5)) for d, k in zip(dilation, size)]
    inputs, outputs = (groups * draw(st.integers(1, 2)) for _ in range(2))
    torch.manual_seed(draw(st.integers(0, 2**20)))
    weight = torch.randn(outputs, inputs // groups, *size, dtype=torch.float64)
    return Conv(weight, None, 0, torch.Size([inputs, *sides]), stride, padding, dilation, groups)


def gram_iteration(matrix, rounds=6):
    """||G||_F^(2^-t) after G <- G^T G, t times (Delattre et al. 2023); no eigenvalue or frequency is involved."""
    logarithm, gram = torch.zeros((), dtype=matrix.dtype), matrix
    for _ in range(rounds):
        size = gram.norm().clamp(min=1e-300)
        gram, logarithm = (gram / size).T @ (gram / size), 2 * (logarithm + size.log())
    return ((logarithm + gram.norm().log()) / 2**rounds).exp()  # 0 for a matrix of zeros


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-30, 1e30, 1e150])
def test_the_norm_of_a_convolution_is_not_lost_in_overflow_or_underflow(scale):
    conv = Conv(scale * torch.randn(2, 1, 3, 3).double(), None, 0, torch.Size([1, 6, 6]))
    true = scale * norm_of(matrix_of(conv) / scale)
    assert ProvenNorms(SURELY, 0, seed=0).whole(conv).upper >= true


# --- masked norms ----------------------------------------------------------------------------------------------------

MASKABLE = {
    "wide": Dense(torch.randn(5, 9, dtype=torch.float64), None, 0),
    "tall": Dense(torch.randn(9, 5, dtype=torch.float64), None, 0),
    "more outputs": Conv(torch.randn(4, 2, 3, 3).double(), None, 0, torch.Size([2, 5, 5]), padding=(1, 1)),
    "fewer outputs": Conv(torch.randn(2, 3, 3, 3).double(), None, 0, torch.Size([3, 6, 6]), stride=(2, 2)),
}


def masks(shape):
    """Nothing left, one entry left, everything left, and random ones: (6, *shape)."""
    shares = torch.tensor([0.1, 0.5, 0.9]).view(3, *[1] * len(shape))
    one = torch.zeros(shape, dtype=torch.bool)
    one.flatten()[shape.numel() // 2] = True
    return torch.cat([torch.stack([one & False, one, one | True]), torch.rand(3, *shape) < shares])


def masked_matrix(operator, in_mask, out_mask):
    matrix = matrix_of(operator)
    matrix = matrix if in_mask is None else matrix * in_mask.flatten(1)[:, None, :]
    return matrix if out_mask is None else matrix * out_mask.flatten(1)[:, :, None]


def sides_to_mask(operator, sides):
    """(in_mask, out_mask) of 36 images, all pairs of masks; None where a side is not to be masked."""
    columns = masks(operator.input_shape).repeat_interleave(6, dim=0) if "columns" in sides else None
    rows = masks(operator.output_shape).repeat(6, *[1] * len(operator.output_shape)) if "rows" in sides else None
    return columns, rows


# --- the bound that chance obeys -------------------------------------------------------------------------------------


SPECTRA = {
    "two nearly equal": torch.cat([torch.tensor([1.0, 0.999]), torch.linspace(0.98, 0, 38)]),
    "falling slowly": torch.linspace(1, 0, 40),
    "one far above": torch.tensor([1.0, *[0.1] * 39]),
    "almost flat": torch.linspace(1, 0.9, 40),
}


def with_spectrum(spectrum):
    """A 1x1 convolution on one pixel, which is a matrix, of these singular values; its last input does nothing."""
    size = len(spectrum)
    left, right = (torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))[0] for _ in range(2))
    matrix = torch.cat([left * spectrum.double() @ right, torch.zeros(size, 1).double()], dim=1)
    return Conv(matrix[:, :, None, None], None, 0, torch.Size([size + 1, 1, 1]))


def some_masked_norms(norms):
    conv = with_spectrum(SPECTRA["falling slowly"])
    norms.whole(conv)
    norms.masked(conv, (torch.arange(41) < 40).view(1, 41, 1, 1).expand(3, -1, -1, -1), None)
    return norms.lower[0]


def stack_of(*layers):
    """A float64 net of 1-input layers with ReLU between, from pairs of weight and bias."""
    modules = []
    for weight, bias in layers:
        linear = nn.Linear(1, len(weight)).double()
        linear.weight.data, linear.bias.data = torch.tensor(weight).double(), torch.tensor(bias).double()
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


# --- proofs ----------------------------------------------------------------------------------------------------------


def train_a_little(model, images, steps=40):
    """A few steps on the digits, enough to be right mostly."""
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(steps):
        x, y, _ = next(iter(images[100 * (step % 10) : 100 * (step % 10 + 1)].batches(100)))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def net(digits):
    """A net trained on digits, 16 test images in float64 and their labels."""
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 4, 5, stride=3), clipped_relu(4, 8, 8), nn.Flatten(), nn.Linear(256, 32), nn.ReLU()]
    model = train_a_little(nn.Sequential(*layers, nn.Linear(32, 10)), digits[True])
    x, y, _ = next(iter(digits[False].batches(16)))
    return model.double(), x.double(), y


RADII = [0.02, 0.1, 0.3]


def proof_of(net, epsilon, **arguments):
    model, x, y = net
    clip = arguments.pop("clip", None)
    return prove(model, x, y, epsilon, ProvenNorms(SURELY, 10_000, seed=0, **arguments), clip, effort="product")


def exact_margin(net, epsilon):
    model, x, y = net
    return worst_margin(worst_logits(propagate(model, x, epsilon, EXACT), y, 1000), y)


@pytest.mark.parametrize("epsilon", RADII)
def test_no_margin_exceeds_that_of_brute_force(net, epsilon):
    proof, best = proof_of(net, epsilon), exact_margin(net, epsilon)
    assert (proof.worst_margin <= best).all()
    assert (proof.worst_margin > 0).sum() >= (best > 0).sum() - 1
    assert (proof.hidden_lipschitz >= propagate(net[0], net[1], epsilon, EXACT).hidden_lipschitz).all()


# --- hand-made worst cases -------------------------------------------------------------------------------------------


def linear_net(*layers):
    """Dense layers without activations, from their (weight, bias)."""
    model = nn.Sequential(*(nn.Linear(weight.shape[1], len(weight)) for weight, _ in layers)).double()
    for layer, (weight, bias) in zip(model, layers):
        layer.weight.data, layer.bias.data = weight.double(), bias.double()
    return model.requires_grad_(False)


def constant_net(kind):
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).requires_grad_(False)
    model[2].bias.fill_(-1e3)
    model[5].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    if kind == "zero weights":
        for position in (0, 2, 5):
            model[position].weight.zero_()
    return model


def breakable(matrix, epsilon):
    """A net whose answer at 0 is 0, the point in the ball where it is not, for a matrix of norm 1."""
    left, _, right = torch.linalg.svd(matrix.double())
    last = torch.stack([left[:, 0], torch.zeros(len(matrix))])
    model = linear_net((matrix, torch.zeros(len(matrix))), (last, torch.tensor([0.99 * epsilon, 0.0])))
    return model, -epsilon * right[:1]


def nearly_equal_values():
    left, right = (torch.linalg.qr(torch.randn(40, 40, dtype=torch.float64))[0] for _ in range(2))
    return left * torch.linspace(1, 0.9, 40, dtype=torch.float64) @ right


MISLEADING = {
    "start vector orthogonal to the leading one": (
        lambda: torch.diag(torch.tensor([1.0, 0.5])),
        PowerIteration(100, global_vectors={0: torch.tensor([[0.0, 1.0]], dtype=torch.float64)}),
    ),
    "nearly equal singular values and few iterations": (nearly_equal_values, PowerIteration(3)),
}


# --- rounding --------------------------------------------------------------------------------------------------------


# --- evaluate.py -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(digits, tmp_path_factory):
    torch.manual_seed(0)
    model = train_a_little(utils.select_model("digits", "relux", width=WIDTH), digits[True], steps=60)
    path = tmp_path_factory.mktemp("net") / "net_best.pth"
    utils.save_checkpoint(path, {"state_dict": model.state_dict(), "err": 1.0, "epoch": 0})
    return path


@pytest.fixture
def evaluate(call, checkpoint, tmp_path):
    """Evaluates 12 digits with further flags: the summary."""

    def run(*flags):
        base = [*TINY, "--epsilon", 0.01, "--images", 12, "--test_sniter", 30, "--saved_model", checkpoint]
        answer = call("evaluate", *base, "--out", tmp_path, "--overwrite", *flags)
        assert (answer.code, answer.err) == (0, "")
        return json.loads((tmp_path / "summary.json").read_text())

    return run


def test_an_evaluation_proves_by_default_and_says_what(evaluate):
    summary = evaluate()
    certificate = summary["certificate"]
    assert certificate | {"seed": 0, "stage_seconds": []} == {
        "kind": "proven",
        "effort": "dual",
        "failure_probability": 1e-6,
        "seed": 0,
        "deployed": "exact",
        "clip": False,
        "stages": ["global", "local, 25 Lanczos steps", "local, 75 Lanczos steps", "dual"],
        "stage_seconds": [],
        "certified_plain": None,
    }
    assert sum(summary["decided_by"].values()) == 12
    assert len(certificate["stage_seconds"]) == 4
    accuracy = {name: summary["accuracy"][name]["count"] for name in ("certified", "pgd", "clean")}
    assert 0 < accuracy["certified"] <= accuracy["pgd"] <= accuracy["clean"]


def test_an_evaluation_by_estimate_is_the_published_protocol(evaluate):
    proven, estimate = evaluate(), evaluate("--certificate", "estimate")
    assert estimate["certificate"] == {"kind": "estimate", "power_iterations": 30, "clip": False}
    assert estimate["accuracy"]["clean"] == proven["accuracy"]["clean"]
    assert estimate["accuracy"]["certified"]["count"] > 0


def test_the_seed_of_a_certificate_is_used_and_recorded(evaluate, tmp_path):
    reports = []
    for seed in (3, 3, 4):
        assert evaluate("--epsilon", 0.05, "--certificate_seed", seed)["certificate"]["seed"] == seed
        reports.append((tmp_path / "images.csv").read_bytes())
    assert reports[0] == reports[1]
    assert len({evaluate()["certificate"]["seed"] for _ in range(2)}) == 2


def test_float32_and_clipping_are_recorded_and_change_the_certificate_as_they_should(evaluate):
    plain = evaluate()["accuracy"]["certified"]["count"]
    deployed, clipped = evaluate("--deployed", "float32"), evaluate("--clip")
    assert deployed["certificate"]["deployed"] == "float32"
    assert clipped["certificate"]["clip"] is True
    assert deployed["accuracy"]["certified"]["count"] <= plain <= clipped["accuracy"]["certified"]["count"]


@pytest.mark.parametrize(
    "flags",
    [
        *(["--failure_probability", value] for value in ("0", "1", "nan", "-1", "inf", "likely")),
        ["--certificate", "x"],
        ["--certificate_seed", "-1"],
        ["--deployed", "float16"],
    ],
    ids="=".join,
)
def test_bad_values_are_refused_with_one_line(call, checkpoint, flags):
    answer = call("evaluate", *TINY, "--saved_model", checkpoint, *flags)
    assert (answer.code, answer.out) == (2, "")
    assert len(answer.err.splitlines()) == 1
    assert flags[0] in answer.err
