"""Proven certificates: no norm too small, no margin too large, not one certified image that falls."""

import json
import math

import pytest
import torch
from conftest import TINY, WIDTH
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import clipped_relu, dense_matrix, points_in_the_ball
from oracles import ExactNorms as PublishedWalk
from torch import nn

import utils
from locallip.bound.proof import LANCZOS_STEPS
from local_bound import certify, propagate, prove, worst_logits, worst_margin
from locallip.bound.lanczos import inflation, largest_ritz_value
from locallip.bound.layers import Normalize
from locallip.bound.operators import Conv, Dense
from locallip.bound.power_iteration import PowerIteration
from locallip.bound.proven_norms import ProvenNorms, torus_bound
from locallip.bound.rounding import FLOAT32, Rounding

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
    norms = ProvenNorms(SURELY, 10)
    norms.factors = torch.bfloat16
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)).double().eval()
    with pytest.raises(ValueError, match="cannot round"):
        propagate(model, torch.rand(2, 1, 2, 2, dtype=torch.float64), 0.1, norms)


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


@examples
@given(convolutions())
def test_the_torus_bound_is_above_the_norm_of_every_convolution(conv):
    true = norm_of(matrix_of(conv))
    assert torus_bound(conv) >= true * (1 - 1e-12)
    rank = min(matrix_of(conv).shape)
    assert true <= gram_iteration(matrix_of(conv)) * (1 + 1e-12)
    # The Frobenius norm of a matrix of that rank is sqrt(rank) times its norm at most.
    assert gram_iteration(matrix_of(conv)) <= torus_bound(conv) * rank ** (0.5 / 2**6) * (1 + 1e-12)


@examples
@given(convolutions(kernel=st.just((1, 1))))
def test_the_torus_bound_of_a_1x1_convolution_is_its_norm(conv):
    # The image fills the torus: all its places carry the same little matrix.
    conv = Conv(conv.weight, None, 0, conv.input_shape, groups=conv.groups)
    torch.testing.assert_close(torus_bound(conv), norm_of(matrix_of(conv)), rtol=1e-9, atol=0)


@pytest.mark.parametrize("seed", range(5))
def test_the_torus_bound_of_an_ordinary_convolution_is_close(seed):
    torch.manual_seed(seed)
    conv = Conv(torch.randn(4, 3, 3, 3).double(), None, 0, torch.Size([3, 12, 12]), padding=(1, 1))
    assert torus_bound(conv) <= 1.15 * norm_of(matrix_of(conv))


@examples
@given(convolutions())
def test_the_whole_norm_is_between_the_true_one_and_the_torus_bound(conv):
    whole, true = ProvenNorms(SURELY, 0, seed=0).whole(conv), norm_of(matrix_of(conv))
    assert true <= whole <= torus_bound(conv) * (1 + 1e-7)
    assert whole <= true * (1 + 1e-2) + 1e-50


@pytest.mark.parametrize("shape", [(7, 5), (5, 7), (1, 9), (9, 1)])
def test_the_whole_norm_of_a_matrix_is_its_largest_singular_value(shape):
    weight = torch.randn(shape).double()
    whole = ProvenNorms(SURELY, 0).whole(Dense(weight, None, 0))
    assert norm_of(weight) <= whole <= norm_of(weight) * (1 + 1e-7)


@examples
@given(convolutions())
def test_the_absolute_norm_is_above_that_of_the_absolute_matrix(conv):
    norms = ProvenNorms(SURELY, 0, whole_steps=5)
    norms.whole(conv)
    assert norms.absolute(conv) >= norm_of(matrix_of(conv).abs())


@pytest.mark.parametrize("terms", [10, 100_000])
def test_the_rounding_margin_grows_with_the_length_of_the_sums(terms):
    upper = ProvenNorms(SURELY, 0).whole(Dense(torch.ones(1, terms).double(), None, 0))
    margin = upper.item() / terms**0.5 - 1
    assert terms * 2**-53 < margin < 1e-6


def test_a_model_in_single_precision_is_refused():
    with pytest.raises(ValueError, match=r"float64.*position 3"):
        ProvenNorms(SURELY, 0).whole(Dense(torch.ones(2, 2), None, 3))


def test_changed_weights_are_noticed():
    norms, weight = ProvenNorms(SURELY, 0), torch.eye(3).double()
    small = norms.whole(Dense(weight, None, 0))
    weight *= 2
    assert norms.whole(Dense(weight, None, 0)) > 1.9 * small


def test_a_nan_weight_certifies_nothing():
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    net[0].weight.data[0, 0] = torch.nan
    assert not certify(net, torch.rand(3, 4), torch.tensor([0, 1, 0]), 0.0).any()


@pytest.mark.parametrize("scale", [1e-300, 1e-150, 1e-30, 1e30, 1e150])
def test_the_norm_of_a_convolution_is_not_lost_in_overflow_or_underflow(scale):
    conv = Conv(scale * torch.randn(2, 1, 3, 3).double(), None, 0, torch.Size([1, 6, 6]))
    true = scale * norm_of(matrix_of(conv) / scale)
    assert ProvenNorms(SURELY, 0, seed=0).whole(conv) >= true


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


@pytest.mark.parametrize("sides", ["columns", "rows", "columns and rows"])
@pytest.mark.parametrize("steps", [0, 8, 250])
@pytest.mark.parametrize("name", MASKABLE)
def test_the_bracket_holds_the_norm_whatever_the_mask(name, steps, sides):
    operator = MASKABLE[name]
    norms = ProvenNorms(SURELY, 100, steps=steps, seed=0)
    whole = norms.whole(operator)
    pair = sides_to_mask(operator, sides)
    upper, true = norms.masked(operator, *pair), norm_of(masked_matrix(operator, *pair))
    lower = norms.lower[0].expand_as(true)
    if steps:
        assert (lower <= true).all()
    assert (true <= upper).all()
    assert (upper <= whole).all()
    if steps == 250:  # more than there are dimensions
        torch.testing.assert_close(upper.expand_as(true), true, rtol=1e-2, atol=1e-50)
    elif steps == 0:
        assert (upper == whole).all()


@pytest.mark.parametrize("steps", [8, 40])
def test_a_large_matrix_is_bracketed_by_lanczos_until_singular_values_cost_little_more(steps):
    torch.manual_seed(0)
    matrix = Dense(torch.randn(160, 200).double(), None, 0)
    norms = ProvenNorms(0.01, planned=3 if steps == 8 else 0, steps=steps)
    norms.whole(matrix)
    columns = torch.rand(3, 200) < 0.9
    upper, true = norms.masked(matrix, columns, None), norm_of(masked_matrix(matrix, columns, None))
    assert (norms.lower[0] <= true).all()
    assert (true <= upper).all()
    torch.testing.assert_close(norms.lower[0], true, rtol=0.1 if steps == 8 else 1e-6, atol=0)


@pytest.mark.parametrize("name", MASKABLE)
def test_what_eliminates_nothing_is_the_whole_norm_and_spends_no_planned_one(name):
    operator = MASKABLE[name]
    norms = ProvenNorms(SURELY, planned=0, steps=50)
    whole = norms.whole(operator)
    everything = torch.ones(3, *operator.input_shape, dtype=torch.bool)
    assert norms.masked(operator, None, None) == whole
    assert (norms.masked(operator, everything, None) == whole).all()
    norms.steps = 0
    assert (norms.masked(operator, ~everything, None) == whole).all()


def test_more_norms_than_planned_are_refused():
    conv = MASKABLE["more outputs"]
    norms = ProvenNorms(SURELY, planned=5, steps=8)
    norms.whole(conv)
    nothing = torch.zeros(3, *conv.input_shape, dtype=torch.bool)
    norms.masked(conv, nothing, None)
    with pytest.raises(RuntimeError, match="planned"):
        norms.masked(conv, nothing, None)


# --- the bound that chance obeys -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "percent"), [(100, 8.8), (200, 2.1), (300, 0.9), (500, 0.3)])
def test_the_inflation_is_the_one_calculated_for_the_papers_net(steps, percent):
    factor = inflation(torch.tensor([32_768.0], dtype=torch.float64), steps, 1e-6 / 70_000)
    assert 100 * (factor.item() ** 7 - 1) == pytest.approx(percent, abs=0.05)


@examples
@given(st.integers(1, 10**6), st.integers(2, 1000), st.floats(1e-12, 0.5))
def test_the_inflation_solves_the_bound_of_kuczynski_and_wozniakowski(dimension, steps, probability):
    factor = inflation(torch.tensor([float(dimension)], dtype=torch.float64), steps, probability).item()
    t = 1 - factor**-2
    bound = 1.648 * math.sqrt(dimension) * math.exp(-math.sqrt(t) * (2 * steps - 1))
    if math.isfinite(inflation):
        assert bound == pytest.approx(probability, rel=1e-6)
    else:
        assert bound > probability * (1 - 1e-9)


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


@pytest.mark.parametrize("name", SPECTRA)
def test_no_more_upper_bounds_fail_than_the_probability_says(name):
    conv = with_spectrum(SPECTRA[name])
    useful = torch.arange(41).view(1, 41, 1, 1) < 40
    seeds, estimated_too_small, bounded_too_small = 200, 0, 0
    for seed in range(seeds):
        # Half of the probability goes to the masked norms, of which this is the only one.
        norms = ProvenNorms(0.4, planned=1, steps=4, whole_steps=2, seed=seed)
        norms.whole(conv)
        bounded_too_small += int(norms.masked(conv, useful, None) < 1 - 1e-9)
        estimated_too_small += int(norms.lower[0] < 1 - 1e-6)
    assert bounded_too_small <= 0.2 * seeds
    if name != "one far above":
        assert estimated_too_small > 0.95 * seeds


def some_masked_norms(norms):
    conv = with_spectrum(SPECTRA["falling slowly"])
    norms.whole(conv)
    norms.masked(conv, (torch.arange(41) < 40).view(1, 41, 1, 1).expand(3, -1, -1, -1), None)
    return norms.lower[0]


def test_every_norm_starts_from_a_vector_of_its_own_and_a_seed_repeats_them():
    torch.manual_seed(0)
    norms = ProvenNorms(SURELY, 100, steps=4, seed=7)
    first, second = some_masked_norms(norms), norms
    assert len(set(first.tolist())) == 3
    conv = with_spectrum(SPECTRA["falling slowly"])
    torch.manual_seed(0)
    assert torch.equal(first, some_masked_norms(ProvenNorms(SURELY, 100, steps=4, seed=7)))
    torch.manual_seed(0)
    assert not torch.equal(first, some_masked_norms(ProvenNorms(SURELY, 100, steps=4, seed=8)))
    second.masked(conv, (torch.arange(41) < 40).view(1, 41, 1, 1).expand(3, -1, -1, -1), None)
    assert not torch.equal(first, second.lower[0])


def test_the_seed_comes_from_the_operating_system_whatever_the_seed_of_pytorch():
    seeds = set()
    for _ in range(3):
        torch.manual_seed(0)
        seeds.add(ProvenNorms(SURELY, 0).seed)
    assert len(seeds) == 3
    assert ProvenNorms(SURELY, 0, seed=5).seed == 5


@pytest.mark.parametrize("probability", [0, 1, -0.1, 1.5, math.nan])
def test_a_failure_probability_that_is_none_is_refused(probability):
    with pytest.raises(ValueError, match="probability"):
        ProvenNorms(probability, 10)


@pytest.mark.parametrize("smallest", [1e-3, 1e-8, 1e-16])
def test_lanczos_keeps_its_orthogonality_on_an_ill_conditioned_operator(smallest):
    basis = torch.linalg.qr(torch.randn(60, 60, dtype=torch.float64))[0]
    values = torch.logspace(0, math.log10(smallest), 60, dtype=torch.float64)
    matrix = basis * values @ basis.T
    found = largest_ritz_value(lambda v: v @ matrix, lambda: torch.randn(3, 60, dtype=torch.float64), steps=200)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-9, atol=0)


def test_lanczos_finds_a_leader_that_its_start_vector_has_hardly_any_part_in():
    values = torch.full((200,), 0.5, dtype=torch.float64)
    values[0] = 1
    starts = iter([torch.ones(1, 200, dtype=torch.float64) * torch.tensor([1e-13] + [1.0] * 199)])

    def draw():
        return next(starts, torch.randn(1, 200, dtype=torch.float64))

    found = largest_ritz_value(lambda v: v * values, draw, steps=25)
    torch.testing.assert_close(found, torch.ones_like(found), rtol=1e-9, atol=0)


def stack_of(*layers):
    """A float64 net of 1-input layers with ReLU between, from pairs of weight and bias."""
    modules = []
    for weight, bias in layers:
        linear = nn.Linear(1, len(weight)).double()
        linear.weight.data, linear.bias.data = torch.tensor(weight).double(), torch.tensor(bias).double()
        modules += [linear, nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def test_what_underflows_on_the_way_certifies_nothing():
    scales = [1e-200, 1e-200, 1e200, 1e200]
    net = stack_of(*[([[s]], [0.0]) for s in scales], ([[0.0], [1.0]], [0.5, 0.0]))
    assert not certify(net, torch.tensor([[0.4]]), torch.tensor([0]), 0.3).any()  # at 0.7 the answer is 1


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_no_float32_network_that_overflows_or_underflows_is_certified(scale):
    net = stack_of(([[scale]], [0.0]), ([[scale]], [0.0]), ([[1.0], [0.0]], [0.0, 0.0]))
    x, y = torch.tensor([[0.5]]).double(), torch.tensor([0])
    norms = ProvenNorms(SURELY, 100, deployed="float32")
    assert not (prove(net, x, y, 0.1, norms).worst_margin > 0).any()


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
    return prove(model, x, y, epsilon, ProvenNorms(SURELY, 10_000, seed=0, **arguments), clip)


def exact_margin(net, epsilon):
    model, x, y = net
    return worst_margin(worst_logits(propagate(model, x, epsilon, EXACT), y, 1000), y)


@pytest.mark.parametrize("epsilon", RADII)
def test_no_margin_exceeds_that_of_brute_force(net, epsilon):
    proof, best = proof_of(net, epsilon), exact_margin(net, epsilon)
    assert (proof.worst_margin <= best).all()
    assert (proof.worst_margin > 0).sum() >= (best > 0).sum() - 1
    assert (proof.hidden_lipschitz >= propagate(net[0], net[1], epsilon, EXACT).local_lipschitz).all()


def test_the_radii_of_these_tests_certify_some_images_and_others_not(net):
    certified = [int((proof_of(net, epsilon).margin > 0).sum()) for epsilon in RADII]
    assert certified == sorted(certified, reverse=True)
    assert 16 > certified[1] > 0


@pytest.mark.parametrize("epsilon", RADII)
def test_every_image_is_decided_in_one_stage_or_stays_open(net, epsilon):
    decided = proof_of(net, epsilon).decided
    assert sum(decided) == 16
    assert len(decided) <= len(LANCZOS_STEPS) + 1


@pytest.mark.parametrize("epsilon", RADII)
def test_no_point_of_the_ball_changes_a_certified_answer(net, epsilon):
    model, x, y = net
    certified = proof_of(net, epsilon).margin > 0
    points = points_in_the_ball(model, x, epsilon)[:, certified]
    assert (model(points.flatten(0, 1)).argmax(dim=1).view(points.shape[:2]) == y[certified]).all()


def test_the_box_that_travels_with_the_local_ball_is_inside_the_published_one(net):
    model, x, _ = net
    ours, published = (propagate(model, x, 0.1, norms) for norms in (EXACT, PublishedWalk(1)))
    assert (ours.lower >= published.lower - 1e-12).all()
    assert (ours.upper <= published.upper + 1e-12).all()
    assert (ours.upper - ours.lower < 0.99 * (published.upper - published.lower)).any()
    assert (ours.hidden_lipschitz <= published.hidden_lipschitz + 1e-12).all()


def test_valid_images_have_a_smaller_box_and_larger_margins(net):
    model, x, _ = net
    # The first box, read off behind a layer that changes nothing.
    eye = nn.Sequential(nn.Flatten(), nn.Identity(), nn.Linear(784, 10)).double()
    box = propagate(eye, x, 0.3, EXACT, clip=(0.0, 1.0))
    assert (box.lower >= 0).all()
    assert (box.upper <= 1).all()
    free, clipped = exact_bounds = [propagate(model, x, 0.3, EXACT, clip) for clip in (None, (0.0, 1.0))]
    assert all((b.lower <= b.center).all() and (b.center <= b.upper).all() for b in exact_bounds)
    assert (clipped.hidden_lipschitz <= free.hidden_lipschitz * (1 + 1e-12)).all()
    margins = [worst_margin(worst_logits(bound, net[2], 1000), net[2]) for bound in (free, clipped)]
    assert (margins[1] >= margins[0] - 1e-9).all()


def test_an_image_is_certified_where_only_images_that_are_not_valid_would_break_it():
    # The answer changes at -0.2, which no pixel has.
    model = linear_net((torch.ones(1, 1), torch.zeros(1)), (torch.tensor([[1.0], [0.0]]), torch.tensor([0.2, 0.0])))
    x, y = torch.full((1, 1), 0.1).double(), torch.tensor([0])
    margins = [prove(model, x, y, 0.5, ProvenNorms(SURELY, 100), clip).worst_margin for clip in (None, (0.0, 1.0))]
    assert margins[0] < 0 < margins[1]


def test_clipping_is_no_way_around_an_image_that_is_not_valid_itself():
    # At 1.4 the unit is on, at every valid image of the ball it is off: the answer changes from 0 to 1.
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    for layer, weight, bias in ((model[0], [[1.0]], [-1.1]), (model[2], [[1.0], [0.0]], [0.0, 0.2])):
        layer.weight.data, layer.bias.data = (torch.tensor(v, dtype=torch.float64) for v in (weight, bias))
    x, y = torch.tensor([[1.4]], dtype=torch.float64), torch.tensor([0])
    assert model(torch.tensor([[0.95]], dtype=torch.float64)).argmax() == 1
    try:
        margin = prove(model, x, y, 0.5, ProvenNorms(SURELY, 100), (0.0, 1.0)).worst_margin
    except ValueError:
        return
    assert not margin > 0


# --- hand-made worst cases -------------------------------------------------------------------------------------------


def linear_net(*layers):
    """Dense layers without activations, from their (weight, bias)."""
    model = nn.Sequential(*(nn.Linear(weight.shape[1], len(weight)) for weight, _ in layers)).double()
    for layer, (weight, bias) in zip(model, layers):
        layer.weight.data, layer.bias.data = weight.double(), bias.double()
    return model.requires_grad_(False)


@pytest.mark.parametrize("second", [1e6, 1.0, 1e-6])
@pytest.mark.parametrize("first", [1e6, 1.0, 1e-6])
def test_a_linear_net_is_certified_up_to_the_nearest_plane_and_no_further(first, second):
    rotation = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))[0]
    model = linear_net((first * rotation, torch.zeros(8)), (second * torch.randn(4, 8), torch.zeros(4)))
    x = torch.rand(6, 8, dtype=torch.float64)
    logits, weight = model(x), model[1].weight
    y = logits.argmax(dim=1)
    slopes = first * (weight[y][:, None] - weight).norm(dim=2)
    distances = (logits.gather(1, y[:, None]) - logits) / slopes
    distance = distances.scatter(1, y[:, None], torch.inf).amin(dim=1)
    assert certify(model, x, y, distance * (1 - 1e-4)).all()
    assert not certify(model, x, y, distance * (1 + 1e-4)).any()


@pytest.mark.parametrize("ulps", [1, 4, 16])
def test_a_margin_of_a_few_ulps_is_not_certified(ulps):
    model = linear_net((torch.eye(2), torch.tensor([ulps * 2.0**-52, 0])))
    assert not certify(model, torch.ones(1, 2).double(), torch.tensor([0]), 0).any()


@pytest.mark.parametrize("y", [0, 1])
def test_duplicated_logits_are_a_tie_that_is_never_certified(y):
    weight = torch.randn(3, 6)
    weight[1] = weight[0]
    model = linear_net((torch.randn(6, 6), torch.rand(6)), (weight, torch.tensor([5.0, 5.0, 0.0])))
    assert not certify(model, torch.rand(4, 6).double(), torch.full((4,), y), 0).any()


def constant_net(kind):
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)]
    model = nn.Sequential(*layers).requires_grad_(False)
    model[2].bias.fill_(-1e3)
    model[5].bias.copy_(torch.tensor([0.0, 1.0, -1.0]))
    if kind == "zero weights":
        for position in (0, 2, 5):
            model[position].weight.zero_()
    return model


@pytest.mark.parametrize("kind", ["dead layer", "zero weights"])
def test_a_net_that_always_answers_the_same_is_certified_for_that_answer_only(kind):
    model, x = constant_net(kind), torch.rand(3, 1, 6, 6)
    assert certify(model, x, torch.tensor([0, 1, 2]), 1.0).tolist() == [False, True, False]


def test_at_epsilon_zero_the_certified_images_are_the_right_ones(net):
    model, x, y = net
    assert torch.equal(certify(model, x, y, 0), model(x).argmax(dim=1) == y)


@pytest.mark.parametrize("epsilon", [0, *RADII])
def test_a_wrong_label_is_never_certified(net, epsilon):
    model, x, _ = net
    assert not certify(model, x, (model(x).argmax(dim=1) + 1) % 10, epsilon).any()


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


@pytest.mark.parametrize("case", MISLEADING)
def test_where_the_estimate_certifies_an_image_that_falls_the_proof_does_not(case):
    matrix, estimate = MISLEADING[case]
    model, broken = breakable(matrix(), epsilon=0.5)
    x, y = torch.zeros_like(broken), torch.tensor([0])
    assert broken.norm() <= 0.5 * (1 + 1e-12)
    assert (model(x).argmax(), model(broken).argmax()) == (0, 1)
    assert certify(model, x, y, 0.5, estimate).all()
    assert not certify(model, x, y, 0.5).any()


# --- rounding --------------------------------------------------------------------------------------------------------


@examples
@given(
    st.lists(st.sampled_from([1, 3, 40, 700, 5000]), min_size=3, max_size=4),
    st.lists(st.integers(-6, 6), min_size=3, max_size=3),
    st.integers(0, 2**20),
    st.booleans(),
)
def test_a_float32_pass_stays_as_close_to_the_exact_one_as_promised(sizes, exponents, seed, all_positive):
    torch.manual_seed(seed)
    shapes = [(min(after, 40), before) for before, after in zip(sizes, [min(s, 40) for s in sizes[1:]])]
    shapes = [(rows, columns if i == 0 else shapes[i - 1][0]) for i, (rows, columns) in enumerate(shapes)]
    z = torch.rand(3, sizes[0]) + 0.1
    exact, rounding = z.double(), Rounding(FLOAT32, torch.zeros(3, dtype=torch.float64))
    for (rows, columns), exponent in zip(shapes, exponents):
        layer = nn.Linear(columns, rows).requires_grad_(False)
        # Rows of different sizes; without signs nothing cancels and errors are largest.
        layer.weight.mul_(10.0**exponent * torch.logspace(0, 3, rows)[:, None])
        if all_positive:
            layer.weight.abs_()
        double = nn.Linear(columns, rows).double().requires_grad_(False)
        double.load_state_dict(layer.state_dict())
        operator, length = Dense.of(double, 0), exact.norm(dim=1)
        off_logits = rounding.of_logits(double, length)
        rounding.pass_layer(operator, norm_of(double.weight), norm_of(double.weight.abs()), length)
        z, exact = layer(z), double(exact)
        assert ((z - exact).abs() <= off_logits).all()
        assert ((z - exact).norm(dim=1) <= rounding.distance).all()
        z, exact = z.relu(), exact.relu()


def test_a_float32_convolution_stays_as_close_to_the_exact_one_as_promised(net):
    model, x, _ = net
    conv = Conv.of(model[0], 0, x.shape[1:])
    rounding = Rounding(FLOAT32, torch.zeros(len(x), dtype=torch.float64))
    absolute = norm_of(matrix_of(conv.absolute_operator()))
    rounding.pass_layer(conv, norm_of(matrix_of(conv)), absolute, x.flatten(1).norm(dim=1))
    weight, bias = model[0].weight.float(), model[0].bias.float()
    computed = nn.functional.conv2d(x.float(), weight, bias, stride=3)
    assert ((computed - model[0](x)).flatten(1).norm(dim=1) <= rounding.distance).all()
    assert (rounding.distance < 1e-3).all()


@pytest.mark.parametrize("epsilon", RADII)
def test_what_holds_in_float32_costs_margin(net, epsilon):
    exact, deployed = (proof_of(net, epsilon, deployed=kind) for kind in ("exact", "float32"))
    assert (deployed.margin > 0).sum() <= (exact.margin > 0).sum()
    same_stage = deployed.hidden_lipschitz == exact.hidden_lipschitz
    assert same_stage.any()
    assert (deployed.margin < exact.margin)[same_stage].all()
    assert (deployed.margin > exact.margin - 0.1)[same_stage].all()


@pytest.mark.parametrize("epsilon", RADII)
def test_no_float32_image_of_the_ball_changes_a_certified_float32_answer(net, epsilon):
    model, x, y = net
    certified = proof_of(net, epsilon, deployed="float32").margin > 0
    # Room for the rounding of the points themselves.
    points = points_in_the_ball(model, x, epsilon * (1 - 1e-5))[:, certified].float()
    assert ((points - x[certified]).flatten(2).norm(dim=2) <= epsilon).all()
    model.float()
    answers = model(points.flatten(0, 1)).argmax(dim=1).view(points.shape[:2])
    model.double()
    assert (answers == y[certified]).all()


@pytest.mark.parametrize("layer", [Normalize([0.5], [0.2]), nn.BatchNorm2d(1)], ids=lambda layer: type(layer).__name__)
@pytest.mark.parametrize("place", [0, 1])
def test_layers_without_a_rounding_bound_are_refused_for_float32(layer, place):
    layers = [nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(36, 3)]
    layers.insert(place, layer)
    model = nn.Sequential(*layers).double().eval()
    x, y = torch.rand(2, 1, 6, 6).double(), torch.zeros(2, dtype=torch.long)
    prove(model, x, y, 0.1, ProvenNorms(SURELY, 1000))
    with pytest.raises(TypeError, match=type(layer).__name__):
        prove(model, x, y, 0.1, ProvenNorms(SURELY, 1000, deployed="float32"))


def test_one_cannot_deploy_in_any_other_precision():
    with pytest.raises(ValueError, match="bfloat16"):
        ProvenNorms(SURELY, 10, deployed="bfloat16")


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
    assert certificate | {"seed": 0, "decided": []} == {
        "kind": "proven",
        "failure_probability": 1e-6,
        "seed": 0,
        "deployed": "exact",
        "clip": False,
        "lanczos_steps": list(LANCZOS_STEPS),
        "decided": [],
        "certified_plain": None,
    }
    assert sum(certificate["decided"]) == 12
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
