import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from locallip.bound.operators import Conv, Dense
from locallip.bound.power_iteration import PowerIteration
from locallip.training.vectors import StoredVectors
from torch import nn

# The same examples every time, so that a failure is nobody's bad luck.
examples = settings(max_examples=30, deadline=None, derandomize=True, database=None)
IMAGES = 3


@st.composite
def convolutions(draw):
    """A small random convolution on images of any size that it can take."""
    torch.manual_seed(draw(st.integers(0, 1000)))
    groups, per_group_in, per_group_out = (draw(st.integers(1, 2)) for _ in range(3))
    kernel, stride, padding, dilation = (
        (draw(st.integers(low, high)), draw(st.integers(low, high))) for low, high in ((1, 4), (1, 3), (0, 2), (1, 2))
    )
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for k, p, d in zip(kernel, padding, dilation)]
    size = [s + draw(st.integers(0, 3)) for s in smallest]
    layer = nn.Conv2d(groups * per_group_in, groups * per_group_out, kernel, stride, padding, dilation, groups)
    return Conv.of(layer.double(), 0, torch.Size([layer.in_channels, *size]))


@st.composite
def dense_layers(draw):
    torch.manual_seed(draw(st.integers(0, 1000)))
    layer = nn.Linear(draw(st.integers(1, 8)), draw(st.integers(1, 8)))
    return Dense.of(layer.double(), 0)


operators = st.one_of(convolutions(), dense_layers())


@st.composite
def masked_operators(draw):
    """An operator with a mask for its columns and one for its rows; either may be absent, full or empty."""
    operator = draw(operators)
    share = st.sampled_from([None, 0.0, 0.3, 0.7, 1.0])
    columns, rows = (
        None if (kept := draw(share)) is None else torch.rand(IMAGES, *shape) < kept
        for shape in (operator.input_shape, operator.output_shape)
    )
    return operator, columns, rows


@pytest.fixture
def operator():
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3, stride=2, padding=1).double()
    return Conv.of(layer, 0, torch.Size([2, 6, 6]))


def matrix(operator):
    """(outputs, inputs), column by column."""
    size = operator.input_shape.numel()
    basis = torch.eye(size, dtype=torch.float64).view(size, *operator.input_shape)
    return operator.apply(basis).flatten(1).T


def masked_matrix(operator, columns, rows):
    """(N, outputs, inputs)"""
    masked = matrix(operator).expand(IMAGES, -1, -1)
    if columns is not None:
        masked = masked * columns.flatten(1)[:, None, :]
    return masked if rows is None else masked * rows.flatten(1)[:, :, None]


def norm_of(matrix):
    return torch.linalg.matrix_norm(matrix, ord=2)


def batch(shape):
    return torch.randn(IMAGES, *shape, dtype=torch.float64)


def inner(a, b):
    return (a * b).flatten(1).sum(dim=1)


def ask(norms, operator, columns, rows):
    """The masked norms, one for every image; the whole norm comes first, as always."""
    norms.whole(operator)
    return norms.masked(operator, columns, rows).expand(IMAGES)


# --- operators -------------------------------------------------------------------------------------------------------


@examples
@given(operators)
def test_adjoint_is_the_adjoint_of_apply(operator):
    x, y = batch(operator.input_shape), batch(operator.output_shape)
    torch.testing.assert_close(inner(y, operator.apply(x)), inner(operator.adjoint(y), x))


@examples
@given(operators)
def test_affine_is_the_linear_part_and_the_bias(operator):
    x = batch(operator.input_shape)
    affine, linear = operator.affine(x), operator.apply(x)
    assert affine.shape == (IMAGES, *operator.output_shape)
    torch.testing.assert_close(affine - linear, operator.affine(torch.zeros_like(x)))


@examples
@given(operators)
def test_rescaled_scales_and_shifts_the_channels(operator):
    scale, shift = torch.randn(2, len(operator.weight), dtype=torch.float64)
    channels = (-1, *[1] * (len(operator.output_shape) - 1))
    x = batch(operator.input_shape)
    rescaled = operator.rescaled(scale, shift)
    torch.testing.assert_close(rescaled.affine(x), operator.affine(x) * scale.view(channels) + shift.view(channels))
    torch.testing.assert_close(rescaled.apply(x), operator.apply(x) * scale.view(channels))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (4, 3), "stride": (2, 3), "padding": (0, 2)},
        {"kernel_size": 3, "dilation": (2, 1), "groups": 2},
        {"kernel_size": (3, 5), "padding": "same", "dilation": (2, 1)},
        {"kernel_size": 2, "padding": "valid"},
    ],
)
def test_a_convolution_does_what_its_layer_does(settings, bias):
    layer = nn.Conv2d(2, 4, **settings, bias=bias).double()
    x = batch((2, 7, 8))
    torch.testing.assert_close(Conv.of(layer, 0, x.shape[1:]).affine(x), layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_a_dense_operator_does_what_its_layer_does(bias):
    layer = nn.Linear(5, 3, bias=bias).double()
    x = batch((5,))
    torch.testing.assert_close(Dense.of(layer, 0).affine(x), layer(x))


@examples
@given(operators)
def test_absolute_takes_every_entry_of_the_matrix_absolute(operator):
    x = batch(operator.input_shape)
    torch.testing.assert_close(operator.absolute(x).flatten(1), x.flatten(1) @ matrix(operator).abs().T)


@examples
@given(operators)
def test_row_norms_are_never_below_the_true_ones(operator):
    true = matrix(operator).norm(dim=1).view(operator.output_shape)
    assert (operator.row_norms() >= true * (1 - 1e-12)).all()


def test_row_norms_are_exact_where_no_padding_cuts_the_row(operator):
    true = matrix(operator).norm(dim=1).view(operator.output_shape)[:, 1:, 1:]
    torch.testing.assert_close(operator.row_norms().expand_as(true), true)


@pytest.mark.parametrize("product", ["apply", "adjoint", "affine", "absolute"])
def test_a_convolution_can_round_its_factors_and_keeps_the_precision_of_sums(operator, product):
    x = batch(operator.output_shape if product == "adjoint" else operator.input_shape)
    exact = getattr(operator, product)(x)
    operator.factors = torch.bfloat16
    rounded = getattr(operator, product)(x)
    assert rounded.dtype == exact.dtype
    assert 0 < (rounded - exact).norm() / exact.norm() < 0.01


def test_a_norm_of_rounded_factors_is_close_and_has_a_gradient(operator):
    exact, rounded = PowerIteration(100), PowerIteration(100, factors=torch.bfloat16)
    expected = torch.autograd.grad(exact.whole(operator), operator.weight)[0]
    operator.factors = torch.bfloat16
    found = torch.autograd.grad(rounded.whole(operator), operator.weight)[0]
    assert found.dtype == expected.dtype
    assert 0 < (found - expected).norm() < 0.02  # of a gradient of length about 1


def test_dense_layers_round_nothing():
    dense = Dense.of(nn.Linear(5, 4).double(), 0)
    x = batch(dense.input_shape)
    exact = dense.affine(x)
    dense.factors = torch.bfloat16
    assert torch.equal(dense.affine(x), exact)


def test_uneven_padding_is_refused():
    with pytest.raises(TypeError, match=r"position 3.*same"):
        Conv.of(nn.Conv2d(1, 1, 4, padding="same"), 3, torch.Size([1, 5, 5]))


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_padding_other_than_zeros_is_refused(mode):
    with pytest.raises(TypeError, match=f"position 3.*{mode}"):
        Conv.of(nn.Conv2d(1, 1, 3, padding=1, padding_mode=mode), 3, torch.Size([1, 5, 5]))


# --- power iteration -------------------------------------------------------------------------------------------------


@examples
@given(masked_operators())
def test_norms_approach_those_of_the_dense_matrix_from_below(case):
    operator, columns, rows = case
    norms = PowerIteration(1000)
    with torch.no_grad():
        whole, masked = norms.whole(operator), norms.masked(operator, columns, rows).expand(IMAGES)
        for estimate, true in (
            (whole, norm_of(matrix(operator))),
            (masked, norm_of(masked_matrix(operator, columns, rows))),
        ):
            assert (estimate <= true * (1 + 1e-9)).all()
            assert (estimate >= true * (1 - 1e-3)).all()
    assert (masked <= whole * (1 + 1e-3)).all()


@examples
@given(masked_operators(), st.integers(1, 4))
def test_few_iterations_stay_below_the_norm(case, iterations):
    operator, columns, rows = case
    masked = ask(PowerIteration(iterations), operator, columns, rows)
    assert (masked >= 0).all()
    assert (masked <= norm_of(masked_matrix(operator, columns, rows)) * (1 + 1e-9)).all()


def test_without_masks_the_local_norm_is_the_whole_one(operator):
    norms = PowerIteration(3)
    assert norms.whole(operator) == norms.masked(operator, None, None)


def test_gradient_of_the_whole_norm(operator):
    weight = operator.weight
    (expected,) = torch.autograd.grad(norm_of(matrix(operator)), weight)
    (actual,) = torch.autograd.grad(PowerIteration(1000).whole(operator), weight)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("kept_columns", "kept_rows"), [(0.6, 0.6), (0.6, None), (None, 0.6)])
def test_gradient_of_the_masked_norm(operator, kept_columns, kept_rows):
    columns = None if kept_columns is None else torch.rand(IMAGES, *operator.input_shape) < kept_columns
    rows = None if kept_rows is None else torch.rand(IMAGES, *operator.output_shape) < kept_rows
    weight = operator.weight
    true = norm_of(masked_matrix(operator, columns, rows))
    estimate = ask(PowerIteration(3000), operator, columns, rows)
    for image in range(IMAGES):
        (expected,) = torch.autograd.grad(true[image], weight, retain_graph=True)
        (actual,) = torch.autograd.grad(estimate[image], weight, retain_graph=True)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


def test_each_image_has_the_norm_that_it_has_alone(operator):
    columns = torch.rand(IMAGES, *operator.input_shape) < 0.5
    together = ask(PowerIteration(1000), operator, columns, None)
    for image in range(IMAGES):
        alone = ask(PowerIteration(1000), operator, columns[image : image + 1], None)
        torch.testing.assert_close(together[image], alone[0])


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
@pytest.mark.parametrize("given", ["columns", "rows", "both"])
def test_idle_masks_are_skipped_and_the_others_are_not(operator, side, given):
    columns, rows = (torch.rand(IMAGES, *shape) < 0.5 for shape in (operator.input_shape, operator.output_shape))
    columns[1:3], rows[1:3] = True, True  # eliminate nothing
    columns, rows = columns if given != "rows" else None, rows if given != "columns" else None
    starts = batch(getattr(operator, side))
    skipping, all_of_them = (PowerIteration(3, {0: starts}, seed=1, skip_idle_masks=skip) for skip in (True, False))
    ours, theirs = (ask(norms, operator, columns, rows) for norms in (skipping, all_of_them))
    whole = skipping.whole(operator)
    idle, busy = [1, 2], [i for i in range(IMAGES) if i not in (1, 2)]
    assert (ours[idle] <= whole).all()
    torch.testing.assert_close(ours[idle], PowerIteration(3, seed=1).whole(operator).expand(2))
    torch.testing.assert_close(ours[busy], theirs[busy])
    torch.testing.assert_close(skipping.local_vectors[0][busy], all_of_them.local_vectors[0][busy])
    assert torch.equal(skipping.local_vectors[0][idle], starts[idle])
    gradients = (torch.autograd.grad(norm[busy].sum(), operator.weight)[0] for norm in (ours, theirs))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
@pytest.mark.parametrize("spoiled", [torch.nan, torch.inf, 1e200])
def test_a_norm_that_cannot_be_computed_is_not_a_number(operator, side, spoiled):
    # 0 would certify everything.
    operator.weight.data[0, 0, 0, 0] = spoiled
    norms = PowerIteration(2, {0: batch(getattr(operator, side))}, {0: batch(getattr(operator, side))[:1]})
    columns = torch.ones(IMAGES, *operator.input_shape, dtype=torch.bool)
    assert norms.whole(operator).isnan()
    assert norms.masked(operator, columns, None).isnan().all()


def test_where_all_masks_are_idle_the_norm_is_the_whole_one(operator):
    columns, starts = torch.ones(IMAGES, *operator.input_shape, dtype=torch.bool), batch(operator.input_shape)
    norms = PowerIteration(2, {0: starts}, skip_idle_masks=True)
    whole = norms.whole(operator)
    for mask in (columns, None):
        assert torch.equal(norms.masked(operator, mask, None).expand(IMAGES), whole.expand(IMAGES))
        assert torch.equal(norms.local_vectors[0], starts)


def test_the_seed_decides_the_start(operator):
    first, same, other = (PowerIteration(1, seed=seed).whole(operator) for seed in (1, 1, 2))
    assert first == same
    assert first != other


@pytest.mark.parametrize("iterations", [0, -1])
def test_less_than_one_iteration_is_refused(iterations):
    with pytest.raises(ValueError, match=str(iterations)):
        PowerIteration(iterations)


# --- start vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
def test_calls_go_on_where_the_last_one_stopped(operator, side):
    shape = getattr(operator, side)
    columns = torch.rand(IMAGES, *operator.input_shape) < 0.5
    norms = PowerIteration(1, {0: batch(shape)}, {0: batch(shape)[:1]})
    with torch.no_grad():
        runs = [(norms.whole(operator), *norms.masked(operator, columns, None)) for _ in range(500)]
    estimates = torch.tensor(runs)
    assert (estimates.diff(dim=0) >= -1e-12).all()
    true = torch.stack([norm_of(matrix(operator)), *norm_of(masked_matrix(operator, columns, None))])
    torch.testing.assert_close(estimates[-1], true.detach(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
def test_vectors_stay_on_the_side_that_they_were_given_on(operator, side):
    shape = getattr(operator, side)
    norms = PowerIteration(2, {0: batch(shape)}, {0: batch(shape)[:1]})
    ask(norms, operator, torch.rand(IMAGES, *operator.input_shape) < 0.5, None)
    assert norms.global_vectors[0].shape == (1, *shape)
    assert norms.local_vectors[0].shape == (IMAGES, *shape)


@pytest.mark.parametrize("side", ["input_shape", "output_shape"])
def test_a_singular_vector_needs_one_iteration(operator, side):
    left, _, right = torch.linalg.svd(matrix(operator).detach())
    vector = right[0] if side == "input_shape" else left[:, 0]
    norms = PowerIteration(1, global_vectors={0: vector.view(1, *getattr(operator, side))})
    torch.testing.assert_close(norms.whole(operator), norm_of(matrix(operator)))


def test_a_changed_number_of_images_takes_fresh_vectors(operator):
    norms = PowerIteration(2, {0: batch(operator.input_shape)})
    norms.whole(operator)
    assert norms.masked(operator, torch.ones(5, *operator.input_shape, dtype=torch.bool), None).shape == (5,)


def test_given_vectors_are_not_written_to(operator):
    local, whole = batch(operator.input_shape), batch(operator.input_shape)[:1]
    kept = local.clone(), whole.clone()
    ask(PowerIteration(2, {0: local}, {0: whole}), operator, torch.rand(IMAGES, *operator.input_shape) < 0.5, None)
    assert torch.equal(local, kept[0])
    assert torch.equal(whole, kept[1])


@pytest.mark.parametrize("dead_side", ["input_shape", "output_shape"])
@pytest.mark.parametrize("start_side", ["input_shape", "output_shape"])
def test_a_norm_recovers_after_everything_was_masked_out(operator, dead_side, start_side):
    def masked(mask):
        return norms.masked(operator, *((mask, None) if dead_side == "input_shape" else (None, mask)))

    norms = PowerIteration(500, {0: batch(getattr(operator, start_side))})
    whole = norms.whole(operator)
    nothing = torch.zeros(IMAGES, *getattr(operator, dead_side), dtype=torch.bool)
    assert (masked(nothing) == 0).all()
    assert norms.local_vectors[0].flatten(1).any(dim=1).all()
    torch.testing.assert_close(masked(~nothing), whole.expand(IMAGES), rtol=1e-3, atol=0)


@pytest.mark.parametrize("start_side", ["input_shape", "output_shape"])
def test_a_norm_recovers_after_the_mask_has_moved_elsewhere(operator, start_side):
    norms = PowerIteration(500, {0: batch(getattr(operator, start_side))})
    left = torch.zeros(IMAGES, *operator.input_shape, dtype=torch.bool)
    left[..., :3] = True
    for columns in (left, ~left):
        true = norm_of(masked_matrix(operator, columns, None))
        torch.testing.assert_close(norms.masked(operator, columns, None), true, rtol=1e-3, atol=0)


def test_a_zero_operator_has_norm_zero_and_recovers(operator):
    weight = operator.weight.detach().clone()
    norms = PowerIteration(500)
    columns = torch.ones(IMAGES, *operator.input_shape, dtype=torch.bool)
    nn.init.zeros_(operator.weight)
    estimates = [norms.whole(operator), *norms.masked(operator, columns, None)]
    assert all(estimate == 0 for estimate in estimates)
    (gradient,) = torch.autograd.grad(sum(estimates), operator.weight)
    assert gradient.isfinite().all()
    with torch.no_grad():
        operator.weight.copy_(weight)
    true = norm_of(matrix(operator)).expand(IMAGES)
    torch.testing.assert_close(norms.whole(operator), true[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(norms.masked(operator, columns, None), true, rtol=1e-3, atol=0)


# --- stored vectors --------------------------------------------------------------------------------------------------

SHAPES = {0: torch.Size([2, 3, 3]), "7": torch.Size([5])}


@pytest.fixture
def stored():
    return StoredVectors(10, SHAPES, torch.device("cpu"))


def unit_vectors(count):
    return {position: nn.functional.normalize(torch.randn(count, *shape)) for position, shape in SHAPES.items()}


def test_what_was_written_is_read_in_half_precision(stored):
    indices, vectors = torch.tensor([7, 0, 3]), unit_vectors(3)
    stored.write(indices, vectors)
    read = stored.read(indices.flip(0))
    assert read.keys() == SHAPES.keys()
    for position, vector in vectors.items():
        assert read[position].dtype == torch.float32
        torch.testing.assert_close(read[position].flip(0), vector, rtol=0, atol=2e-3)


def test_other_images_keep_their_vectors(stored):
    others = torch.tensor([1, 2, 4, 5, 6, 8, 9])
    before = stored.read(others)
    stored.write(torch.tensor([7, 0, 3]), unit_vectors(3))
    after = stored.read(others)
    assert all(torch.equal(before[position], after[position]) for position in SHAPES)


def test_reading_changes_nothing(stored):
    indices = torch.arange(10)
    for vector in stored.read(indices).values():
        vector.zero_()
    first, second = stored.read(indices), stored.read(indices)
    assert all(torch.equal(first[position], second[position]) and first[position].any() for position in SHAPES)


def test_start_vectors_have_a_length_near_one(stored):
    for vector in stored.read(torch.arange(10)).values():
        lengths = vector.flatten(1).norm(dim=1)
        assert ((lengths > 0.3) & (lengths < 3)).all()


def test_no_entry_starts_at_zero_even_if_it_was_masked_out(stored):
    indices = torch.arange(10)
    stored.write(indices, {position: torch.zeros(10, *shape) for position, shape in SHAPES.items()})
    assert all(vector.all() for vector in stored.read(indices).values())


def test_bytes_are_two_for_every_entry(stored):
    assert stored.bytes == 10 * (18 + 5) * 2


def test_the_seed_decides_the_stored_start():
    device, index = torch.device("cpu"), torch.tensor([0])
    first, same, other = (StoredVectors(1, SHAPES, device, seed).read(index)[0] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
